//! Evaluations whose cells are measured by several processes, or by one that was stopped.

#[path = "common/scene.rs"]
mod scene;

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use scene::{Scene, error, rows};
use serde_json::{Value, json};

fn xtask(words: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_xtask"))
        .args(words)
        .output()
        .unwrap()
}

fn scene() -> Scene {
    Scene::new(json!({
        "model_type": "llama", "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2,
        "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 8, "max_position_embeddings": 16,
    }))
}

/// The words of an evaluation on the scene's files.
fn words(scene: &Scene, suite: &str, more: &str) -> Vec<String> {
    let path = |name: &str| scene.path(name).display().to_string();
    let mut words = vec!["eval".to_owned(), suite.into()];
    words.extend([
        "--model".into(),
        path("model"),
        "--text".into(),
        path("text.txt"),
    ]);
    if matches!(suite, "structured" | "lowrank") {
        words.extend(["--calib".into(), path("calib.txt")]);
    }
    words.extend(more.split(' ').map(String::from));
    words
}

fn run(words: &[String], more: &[&str]) -> Output {
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    xtask(&[&words[..], more].concat())
}

/// The JSON of a report without what differs from run to run.
fn numbers(output: &Output) -> Value {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    let mut report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let report = report.as_object_mut().unwrap();
    let mut numbers = json!({ "rows": report["rows"], "sections": report["sections"] });
    strip(&mut numbers);
    numbers
}

fn strip(value: &mut Value) {
    const TIMES: [&str; 6] = [
        "dense reads",
        "read",
        "peak_rss_bytes",
        "peak_rss_scope",
        "calibration time",
        "calibration memory",
    ];
    match value {
        Value::Object(fields) => {
            fields.retain(|name, _| {
                let is_rate = name.contains("tokens_per_second") || name.ends_with("speedup");
                !TIMES.contains(&name.as_str()) && !name.starts_with("seconds") && !is_rate
            });
            fields.values_mut().for_each(strip);
        }
        Value::Array(values) => values.iter_mut().for_each(strip),
        _ => {}
    }
}

/// The cells in a folder.
fn cells(dir: &Path) -> usize {
    fs::read_dir(dir).unwrap().count() - 1
}

#[test]
fn the_merged_report_of_parts_is_that_of_one_run() {
    let scene = scene();
    for (suite, more, count) in [
        (
            "structured",
            "--method flap,random --ratio 0.2,0.4 --calib-samples 20",
            6,
        ),
        (
            "lowrank",
            "--compress rtn-int4,wanda-2:4 --method eora,svd --rank 1,2 --calib-samples 20",
            3,
        ),
        ("kv", "--policy h2o,random --budget 0.5,0.75 --samples 4", 5),
        ("perplexity", "--samples 4", 1),
    ] {
        let words = words(&scene, suite, more);
        let folder = scene.path(&format!("{suite}-cells"));
        let dir = folder.to_str().unwrap();
        for part in 1..=3 {
            let output = run(&words, &["--cells", dir, "--shard", &format!("{part}/3")]);
            let stderr = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{suite}: {stderr}");
            assert!(output.stdout.is_empty(), "{suite}");
            assert!(stderr.contains(&format!("part {part}/3")), "{stderr}");
        }
        assert_eq!(cells(&folder), count, "{suite}");
        let merged = numbers(&xtask(&["report", "--merge", dir, "--json"]));
        assert_eq!(merged, numbers(&run(&words, &["--json"])), "{suite}");
    }
}

/// The report that is merged from three parts with a folder, which has `count` cells then, and that of one run.
fn merged_and_whole(words: &[String], folder: &Path, count: usize) -> [Value; 2] {
    let dir = folder.to_str().unwrap();
    let missing = |part: usize| {
        let output = run(words, &["--cells", dir, "--shard", &format!("{part}/3")]);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{words:?}: {stderr}");
        assert!(output.stdout.is_empty(), "{words:?}");
        assert!(stderr.contains(&format!("part {part}/3")), "{stderr}");
        count - cells(folder)
    };
    // A part measures its own cells: every third one.
    let missing = [3, 1, 2].map(missing);
    let of_first = count.div_ceil(3);
    let of_third = count / 3;
    assert_eq!(missing, [count - of_third, count - of_third - of_first, 0]);
    let merged = numbers(&xtask(&["report", "--merge", dir, "--json"]));
    [merged, numbers(&run(words, &["--json"]))]
}

fn split(words: &str) -> Vec<String> {
    words.split_whitespace().map(String::from).collect()
}

#[test]
fn questions_are_divided_by_model_and_file() {
    let scene = Scene::new(json!({
        "model_type": "llama", "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2,
        "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 8, "max_position_embeddings": 64,
    }));
    let path = |name: &str| scene.path(name).display().to_string();
    let pruned = words(&scene, "structured", "--method magnitude --ratio 0.5");
    let pruned = run(&pruned, &["--json", "--save", &path("pruned")]);
    assert_eq!(rows(&pruned).len(), 2);
    let choices: Vec<String> = ["a b", "c", "d e f", "b", "f a"]
        .iter()
        .enumerate()
        .map(|(i, goal)| {
            json!({"goal": goal, "sol1": "c d", "sol2": "e", "label": i % 2}).to_string()
        })
        .collect();
    fs::write(path("choices.jsonl"), choices.join("\n")).unwrap();
    let questions =
        ["a b", "c d e"].map(|q| json!({"question": q, "answer": "c\n#### 3"}).to_string());
    fs::write(path("generated.jsonl"), questions.join("\n")).unwrap();
    let [model, pruned] = ["model", "pruned"].map(path);
    let [choices, generated] = ["choices.jsonl", "generated.jsonl"].map(path);
    let words = split(&format!(
        "eval tasks --max-new-tokens 4 --shots 0 --model {model},{pruned} --data {choices},{generated}"
    ));
    let [merged, whole] = merged_and_whole(&words, &scene.path("cells"), 4);
    assert_eq!(merged["rows"].as_array().unwrap().len(), 4);
    // Beside the first model, which another part asked.
    assert!(merged["rows"][1]["accuracy_dense"].is_number(), "{merged}");
    assert_eq!(merged, whole);
}

#[test]
fn recurrent_networks_are_divided_by_seed() {
    let folder = tempfile::tempdir().unwrap();
    let words = split(
        "eval lattice --task mod2,mod3 --method span,magnitude --sparsity 0.5 --seeds 2 --epochs 2 --finetune-epochs 1 \
         --hidden 8 --examples 200,50,60",
    );
    // Four networks and the pictures of one.
    let [merged, whole] = merged_and_whole(&words, &folder.path().join("cells"), 5);
    assert!(merged["rows"].as_array().unwrap().len() > 10);
    assert_eq!(merged, whole);
}

#[test]
fn what_is_measured_as_one_is_left_to_one_part() {
    let scene = Scene::new(json!({
        "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 8, "max_position_embeddings": 16,
    }));
    let path = |name: &str| scene.path(name).display().to_string();
    for (suite, more) in [
        ("chain", ""),
        (
            "frontier",
            "--compare-samples 8 --coarse-tokens 64 --fine-tokens 128 --rounds 1 --memory 70% --formats gptq-int8-g32,gptq-int4-g32",
        ),
    ] {
        let files = format!("--model {} --text {}", path("model"), path("text.txt"));
        let words = split(&format!(
            "eval {suite} --samples 4 --calib-samples 12 {files} --calib {} {more}",
            path("calib.txt")
        ));
        let [merged, whole] = merged_and_whole(&words, &scene.path(suite), 1);
        assert!(merged["rows"].as_array().unwrap().len() > 2, "{suite}");
        assert_eq!(merged, whole, "{suite}");
    }
}

#[test]
fn the_reports_of_parts_without_a_folder_are_merged_to_that_of_one_run() {
    let scene = scene();
    let words = words(
        &scene,
        "structured",
        "--method flap,random --ratio 0.2,0.4 --calib-samples 20",
    );
    let mut files = Vec::new();
    for part in 1..=3 {
        let out = scene.path(&format!("part-{part}"));
        let shard = format!("{part}/3");
        let output = run(&words, &["--shard", &shard, "--out", out.to_str().unwrap()]);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{stderr}");
        let hint = "`cargo xtask report --merge` with the report.json of every part";
        assert!(stderr.contains(hint), "{stderr}");
        files.push(out.join("report.json").display().to_string());
    }
    let merge =
        |files: &[&str], more: &[&str]| xtask(&[&["report", "--merge"], files, more].concat());
    let all: Vec<&str> = files.iter().map(String::as_str).collect();
    let merged = numbers(&merge(&all, &["--json"]));
    assert_eq!(merged, numbers(&run(&words, &["--json"])));
    let compared = error(&xtask(&["report", all[0], all[1]]));
    assert!(
        compared.contains(all[0]) && compared.contains("--merge"),
        "{compared}"
    );
    // Parts that do not fit are refused with the file to blame.
    let missing = error(&merge(&all[..2], &[]));
    assert!(missing.contains("3/3"), "{missing}");
    let twice = error(&merge(&[all[0], all[1], all[1]], &[]));
    assert!(twice.contains("both are part 2/3"), "{twice}");
    let out = scene.path("other");
    let other = [
        "--shard",
        "3/3",
        "--seed",
        "7",
        "--out",
        out.to_str().unwrap(),
    ];
    assert!(run(&words, &other).status.success());
    let other = out.join("report.json").display().to_string();
    let unfit = error(&merge(&[all[0], all[1], &other], &[]));
    assert!(
        unfit.contains("--seed 7") && unfit.contains(&other),
        "{unfit}"
    );
    let text = fs::read_to_string(all[0]).unwrap();
    let damaged = scene.path("damaged.json");
    fs::write(
        &damaged,
        text.replacen("\"method\":\"calibration", "\"method\":\"calibrated", 1),
    )
    .unwrap();
    let damaged = damaged.display().to_string();
    let refused = error(&merge(&[&damaged, all[1], all[2]], &[]));
    assert!(refused.contains("checksum"), "{refused}");
}

#[test]
fn a_part_with_a_shared_folder_has_a_report_of_its_own_cells() {
    let scene = scene();
    let words = words(&scene, "kv", "--policy h2o,random --budget 0.5 --samples 2");
    let cells = scene.path("cells").display().to_string();
    let parts = ["1/2", "2/2"].map(|part| {
        let out = scene.path(&part.replace('/', "-of-"));
        let folders = ["--cells", &cells, "--out", out.to_str().unwrap()];
        let output = run(
            &words,
            &[&folders[..], &["--shard", part, "--json"]].concat(),
        );
        assert!(output.status.success());
        let file = out.join("report.json");
        assert_eq!(output.stdout, fs::read(&file).unwrap());
        file.display().to_string()
    });
    let merged = numbers(&xtask(&[
        "report", "--json", "--merge", &parts[0], &parts[1],
    ]));
    let shared = numbers(&xtask(&["report", "--json", "--merge", &cells]));
    assert_eq!(merged, shared);
    assert_eq!(merged, numbers(&run(&words, &["--json"])));
}

#[test]
fn cells_of_a_part_of_another_text_are_not_used() {
    let scene = scene();
    let path = |name: &str| scene.path(name).display().to_string();
    let cells = path("cells");
    let part = format!("{}[0..50%]", path("text.txt"));
    let evaluate = |more: &[&str]| {
        let start = ["eval", "perplexity", "--samples", "4", "--json"];
        let own = ["--model", &path("model"), "--cells", &cells];
        xtask(&[&start[..], &own, more].concat())
    };
    rows(&evaluate(&["--text", &part]));
    let text = fs::read_to_string(scene.path("text.txt")).unwrap();
    let turned: String = text.chars().rev().collect();
    fs::write(scene.path("text.txt"), turned).unwrap();
    let refused = error(&evaluate(&["--text", &part]));
    assert!(refused.contains("text.txt"), "{refused}");
}

#[test]
fn the_merged_report_of_parts_of_a_mixture_is_that_of_one_run() {
    let scene = Scene::new(json!({
        "model_type": "mixtral", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 8, "max_position_embeddings": 16,
        "num_local_experts": 6, "num_experts_per_tok": 2,
    }));
    let more = "--method stun,random --quantise rtn-int8 --ratio 0.34 --calib-samples 20";
    let words = words(&scene, "structured", more);
    let folder = scene.path("cells");
    let dir = folder.to_str().unwrap();
    for part in ["2/2", "1/2"] {
        assert!(
            run(&words, &["--cells", dir, "--shard", part])
                .status
                .success()
        );
    }
    assert_eq!(cells(&folder), 4);
    let merged = numbers(&xtask(&["report", "--merge", dir, "--json"]));
    assert_eq!(merged, numbers(&run(&words, &["--json"])));
}

#[test]
fn missing_cells_are_named_by_a_merge_and_measured_by_the_next_run() {
    let scene = scene();
    let words = words(
        &scene,
        "structured",
        "--method flap --ratio 0.2,0.4 --calib-samples 20",
    );
    let folder = scene.path("cells");
    let dir = folder.to_str().unwrap();
    run(&words, &["--cells", dir, "--shard", "2/2"]);
    let message = error(&xtask(&["report", "--merge", dir]));
    assert!(
        message.contains("2 of 4 cells are missing: calibration; flap at ratio 0.2"),
        "{message}"
    );
    let output = run(&words, &["--cells", dir, "--json"]);
    assert_eq!(rows(&output).len(), 3);
    let whole = numbers(&output);
    assert_eq!(whole, numbers(&run(&words, &["--json"])));
    assert_eq!(
        whole,
        numbers(&xtask(&["report", "--merge", dir, "--json"]))
    );
}

#[test]
fn parts_that_do_not_fit_are_refused_with_what_differs() {
    let scene = scene();
    let of = |more: &str| {
        words(
            &scene,
            "structured",
            &format!("--method flap --ratio 0.2 --calib-samples 20{more}"),
        )
    };
    let folder = scene.path("cells");
    let part = ["--cells", folder.to_str().unwrap(), "--shard", "1/2"];
    assert!(run(&of(""), &part).status.success());
    let message = error(&run(&of(" --seed 7"), &part));
    assert!(message.contains("--seed 7"), "{message}");
    fs::write(scene.path("text.txt"), "a b c d e f ".repeat(60)).unwrap();
    let message = error(&run(&of(""), &part));
    assert!(message.contains("text.txt has other contents"), "{message}");
}

#[test]
fn curves_are_measured_once_for_all_parts() {
    let scene = scene();
    let more = "--method rd-dp --ratio 0.2,0.4 --calib-samples 20 --search-samples 4";
    let words = words(&scene, "structured", more);
    let folder = scene.path("cells");
    let dir = folder.to_str().unwrap();
    for part in ["1/2", "2/2"] {
        let output = run(&words, &["--cells", dir, "--shard", part]);
        assert!(output.status.success());
        assert_eq!(fs::read_dir(folder.join("curves")).unwrap().count(), 1);
    }
    let merged = numbers(&xtask(&["report", "--merge", dir, "--json"]));
    assert_eq!(merged, numbers(&run(&words, &["--json"])));
    // A part that finds curves reads them: what was changed in them is noticed.
    let curves = fs::read_dir(folder.join("curves")).unwrap().next();
    let curves = curves.unwrap().unwrap().path();
    let text = fs::read_to_string(&curves).unwrap();
    fs::write(&curves, text.replacen("\"layer\":0", "\"layer\":1", 1)).unwrap();
    for entry in fs::read_dir(&folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        if name.starts_with("rd-dp") {
            fs::remove_file(&path).unwrap();
        }
    }
    let refused = error(&run(&words, &["--cells", dir]));
    assert!(refused.contains("checksum"), "{refused}");
}

#[test]
fn a_part_needs_a_folder() {
    let scene = scene();
    let usage = |output: Output| {
        assert_eq!(output.status.code(), Some(2));
        String::from_utf8(output.stderr).unwrap()
    };
    let words = words(&scene, "perplexity", "--samples 2");
    assert!(usage(run(&words, &["--shard", "1/2"])).contains("--cells"));
    assert!(usage(run(&words, &["--cells", "x", "--shard", "3/2"])).contains("part I of N"));
}

#[test]
fn statistics_that_are_computed_in_parts_are_those_of_one_run_up_to_rounding() {
    let scene = scene();
    let of = |more: &str| {
        words(
            &scene,
            "structured",
            &format!("--ratio 0.2,0.4 --calib-samples 20 {more}"),
        )
    };
    let whole = of("--method flap,rd-dp --compensate least-squares --search-samples 4");
    let folder = scene.path("cells");
    let cells = ["--cells", folder.to_str().unwrap()];
    let part = |index: usize| {
        run(
            &whole,
            &[&cells[..], &["--calib-shard", &format!("{index}/3")]].concat(),
        )
    };
    for index in [3, 1] {
        let output = part(index);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(
            output.status.success() && output.stdout.is_empty(),
            "{stderr}"
        );
        assert!(
            stderr.contains(&format!("part {index}/3 of the statistics")),
            "{stderr}"
        );
    }
    let message = error(&run(&whole, &[&cells[..], &["--shard", "1/2"]].concat()));
    assert!(message.contains("--calib-shard 2/3"), "{message}");
    assert!(part(2).status.success());
    for shard in ["2/2", "1/2"] {
        let output = run(&whole, &[&cells[..], &["--shard", shard]].concat());
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
    let merged = rows(&xtask(&["report", "--merge", cells[1], "--json"]));
    let single = rows(&run(&whole, &["--json"]));
    assert_eq!(merged.len(), 5);
    for (merged, single) in merged.iter().zip(&single) {
        assert_eq!(merged["params"], single["params"]);
        let [a, b] = [merged, single].map(|row| row["perplexity"].as_f64().unwrap());
        assert!((a / b - 1.0).abs() < 1e-4, "{merged}: {b}");
    }
    // What cannot be merged, or computed without a folder.
    let ordered = of("--method flap-compat");
    let other = scene.path("other");
    let message = error(&run(
        &ordered,
        &["--cells", other.to_str().unwrap(), "--calib-shard", "1/2"],
    ));
    assert!(message.contains("order of windows"), "{message}");
    for more in [&[][..], &["--cells", "x", "--json"]] {
        let usage = run(&whole, &[&["--calib-shard", "1/2"], more].concat());
        assert_eq!(usage.status.code(), Some(2));
    }
    let many = run(
        &whole,
        &["--cells", other.to_str().unwrap(), "--calib-shard", "1/100"],
    );
    assert!(!many.status.success());
}

#[test]
fn slurm_scripts_run_the_parts_and_then_the_merge() {
    let scene = scene();
    let out = scene.path("sweep of parts");
    let words = words(
        &scene,
        "structured",
        "--method flap --ratio 0.2 --calib-samples 20",
    );
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let slurm = [
        "slurm",
        "--out",
        out.to_str().unwrap(),
        "--parts",
        "2",
        "--cores",
        "1",
        "--memory",
        "1G",
        "--calib-parts",
        "3",
        "--",
    ];
    let output = xtask(&[&slurm[..], &words].concat());
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let part = fs::read_to_string(out.join("part.sbatch")).unwrap();
    // A path with spaces is one value.
    let log = format!("#SBATCH --output=\"{}/part-%a.log\"", out.display());
    for line in [
        log.as_str(),
        "#SBATCH --array=1-2",
        "#SBATCH --mem=1G",
        "#SBATCH --cpus-per-task=1",
        "#SBATCH --requeue",
    ] {
        assert!(part.lines().any(|found| found == line), "{part}");
    }
    // The scripts as a node runs them.
    for (script, task) in [
        ("calibration.sbatch", "2"),
        ("calibration.sbatch", "3"),
        ("calibration.sbatch", "1"),
        ("part.sbatch", "2"),
        ("part.sbatch", "1"),
        ("merge.sbatch", ""),
    ] {
        let output = Command::new("sh")
            .arg(out.join(script))
            .env("SLURM_ARRAY_TASK_ID", task)
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "{script} {task}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
    assert!(out.join("report/report.html").exists());
    assert!(
        out.join("cells/calibration/2-of-3/calibration.json")
            .exists()
    );
    let submit = fs::read_to_string(out.join("submit.sh")).unwrap();
    let steps: Vec<&str> = submit
        .lines()
        .filter(|line| line.contains("sbatch"))
        .collect();
    assert!(steps[0].starts_with("calibration=$("), "{submit}");
    assert!(steps[1].contains("afterok:$calibration"), "{submit}");
    assert!(steps[2].contains("afterok:$parts"), "{submit}");
}

#[test]
fn slurm_takes_evaluations_of_a_suite_alone() {
    let refused = |words: &[&str]| error(&xtask(&[&["slurm", "--out", "x", "--"], words].concat()));
    assert!(refused(&["report", "a", "b"]).contains("expected `eval SUITE"));
    assert!(refused(&["eval"]).contains("expected `eval SUITE"));
    assert!(refused(&["eval", "kv", "--out", "y"]).contains("--out: the scripts set it"));
    // All suites of a model of one's own are cells as well.
    let out = scene().path("all");
    let out = out.to_str().unwrap();
    let all = xtask(&["slurm", "--out", out, "--", "eval", "--model", "m"]);
    assert!(all.status.success());
    let calibrated = xtask(&[
        "slurm",
        "--out",
        "x",
        "--calib-parts",
        "2",
        "--",
        "eval",
        "kv",
    ]);
    assert!(error(&calibrated).contains("eval structured"));
}

#[test]
fn slurm_writes_what_every_job_can_parse() {
    let scene = scene();
    let out = scene.path("jobs here");
    let out = out.to_str().unwrap();
    let slurm = |before: &[&str], words: &str| {
        let words: Vec<&str> = words.split(' ').collect();
        xtask(&[&["slurm", "--out", out], before, &["--"], &words].concat())
    };
    let usage = |before: &[&str], words: &str, names: &str| {
        let output = slurm(before, words);
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{words}: {stderr}");
        assert!(stderr.contains(names), "{words}: {stderr}");
    };
    let good = "eval --window 16 structured --model m --ratio 0.2";
    usage(&[], "eval structured --ratio 0.2", "--model");
    usage(
        &[],
        "eval structured --model m --ratio 0.2 --rank 2",
        "--rank",
    );
    usage(&[], "eval lattice --device cuda", "--device");
    usage(&["--time", "1\n#SBATCH --x"], good, "--time");
    usage(&["--partition", "a\nb"], good, "--partition");
    usage(&["--parts", "65537"], good, "at most 65536");
    let json = error(&slurm(&[], &format!("{good} --json")));
    assert!(json.contains("--json"), "{json}");
    assert!(!Path::new(out).exists());
    let threads = format!("{good} --threads 3");
    let before = ["--cores", "2", "--calib-parts", "2", "--partition", "a b"];
    let output = slurm(&before, &threads);
    let stdout = String::from_utf8(output.stdout).unwrap();
    assert_eq!(stdout, format!("submit with: sh '{out}/submit.sh'\n"));
    for script in ["part", "calibration"] {
        let text = fs::read_to_string(format!("{out}/{script}.sbatch")).unwrap();
        assert_eq!(text.matches("--threads").count(), 1, "{text}");
        assert!(text.contains("#SBATCH --partition=\"a b\"\n"), "{text}");
    }
    assert!(slurm(&before, good).status.success());
    let part = fs::read_to_string(format!("{out}/part.sbatch")).unwrap();
    assert!(part.contains("--threads 2 --cells"), "{part}");
}
