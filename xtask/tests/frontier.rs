//! `eval frontier` as its users run it, on a model made for the test.

#[path = "common/scene.rs"]
mod scene;

use std::process::{Command, Output};

use scene::{Scene, error, rows};
use serde_json::{Value, json};

fn llama() -> Scene {
    Scene::new(json!({
        "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 8, "max_position_embeddings": 16,
        "tie_word_embeddings": true,
    }))
}

fn frontier(scene: &Scene, more: &[&str]) -> Output {
    let path = |name: &str| scene.path(name).display().to_string();
    Command::new(env!("CARGO_BIN_EXE_xtask"))
        .args(["eval", "frontier", "--json", "--samples", "8"])
        .args(["--calib-samples", "12", "--compare-samples", "8"])
        .args(["--coarse-tokens", "64", "--fine-tokens", "128"])
        .args(match more.contains(&"--formats") {
            true => vec![],
            false => vec!["--formats", "gptq-int8-g32,gptq-int4-g32"],
        })
        .args(["--model", &path("model"), "--text", &path("text.txt")])
        .args(match more.contains(&"--calib") {
            true => vec![],
            false => vec!["--calib".to_string(), path("calib.txt")],
        })
        .args(more)
        .output()
        .unwrap()
}

fn number(row: &Value, field: &str) -> f64 {
    let found = row.get(field).or_else(|| row["extra"].get(field));
    let found = found.and_then(Value::as_f64);
    found.unwrap_or_else(|| panic!("{field} in {row}"))
}

#[test]
fn each_budget_has_a_joint_plan_that_fits_and_what_the_same_bytes_buy_along_one_axis() {
    let scene = llama();
    let rows = rows(&frontier(&scene, &["--memory", "90%,70%"]));
    let dense = rows.iter().find(|row| row["method"] == "dense").unwrap();
    let most = number(dense, "bytes");
    let joint: Vec<&Value> = rows.iter().filter(|row| row["method"] == "joint").collect();
    assert_eq!(joint.len(), 2);
    for (row, share) in joint.iter().zip([0.9, 0.7]) {
        assert!(number(row, "bytes") <= share * most);
        assert!(number(row, "perplexity") > 1.0);
        assert!(number(row, "tokens_per_second") > 0.0);
        // The embedding, and attention and MLP of two blocks.
        assert_eq!(row["layers"].as_array().unwrap().len(), 5);
    }
    let bits = rows.iter().filter(|row| row["method"] == "bits alone");
    assert!(bits.clone().count() > 0);
    for row in rows.iter().filter(|row| row["role"] == "control") {
        // A plan of the division's own is no better than the joint one of its bytes.
        if row["method"] != "dense" && row["method"] != "k-quant mix" {
            assert!(number(row, "joint_kl") <= number(row, "kl"), "{row}");
        }
        assert!(
            number(row, "bytes") <= number(row, "budget") * most + 1.0,
            "{row}"
        );
    }
}

#[test]
fn saved_models_are_the_rows_and_open_again() {
    let scene = llama();
    let save = scene.path("saved");
    let state = scene.path("state");
    let (saved, state) = (save.display().to_string(), state.display().to_string());
    let more = [
        "--memory",
        "70%",
        "--no-baselines",
        "--save",
        &saved,
        "--resume",
        &state,
        "--tokens-per-second",
        "1",
        "--refine",
        "1",
    ];
    let found = rows(&frontier(&scene, &more));
    let joint = found.iter().find(|row| row["method"] == "joint").unwrap();
    assert!(number(joint, "predicted_tokens_per_second") >= 1.0);
    let folder = std::fs::read_dir(&save)
        .unwrap()
        .next()
        .unwrap()
        .unwrap()
        .path();
    assert!(folder.join("plan.json").is_file());
    let checkpoint = causal_lm::open(folder.join("model")).unwrap();
    assert!(checkpoint.total_bytes() as f64 <= number(joint, "bytes"));
    // A run that goes on finds what it has saved, and writes what is missing.
    let kl = number(joint, "kl");
    let plan = std::fs::read(folder.join("plan.json")).unwrap();
    for missing in [false, true] {
        if missing {
            std::fs::remove_dir_all(&folder).unwrap();
        }
        let again = rows(&frontier(&scene, &more));
        let joint = again.iter().find(|row| row["method"] == "joint").unwrap();
        assert_eq!(number(joint, "kl"), kl);
        assert_eq!(std::fs::read(folder.join("plan.json")).unwrap(), plan);
    }
    // Nothing else is written over.
    std::fs::write(folder.join("plan.json"), "{}").unwrap();
    let refused = error(&frontier(&scene, &more));
    assert!(refused.contains("plan.json"), "{refused}");
    let alone: Vec<&str> = more[..5].to_vec();
    let refused = error(&frontier(&scene, &alone));
    assert!(refused.contains("--save"), "{refused}");
}

#[test]
fn baselines_are_saved_beside_the_joint_plan() {
    let scene = llama();
    let save = scene.path("saved");
    let saved = save.display().to_string();
    let more = ["--memory", "60%", "--save", &saved, "--save-baselines"];
    let found = rows(&frontier(&scene, &more));
    let names = std::fs::read_dir(&save).unwrap();
    let names: Vec<String> = names
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    let budget = names.iter().find(|name| name.parse::<u64>().is_ok());
    let budget = budget.expect("the joint plan's folder");
    let controls = found.iter().filter(|row| row["role"] == "control");
    let mut saved = 0;
    for row in controls.filter(|row| row["method"] != "dense") {
        let method = row["method"].as_str().unwrap();
        let method = method.replace(", ", "-").replace(' ', "-");
        let folder = save.join(format!("{budget}-{method}"));
        let checkpoint = causal_lm::open(folder.join("model")).unwrap();
        assert!(checkpoint.total_bytes() as f64 <= number(row, "bytes"));
        saved += 1;
    }
    assert!(saved > 2);
    assert_eq!(names.len(), saved + 1, "{names:?}");
    let alone = frontier(&scene, &["--memory", "60%", "--save-baselines"]);
    assert_eq!(alone.status.code(), Some(2));
    let refused = String::from_utf8(alone.stderr).unwrap();
    assert!(refused.contains("--save <DIR>"), "{refused}");
}

#[test]
fn plans_for_other_runtimes_are_saved_as_their_files_and_open_again() {
    let scene = Scene::new(json!({
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 9, "max_position_embeddings": 16,
        "tie_word_embeddings": true,
    }))
    .with_characters();
    for (target, formats, files) in [
        ("gguf", "q8_0,q4_0", &["model.gguf", "plan.json"][..]),
        (
            "vllm",
            "gptq-int4-g32-sym",
            &["model/config.json", "plan.json"][..],
        ),
    ] {
        let save = scene.path(target).display().to_string();
        let more = [
            "--for",
            target,
            "--formats",
            formats,
            "--memory",
            "80%",
            "--save",
            &save,
        ];
        let found = rows(&frontier(&scene, &more));
        let joint = found.iter().find(|row| row["method"] == "joint").unwrap();
        let folder = std::fs::read_dir(&save)
            .unwrap()
            .next()
            .unwrap()
            .unwrap()
            .path();
        for file in files {
            assert!(folder.join(file).is_file(), "{target}: {file}");
        }
        let model = match target {
            "gguf" => folder.join("model.gguf"),
            _ => folder.join("model"),
        };
        // What was saved is evaluated as the row says.
        let text = scene.path("text.txt");
        let mut evaluate = Command::new(env!("CARGO_BIN_EXE_xtask"));
        evaluate
            .args(["eval", "perplexity", "--json", "--samples", "8"])
            .args(["--model".as_ref(), model.as_os_str()])
            .args(["--text".as_ref(), text.as_os_str()]);
        let adapter = ["adapter.gguf", "adapter"].map(|name| folder.join(name));
        if let Some(adapter) = adapter.iter().find(|path| path.exists()) {
            evaluate.args(["--adapter".as_ref(), adapter.as_os_str()]);
        }
        let again = rows(&evaluate.output().unwrap());
        let difference = number(&again[0], "perplexity") / number(joint, "perplexity") - 1.0;
        assert!(difference.abs() < 1e-5, "{target}: {difference}");
    }
}

#[test]
fn limits_that_no_plan_keeps_are_refused_by_flag_with_the_least() {
    let scene = llama();
    for (more, says) in [
        (
            ["--max-params", "100"],
            "--max-params: 100 parameters are too few",
        ),
        (["--tokens-per-second", "1e12"], "--tokens-per-second"),
        (["--widths", "1.5"], "--widths"),
    ] {
        let flags = [&["--memory", "80%"][..], &more].concat();
        let refused = error(&frontier(&scene, &flags));
        assert!(refused.contains(says), "{refused}");
    }
    let cached = [
        "--memory",
        "80%",
        "--for",
        "gguf",
        "--context",
        "64",
        "--cache-formats",
        "int8",
    ];
    let refused = error(&frontier(
        &scene,
        &[&cached[..], &["--formats", "q8_0"]].concat(),
    ));
    assert!(
        refused.contains("--cache-formats int8: runtimes other than `here`"),
        "{refused}"
    );
}

#[test]
fn what_is_known_beforehand_is_refused_before_a_text_is_read() {
    let scene = llama();
    let file = scene.path("text.txt").display().to_string();
    std::fs::write(scene.path("calib.txt"), "a b").unwrap();
    for (more, says) in [
        (&["--memory", "50%,50%"][..], "--memory: 50% is given twice"),
        (
            &["--memory", "50%", "--ranks", "9999999"],
            "--ranks 9999999: the largest",
        ),
        (
            &["--memory", "50%", "--ranks", "2,2"],
            "--ranks: 2 is given twice",
        ),
        (&["--memory", "50%", "--save", "/dev/null/x"], "--save: "),
        (&["--memory", "50%", "--resume", &file], "--resume "),
    ] {
        let refused = error(&frontier(&scene, more));
        assert!(refused.contains(says), "{refused}");
        assert!(!refused.contains("calib.txt"), "{refused}");
    }
    let refused = error(&frontier(&scene, &["--memory", "50%"]));
    assert!(refused.contains("calib.txt"), "{refused}");
}

#[test]
fn a_budget_below_the_smallest_plan_and_one_text_for_both_are_refused_with_the_reason() {
    let scene = llama();
    let refused = error(&frontier(&scene, &["--memory", "1%"]));
    assert!(
        refused.contains("the smallest plan for --for here takes"),
        "{refused}"
    );
    let text = scene.path("text.txt").display().to_string();
    let refused = error(&frontier(&scene, &["--memory", "50%", "--calib", &text]));
    assert!(refused.contains("--calib"), "{refused}");
}

#[test]
fn caches_are_part_of_the_budget_and_generate_runs_those_of_a_saved_plan() {
    let scene = Scene::new(json!({
        "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 8, "max_position_embeddings": 16,
        "tie_word_embeddings": true,
    }));
    let saved = scene.path("saved");
    let text = saved.display().to_string();
    let more = [
        "--memory",
        "70%",
        "--context",
        "256",
        "--batch",
        "2",
        "--save",
        &text,
    ];
    let more = [&more[..], &["--cache-tokens", "0.5", "--ranks", "2"]].concat();
    let found = rows(&frontier(&scene, &more));
    let dense = found.iter().find(|row| row["method"] == "dense").unwrap();
    // Keys and values of two heads of 8 channels in f32, and the position of each token; evicting layers have room for 64 more.
    let tokens = (256 + 64) * 2;
    assert_eq!(
        number(dense, "kv_bytes"),
        f64::from(2 * 2 * (2 * 8 * 4 + 4) * tokens)
    );
    let joint = found.iter().find(|row| row["method"] == "joint").unwrap();
    let (weights, caches) = (number(joint, "bytes"), number(joint, "kv_bytes"));
    assert!(caches < number(dense, "kv_bytes"));
    let of_both = number(joint, "cache_share") * (weights + caches);
    assert!((of_both - caches).abs() < 1.0);
    for site in joint["layers"].as_array().unwrap() {
        let attention = site["site"].as_str().unwrap().starts_with("attention");
        assert_eq!(site.get("cache").is_some(), attention, "{site}");
    }
    assert!(found.iter().any(|row| row["method"] == "caches alone"));
    let folder = std::fs::read_dir(&saved)
        .unwrap()
        .next()
        .unwrap()
        .unwrap()
        .path();
    let budget: f64 = folder
        .file_name()
        .unwrap()
        .to_str()
        .unwrap()
        .parse()
        .unwrap();
    assert!(
        weights + caches <= budget,
        "{weights} + {caches} of {budget}"
    );

    let generate = |cache: &str| -> Output {
        let path = |path: std::path::PathBuf| path.display().to_string();
        let mut args = vec!["generate".to_string(), "--prompt".into(), "a b c".into()];
        args.extend(["--max-new-tokens".into(), "8".into(), "--model".into()]);
        args.extend([
            path(folder.join("model")),
            "--cache".into(),
            path(folder.join(cache)),
        ]);
        if folder.join("adapter").exists() {
            args.extend(["--adapter".into(), path(folder.join("adapter"))]);
        }
        let run = Command::new(env!("CARGO_BIN_EXE_xtask"))
            .args(args)
            .output();
        run.unwrap()
    };
    let output = generate("cache.json");
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(!output.stdout.is_empty());
    let refused = error(&generate("plan.json"));
    assert!(
        refused.contains("--cache") && refused.contains("cache.json"),
        "{refused}"
    );
}
