//! What a user reads when something is wrong, or odd: the file, model or flag to blame, once.

#[path = "common/scene.rs"]
mod scene;

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Output, Stdio};

use candle_core::{DType, Device};
use scene::{Scene, error, rows};
use serde_json::{Value, json};
use tensor_io::{Checkpoint, CheckpointWriter, TensorSpec, WriteOptions};
use xtask::default_model;

fn scene() -> Scene {
    Scene::new(json!({
        "model_type": "llama", "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2,
        "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 8, "max_position_embeddings": 16,
    }))
}

/// A suite on the scene's model and texts.
fn eval(scene: &Scene, suite: &str, more: &str) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_xtask"));
    command
        .args(["eval", suite, "--json", "--model"])
        .arg(scene.path("model"))
        .arg("--text")
        .arg(scene.path("text.txt"));
    if suite != "kv" && suite != "perplexity" {
        command.arg("--calib").arg(scene.path("calib.txt"));
    }
    command.args(more.split_whitespace()).output().unwrap()
}

/// Changes a JSON file.
fn edit(path: &Path, change: impl FnOnce(&mut Value)) {
    let mut json: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    change(&mut json);
    std::fs::write(path, json.to_string()).unwrap();
}

const SUITES: [(&str, &str); 4] = [
    ("perplexity", ""),
    ("structured", "--method flap --ratio 0.2"),
    (
        "lowrank",
        "--compress rtn-int4 --method svd --rank 2 --calib-samples 8 --held-out-samples 4",
    ),
    ("kv", "--policy lazy"),
];

#[test]
fn a_token_without_a_row_is_named_with_model_and_text() {
    let scene = scene();
    edit(&scene.path("model/tokenizer.json"), |json| {
        json["model"]["vocab"]["c"] = json!(700);
    });
    for (suite, more) in SUITES {
        let line = error(&eval(&scene, suite, more));
        let model = scene.path("model").display().to_string();
        assert_eq!(line.matches(&model).count(), 1, "{line}");
        assert!(line.contains("token 700 (\"c\")"), "{line}");
        assert!(line.contains(".txt") && line.contains("8 rows"), "{line}");
    }
}

#[test]
fn an_activation_that_is_not_finite_is_named_with_the_model() {
    let scene = scene();
    let source = Checkpoint::open(scene.path("model")).unwrap();
    let dst = scene.path("loud");
    let specs = source.names().map(|name| {
        let info = source.info(name).unwrap();
        TensorSpec::new(name, DType::F32, info.shape.clone())
    });
    let options = WriteOptions::default();
    let mut writer =
        CheckpointWriter::create(&dst, source.config(), specs.collect(), &options).unwrap();
    writer.carry_from(&source).unwrap();
    for name in source.names().map(String::from).collect::<Vec<_>>() {
        let tensor = source.tensor_as(&name, DType::F32, &Device::Cpu).unwrap();
        let loud = match name.ends_with("1.mlp.down_proj.weight") {
            true => (tensor * 3e38).unwrap().clamp(-3e38, 3e38).unwrap(),
            false => tensor,
        };
        writer.write_tensor(&name, &loud).unwrap();
    }
    writer.finish().unwrap();
    std::fs::remove_dir_all(scene.path("model")).unwrap();
    std::fs::rename(&dst, scene.path("model")).unwrap();
    for (suite, more) in SUITES {
        let output = eval(&scene, suite, more);
        let line = error(&output);
        let model = scene.path("model").display().to_string();
        assert!(line.contains(&model), "{suite}: {line}");
        assert!(line.contains("finite"), "{suite}: {line}");
    }
}

#[test]
fn a_path_stands_once() {
    let scene = scene();
    edit(&scene.path("model/config.json"), |json| {
        json.as_object_mut().unwrap().remove("vocab_size");
    });
    let line = error(&eval(&scene, "perplexity", ""));
    let model = scene.path("model").display().to_string();
    assert_eq!(line.matches(&model).count(), 1, "{line}");
    assert!(line.contains("config.json: field `vocab_size`"), "{line}");
}

#[test]
fn a_prompt_that_was_not_given_is_not_blamed_as_a_flag() {
    let scene = scene();
    let refused = |more: &str| error(&eval(&scene, "kv", &format!("--window 3 {more}")));
    let speed = |more: &str| {
        let output = Command::new(env!("CARGO_BIN_EXE_xtask"))
            .args(["eval", "kv", "--task", "speed", "--window", "3", "--model"])
            .arg(scene.path("model"))
            .args(more.split_whitespace())
            .output()
            .unwrap();
        error(&output)
    };
    let by_default = speed("");
    assert!(
        by_default.contains("a prompt of 1 token, as many as by default"),
        "{by_default}"
    );
    assert!(!by_default.contains("--prompt"), "{by_default}");
    let given = speed("--prompt 2");
    assert!(given.contains("--prompt 2"), "{given}");
    let given = refused("--policy lazy --prompt 3");
    assert!(given.contains("--prompt 3"), "{given}");
}

#[test]
fn a_rank_beyond_all_linears_is_refused_with_the_largest() {
    let scene = scene();
    let more = "--compress rtn-int4 --method svd --rank 1000000 --no-controls --calib-samples 8";
    let line = error(&eval(&scene, "lowrank", more));
    assert!(
        line.contains("--rank 1000000") && line.contains("32"),
        "{line}"
    );
}

/// `generate` on the scene's model, about to run.
fn generate(scene: &Scene, more: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_xtask"));
    command
        .args(["generate", "--prompt", "a", "--model"])
        .arg(scene.path("model"))
        .args(more.split_whitespace());
    command
}

#[test]
fn generation_ends_at_the_end_tokens_of_generation_config() {
    let scene = scene();
    let said = || {
        let output = generate(&scene, "--max-new-tokens 3").output().unwrap();
        String::from_utf8(output.stderr).unwrap()
    };
    assert!(said().starts_with("3 tokens"), "{}", said());
    let ends = json!({ "eos_token_id": [0, 1, 2, 3, 4, 5, 6, 7] });
    let text = format!("\u{feff}{ends}");
    std::fs::write(scene.path("model/generation_config.json"), text).unwrap();
    assert!(said().starts_with("0 tokens"), "{}", said());
}

#[test]
fn any_number_of_new_tokens_is_cut_to_the_positions_of_the_model() {
    let scene = scene();
    let more = format!("--max-new-tokens {}", u64::MAX);
    let output = generate(&scene, &more).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{said}");
    assert!(said.contains("stopped at the 16 positions"), "{said}");
}

#[test]
fn generation_ends_quietly_when_nobody_reads_it() {
    let scene = scene();
    let mut command = generate(&scene, "");
    let command = command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut running = command.spawn().unwrap();
    drop(running.stdout.take());
    let output = running.wait_with_output().unwrap();
    assert!(output.status.success());
    assert_eq!(String::from_utf8(output.stderr).unwrap(), "");
}

#[test]
fn flags_of_generation_that_would_do_nothing_are_refused() {
    let scene = scene();
    for (more, names) in [
        ("--policy full --budget 3", "--budget"),
        ("--budget 3", "--budget"),
        ("--temperature 0 --top-k 3", "--top-k"),
        ("--temperature 0 --top-p 0.5", "--top-p"),
    ] {
        let output = generate(&scene, more).output().unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{more}: {stderr}");
        assert!(stderr.contains(names), "{more}: {stderr}");
    }
    let sampled = "--policy streaming --budget 8 --temperature 1 --top-k 3 --max-new-tokens 2";
    assert!(generate(&scene, sampled).output().unwrap().status.success());
}

#[test]
fn one_of_something_is_singular() {
    let scene = scene();
    let output = generate(&scene, "--max-new-tokens 1").output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(
        stderr.starts_with("1 token, prompt of 1 token,"),
        "{stderr}"
    );
}

#[test]
fn more_threads_than_cores_are_cut_with_a_word() {
    let scene = scene();
    let output = eval(&scene, "perplexity", "--threads 100000 --samples 1");
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(
        stderr.contains("--threads 100000: one for each core"),
        "{stderr}"
    );
    assert_eq!(rows(&output).len(), 1);
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let cores = report["machine"]["cores"].as_u64().unwrap();
    assert_eq!(report["threads"].as_u64().unwrap_or(cores), cores);
}

#[test]
fn paths_with_commas_are_read_by_every_suite() {
    let scene = scene();
    for name in ["model", "text.txt", "calib.txt"] {
        let odd = format!("a,{name}");
        std::fs::rename(scene.path(name), scene.path(&odd)).unwrap();
    }
    let path = |name: &str| scene.path(&format!("a,{name}")).display().to_string();
    let questions = scene.path("q,uestions.jsonl");
    let question = r#"{"question": "a b", "choices": {"text": ["c", "d"], "label": ["A", "B"]}, "answerKey": "A"}"#;
    std::fs::write(&questions, question).unwrap();
    let questions = questions.display().to_string();
    let run = |words: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_xtask"))
            .arg("eval")
            .args(words)
            .args(["--json", "--samples", "2"])
            .output()
            .unwrap();
        rows(&output).len()
    };
    let (model, text, calib) = (path("model"), path("text.txt"), path("calib.txt"));
    let two = format!("{model},{model}");
    assert_eq!(run(&["perplexity", "--model", &model, "--text", &text]), 1);
    let kv = ["kv", "--policy", "lazy", "--budget", "0.5", "--text", &text];
    assert_eq!(run(&[&kv[..], &["--model", &model]].concat()), 2);
    let overview = run(&[&kv[..], &["--model", &two]].concat());
    assert!(overview >= 4, "{overview}");
    assert_eq!(run(&["tasks", "--model", &model, "--data", &questions]), 1);
    let structured = ["structured", "--method", "flap", "--ratio", "0.2"];
    let structured = [
        &structured[..],
        &["--model", &model, "--text", &text, "--calib", &calib],
    ]
    .concat();
    assert_eq!(run(&structured), 2);
}

#[test]
fn a_random_model_names_its_flags_and_replaces_no_model_of_somebodys() {
    let scene = scene();
    let random = |config: &Path, out: &str| {
        let output = Command::new(env!("CARGO_BIN_EXE_xtask"))
            .args(["random-model", "--overwrite", "--config"])
            .arg(config)
            .arg("--out")
            .arg(scene.path(out))
            .output()
            .unwrap();
        error(&output)
    };
    let config = scene.path("model/config.json");
    let line = random(&config, "model");
    assert!(
        line.contains("--out") && line.contains("tokenizer"),
        "{line}"
    );
    assert!(scene.path("model/tokenizer.json").exists());
    let odd = scene.path("odd.json");
    for (field, value) in [
        ("num_hidden_layers", 1_000_000_000),
        ("hidden_size", 16_384),
    ] {
        std::fs::copy(&config, &odd).unwrap();
        edit(&odd, |json| {
            json[field] = json!(value);
            json["vocab_size"] = json!(16_777_216);
        });
        let line = random(&odd, "odd");
        assert!(
            line.contains("--config") && line.contains("odd.json"),
            "{line}"
        );
        assert!(!scene.path("odd").exists());
    }
}

/// A run that is not quiet, until it says how long it will take: what it said, up to that line. It is ended there.
fn expectation(command: &mut Command) -> String {
    let mut running = command
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = Vec::new();
    for line in BufReader::new(running.stderr.take().unwrap()).lines() {
        let line = line.unwrap();
        let is_expectation = line.contains(": about ");
        said.push(line);
        if is_expectation {
            break;
        }
    }
    // It may have ended by itself, where it said nothing of the kind.
    drop(running.kill());
    running.wait().unwrap();
    said.join("\n")
}

#[test]
fn a_run_of_hours_says_so_before_it_begins() {
    let folder = tempfile::tempdir().unwrap();
    let search = |more: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_xtask"));
        command
            .args(["eval", "structured", "--method", "tyr", "--ratio", "0.25"])
            .arg("--model")
            .arg(default_model::folder())
            .args(["--samples", "2", "--calib-samples", "2", "--window", "64"])
            // A billion candidates.
            .args(["--iterations", "1000", "--generations", "1000"])
            .args(["--offspring", "1000", "--search-samples", "2"])
            .args(more)
            // For what a killed run leaves.
            .env("TMPDIR", folder.path());
        expectation(&mut command)
    };
    let hours = |said: &str| -> f64 {
        let about = said
            .strip_prefix("structured: about ")
            .unwrap_or_else(|| panic!("{said}"));
        let (number, unit) = about.split_once(' ').unwrap();
        assert_eq!(unit, "hours", "{said}");
        number.parse().unwrap()
    };
    // No machine takes a hundred billion tokens through four layers in a day, nor any ten thousand years.
    assert!((24.0..1e8).contains(&hours(&search(&[]))));
    let cells = folder.path().join("cells");
    let said = search(&["--cells", cells.to_str().unwrap(), "--shard", "1/2"]);
    let (time, less) = said.split_once(", ").unwrap_or_else(|| panic!("{said}"));
    assert!(hours(time) >= 24.0, "{said}");
    assert_eq!(less, "less what --cells has and other parts measure");
}

#[test]
fn a_model_of_ones_own_on_the_bundled_texts_is_told_what_its_perplexity_is_worth() {
    const REMARK: &str = "The text is the bundled one, generated tales for the bundled model";
    let scene = scene();
    let own = scene.path("model");
    let run = |suite: &str, model: &Path, more: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_xtask"));
        command.args(["eval", suite, "--samples", "2", "--window", "16", "--model"]);
        command.arg(model).args(more).output().unwrap()
    };
    let first = |suite: &str, model: &Path, more: &[&str]| {
        let output = run(suite, model, &[more, &["--json"]].concat());
        rows(&output);
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        report["sections"][0].clone()
    };
    let remarked = |section: &Value| {
        let remarks = section["remarks"].as_array();
        let mut remarks = remarks.into_iter().flatten();
        remarks.any(|remark| remark.as_str().unwrap().starts_with(REMARK))
    };
    // Caches are measured on a text that is named.
    for (suite, more) in SUITES.into_iter().filter(|(suite, _)| *suite != "kv") {
        let more: Vec<&str> = more.split_whitespace().collect();
        let section = first(suite, &own, &more);
        assert!(remarked(&section), "{suite}: {}", section["remarks"]);
        let facts = &section["protocol"];
        assert_eq!(facts["evaluation text"], "evaluation.txt", "{suite}");
        if matches!(suite, "structured" | "lowrank") {
            assert_eq!(facts["calibration text"], "calibration.txt", "{suite}");
        }
    }
    // As it is printed, too, where lines end elsewhere.
    let printed = run("perplexity", &own, &[]);
    let printed = String::from_utf8(printed.stdout).unwrap();
    let words: Vec<&str> = printed.split_whitespace().collect();
    assert!(words.join(" ").contains(REMARK), "{printed}");
    // Neither on a text of one's own nor for the model that the text was made for.
    let text = scene.path("text.txt");
    let section = first("perplexity", &own, &["--text", text.to_str().unwrap()]);
    assert!(!remarked(&section), "{section}");
    assert_eq!(section["protocol"]["evaluation text"], "text.txt");
    let bundled = default_model::folder();
    let written_out = std::path::absolute(&bundled).unwrap();
    for model in [&bundled, &written_out] {
        let section = first("perplexity", model, &[]);
        assert!(!remarked(&section), "{}: {section}", model.display());
        assert_eq!(section["protocol"]["evaluation text"], "evaluation.txt");
    }
    let text = written_out.join("evaluation.txt");
    let section = first("perplexity", &own, &["--text", text.to_str().unwrap()]);
    assert!(remarked(&section), "{section}");
}
