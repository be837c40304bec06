//! `eval kv` as its users run it: on a model made for the test, and on a trained one where it lies beside the project.

#[path = "common/scene.rs"]
mod scene;

use std::path::Path;
use std::process::{Command, Output};

use scene::{Scene, error, rows};
use serde_json::{Value, json};

fn model() -> Scene {
    Scene::new(json!({
        "model_type": "llama", "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 8, "max_position_embeddings": 64,
    }))
}

fn kv(more: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_xtask"))
        .args(["eval", "kv", "--json"])
        .args(more)
        .output()
        .unwrap()
}

/// `eval kv` on a model and a text.
fn on(model: &Path, text: &Path, more: &[&str]) -> Output {
    let paths = [
        "--model",
        model.to_str().unwrap(),
        "--text",
        text.to_str().unwrap(),
    ];
    kv(&[&paths, more].concat())
}

fn on_scene(scene: &Scene, more: &[&str]) -> Output {
    let samples = ["--samples", "5"];
    on(
        &scene.path("model"),
        &scene.path("text.txt"),
        &[&samples, more].concat(),
    )
}

fn number(row: &Value, field: &str) -> f64 {
    row[field]
        .as_f64()
        .unwrap_or_else(|| panic!("{field} of {row}"))
}

fn plain_nll(model: &Path, text: &Path, more: &[&str]) -> f64 {
    let output = Command::new(env!("CARGO_BIN_EXE_xtask"))
        .args(["eval", "perplexity", "--json", "--model"])
        .arg(model)
        .arg("--text")
        .arg(text)
        .args(more)
        .output()
        .unwrap();
    number(&rows(&output)[0], "nll")
}

#[test]
fn the_full_cache_has_the_perplexity_of_whole_windows() {
    let scene = model();
    let rows = rows(&on_scene(
        &scene,
        &["--policy", "full", "--budget", "1.0", "--prompt", "1"],
    ));
    assert_eq!(rows.len(), 1);
    assert_eq!(
        (&rows[0]["method"], &rows[0]["role"]),
        (&json!("full"), &json!("reference"))
    );
    let whole = plain_nll(
        &scene.path("model"),
        &scene.path("text.txt"),
        &["--samples", "5"],
    );
    let found = number(&rows[0], "nll");
    assert!((found - whole).abs() < 1e-5, "{found} {whole}");
}

#[test]
fn every_policy_has_a_row_at_every_budget_and_a_budget_of_the_window_costs_nothing() {
    let rows = rows(&on_scene(&model(), &["--budget", "24,1.0"]));
    let policies = [
        "streaming",
        "h2o",
        "tova",
        "scissorhands",
        "raas",
        "snapkv",
        "r-kv",
        "random",
        "knorm",
        "keydiff",
        "tri-attention",
        "lagkv",
        "dropkv",
        "vase-attnv",
        "vase-dkv",
        "lazy",
        "lazy-reference",
        "lazy-guarded",
        "lagged-h2o",
        "lagged-raas",
        "lagged-random",
        "lagged-snapkv",
    ];
    for policy in policies {
        let own: Vec<&Value> = rows.iter().filter(|row| row["method"] == policy).collect();
        assert_eq!(own.len(), 2, "{policy}");
        assert_eq!(own[0]["budget"], 24);
        assert_eq!(own[1]["perplexity"], rows[0]["perplexity"], "{policy}");
        for row in own {
            assert_eq!(row["perplexity_dense"], rows[0]["perplexity"]);
            assert!(
                row["kv_bytes"].as_u64() <= row["kv_bytes_full"].as_u64(),
                "{policy}"
            );
            let fields = [
                "state_bytes",
                "tokens_per_second",
                "tokens_per_second_dense",
                "tokens_held",
            ];
            assert!(fields.iter().all(|field| row[field].is_number()), "{row}");
        }
    }
    let random = rows.iter().find(|row| row["method"] == "random").unwrap();
    assert_eq!(
        (&random["role"], &random["spread"]["perplexity"]["runs"]),
        (&json!("control"), &json!(3))
    );
    let h2o = rows.iter().find(|row| row["method"] == "h2o").unwrap();
    assert!(number(h2o, "kv_bytes") < 0.6 * number(h2o, "kv_bytes_full"));
}

#[test]
fn every_policy_runs_in_every_storage_and_the_first_full_cache_is_the_reference() {
    let scene = model();
    let run = |more: &[&str]| {
        let flags = ["--policy", "knorm,snapkv", "--budget", "40"];
        rows(&on_scene(&scene, &[&flags, more].concat()))
    };
    let all = run(&["--kv-dtype", "f16,int8,k8v4,int4"]);
    let methods: Vec<&str> = all
        .iter()
        .map(|row| row["method"].as_str().unwrap())
        .collect();
    let of = |method: &str| {
        let at = methods.iter().position(|name| *name == method);
        &all[at.unwrap_or_else(|| panic!("{method} of {methods:?}"))]
    };
    assert_eq!(methods[0], "full");
    assert_eq!(methods.len(), 4 + 4 * 2);
    for storage in ["int8", "k8v4", "int4"] {
        assert!(of(&format!("full+{storage}"))["budget"].is_null());
        let packed = of(&format!("knorm+{storage}"));
        assert!(packed["kv_bytes"].as_u64() <= of("full")["kv_bytes"].as_u64());
        assert_eq!(packed["kv_bytes_full"], of("full")["kv_bytes"]);
        assert_eq!(packed["evicts"], "while decoding");
    }
    assert_eq!(of("snapkv")["evicts"], "after the prompt");
    let exact = run(&["--kv-dtype", "f32"]);
    let gap = number(&exact[0], "nll") - number(&all[0], "nll");
    assert!(gap.abs() < 1e-3 && number(&exact[0], "kv_bytes") > number(&all[0], "kv_bytes"));
}

#[test]
fn traces_are_replayed_in_every_storage() {
    let flags = [
        "--task", "trace", "--trace", "planted", "--window", "192", "--seeds", "1",
    ];
    let more = [
        "--policy",
        "keydiff",
        "--budget",
        "96",
        "--kv-dtype",
        "f32,int8,int4",
    ];
    let rows = rows(&kv(&[&flags[..], &more].concat()));
    let of = |method: &str| rows.iter().find(|row| row["method"] == method).unwrap();
    let error = |method: &str| number(of(method), "output_error");
    assert_eq!(rows.len(), 3 + 3);
    assert!(error("full") < 1e-5 && error("full") < error("full+int8"));
    assert!(error("full+int8") < error("full+int4") / 4.0, "{rows:?}");
    assert!(error("full+int4") < error("keydiff+int4"));
    for row in &rows {
        assert_eq!(row["kv_bytes_full"], of("full")["kv_bytes"]);
    }
    assert!(number(of("full+int8"), "kv_bytes") < 0.6 * number(of("full"), "kv_bytes"));
    assert_eq!(
        number(of("full+int4"), "retained_mass"),
        number(of("full"), "retained_mass")
    );
}

#[test]
fn a_configuration_in_a_file_is_a_row_of_its_own_in_every_task() {
    let scene = model();
    let file = scene.path("per-head.json");
    let config = json!({
        "decode": {"policy": "dropkv", "window": 4, "every": 4}, "budget": {"tokens": 24}, "shared-budget": 0.2,
        "storage": {"keys": "int8", "values": "int8"}, "prompt": "evictable",
    });
    std::fs::write(&file, config.to_string()).unwrap();
    let cache = ["--cache", file.to_str().unwrap()];
    let alone = rows(&on_scene(&scene, &cache));
    assert_eq!(alone.len(), 2, "the full cache and the file");
    assert_eq!(alone[1]["method"], "per-head.json");
    assert_eq!(
        (&alone[1]["budget"], &alone[1]["evicts"]),
        (&json!(24), &json!("while decoding"))
    );
    assert!(number(&alone[1], "nll") != number(&alone[0], "nll"));
    let both = rows(&on_scene(
        &scene,
        &[&cache[..], &["--policy", "knorm", "--budget", "16,32"]].concat(),
    ));
    assert_eq!(both.len(), 4);
    let task = |more: &[&str]| rows(&kv(&[more, &cache].concat()));
    let own = |rows: &[Value]| {
        rows.iter()
            .filter(|row| row["method"] == "per-head.json")
            .count()
    };
    let (dir, text) = (scene.path("model"), scene.path("text.txt"));
    let traces = [
        "--task",
        "trace",
        "--model",
        dir.to_str().unwrap(),
        "--text",
        text.to_str().unwrap(),
        "--samples",
        "1",
    ];
    assert_eq!(own(&task(&traces)), 1);
    let model = concat!(env!("CARGO_MANIFEST_DIR"), "/model");
    let long = [
        "--task",
        "long-context",
        "--model",
        model,
        "--questions",
        "copy",
        "--context",
        "400",
        "--samples",
        "1",
        "--seeds",
        "1",
    ];
    assert_eq!(own(&task(&long)), 1);
    std::fs::write(&file, "{\"decode\": 3}").unwrap();
    let output = on_scene(&scene, &cache);
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("per-head.json"));
}

#[test]
fn statistics_of_a_text_are_taken_in_every_task_that_runs_the_model() {
    let scene = model();
    let short = scene.path("short.txt");
    std::fs::write(&short, "a b c d").unwrap();
    let flags = ["--policy", "tri-attention", "--budget", "24"];
    let refused = error(&on_scene(
        &scene,
        &[&flags[..], &["--calib", short.to_str().unwrap()]].concat(),
    ));
    assert!(
        refused.contains("short.txt") && refused.contains("512"),
        "{refused}"
    );
    let recall = kv(&["--task", "recall", "--calib", "text.txt"]);
    assert!(String::from_utf8_lossy(&recall.stderr).contains("--calib"));
    let text = scene.path("calib.txt");
    for (task, field) in [
        (&[][..], "nll"),
        (&["--task", "trace"], "output_error"),
        (&["--task", "trace", "--kv-dtype", "int8"], "output_error"),
    ] {
        let run = |more: &[&str]| rows(&on_scene(&scene, &[&flags[..], task, more].concat()));
        let own = run(&[]);
        let of_text = run(&["--calib", text.to_str().unwrap()]);
        assert_eq!(own[0][field], of_text[0][field]);
        assert_ne!(own[1][field], of_text[1][field]);
        assert!(number(&own[1], "state_bytes") > 0.0);
        // Nothing is gathered while decoding.
        assert_eq!(number(&of_text[1], "state_bytes"), 0.0);
    }
}

#[test]
fn statistics_are_saved_and_serve_again_for_the_same_model_alone() {
    let scene = model();
    let file = scene.path("statistics.safetensors");
    let (file, text) = (file.to_str().unwrap(), scene.path("calib.txt"));
    let flags = ["--policy", "tri-attention", "--budget", "24"];
    let run = |more: &[&str]| on_scene(&scene, &[&flags[..], more].concat());
    let calib = ["--calib", text.to_str().unwrap()];
    let measured = rows(&run(&[&calib[..], &["--save-statistics", file]].concat()));
    let again = rows(&run(&["--statistics", file]));
    assert_eq!(measured[1]["nll"], again[1]["nll"]);
    assert_ne!(measured[1]["nll"], rows(&run(&[]))[1]["nll"]);
    let generated = |policy: &str| {
        let model = scene.path("model");
        let mut command = Command::new(env!("CARGO_BIN_EXE_xtask"));
        let flags = [
            "generate",
            "--raw",
            "--prompt",
            "a b c",
            "--max-new-tokens",
            "4",
        ];
        let flags = command
            .args(flags)
            .args(["--policy", policy, "--statistics", file]);
        flags.arg("--model").arg(model).output().unwrap()
    };
    let output = generated("tri-attention");
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(error(&generated("h2o")).contains("--statistics"));
    let other = Scene::new(json!({
        "model_type": "llama", "hidden_size": 32, "intermediate_size": 60, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 8, "max_position_embeddings": 64,
    }));
    let refused = error(&on_scene(
        &other,
        &[&flags[..], &["--statistics", file]].concat(),
    ));
    assert!(
        refused.contains("--statistics") && refused.contains("another model"),
        "{refused}"
    );
}

#[test]
fn long_contexts_are_cells_that_can_be_shared_and_saved() {
    let scene = tempfile::tempdir().unwrap();
    let (cells, save) = (scene.path().join("cells"), scene.path().join("texts"));
    let model = concat!(env!("CARGO_MANIFEST_DIR"), "/model");
    let flags = [
        "--task",
        "long-context",
        "--model",
        model,
        "--questions",
        "copy,gather",
        "--context",
        "400",
        "--samples",
        "2",
        "--seeds",
        "1",
        "--policy",
        "keydiff",
        "--budget",
        "0.5",
    ];
    let whole = rows(&kv(
        &[&flags[..], &["--save", save.to_str().unwrap()]].concat()
    ));
    let controls = ["full+int8", "full+k8v4", "full+int4"];
    assert!(
        controls
            .iter()
            .all(|name| whole.iter().any(|row| row["method"] == *name))
    );
    let saved = std::fs::read_to_string(save.join("gather-400.jsonl")).unwrap();
    let lines: Vec<Value> = saved
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(lines.len(), 2);
    assert_eq!(
        lines[0]["questions"][0]["others"][0]
            .as_array()
            .unwrap()
            .len(),
        2
    );
    let folder = ["--cells", cells.to_str().unwrap()];
    for part in ["1/3", "2/3", "3/3"] {
        let output = kv(&[&flags[..], &folder, &["--shard", part]].concat());
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
    let count = std::fs::read_dir(&cells).unwrap().count();
    assert_eq!(
        count,
        4 + 1,
        "a cell for each context of each question, and run.json"
    );
    let again = rows(&kv(&[&flags[..], &folder].concat()));
    assert_eq!(again.len(), whole.len());
    for (whole, again) in whole.iter().zip(&again) {
        for field in [
            "method",
            "accuracy",
            "choice",
            "nll",
            "recovery_low",
            "bytes_over_full",
        ] {
            assert_eq!(whole[field], again[field], "{field}");
        }
    }
    let short = kv(&[&flags[..7], &["100,400"], &flags[8..]].concat());
    let short = error(&short);
    assert!(
        short.contains("--context 100") && short.contains("too short"),
        "{short}"
    );
}

#[test]
fn budgets_of_bytes_give_each_policy_the_tokens_that_fit() {
    let scene = model();
    let flags = [
        "--policy",
        "knorm,h2o",
        "--budget",
        "0.5",
        "--budget-of",
        "bytes",
        "--kv-dtype",
        "f16,int4",
    ];
    let rows = rows(&on_scene(&scene, &flags));
    let held = |method: &str| {
        let row = rows.iter().find(|row| row["method"] == method).unwrap();
        number(row, "tokens_held")
    };
    // State takes room. In so short a window nothing has been quantised yet.
    assert!(
        held("h2o") < held("knorm"),
        "{} {}",
        held("h2o"),
        held("knorm")
    );
    assert_eq!(held("knorm"), held("knorm+int4"));
}

#[test]
fn flags_that_long_contexts_do_not_read_are_refused_by_name() {
    let run = |more: &[&str]| {
        let model = ["eval", "kv", "--task", "long-context", "--model", "nowhere"];
        let mut command = Command::new(env!("CARGO_BIN_EXE_xtask"));
        let output = command.args(model).args(more).output().unwrap();
        assert!(!output.status.success());
        String::from_utf8(output.stderr).unwrap()
    };
    for (more, says) in [
        (&["--text", "text.txt"][..], "--text"),
        (&["--prompt", "4"], "--prompt"),
        (&["--no-bos"], "--no-bos"),
        (&["--window", "64"], "--window"),
        (&["--trace", "drift"], "--trace"),
        (
            &["--policy", "keydiff", "--calib", "calib.txt"],
            "--calib calib.txt: none of the policies",
        ),
    ] {
        let refused = run(more);
        assert!(refused.contains(says), "{refused}");
    }
}

#[test]
fn questions_about_long_contexts_have_rows_for_policies_and_storage() {
    let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/model");
    let flags = [
        "--task",
        "long-context",
        "--model",
        dir,
        "--questions",
        "copy,gather",
        "--context",
        "400",
        "--samples",
        "2",
        "--seeds",
        "1",
        "--policy",
        "keydiff,random",
        "--budget",
        "0.5",
        "--kv-dtype",
        "f16,int8",
        "--budget-of",
        "bytes",
    ];
    for feed in ["whole", "steps"] {
        let all = rows(&kv(&[&flags[..], &["--feed", feed]].concat()));
        let of = |method: &str| -> Vec<&Value> {
            all.iter().filter(|row| row["method"] == method).collect()
        };
        for method in [
            "first token",
            "full",
            "full+int8",
            "keydiff",
            "keydiff+int8",
            "random",
            "random+int8",
        ] {
            assert!(of(method).len() >= 2, "{method} {feed}");
        }
        let detailed = |method: &str| {
            of(method)
                .into_iter()
                .find(|row| row["nll"].is_number())
                .unwrap()
        };
        let (full, int8, half) = (detailed("full"), detailed("full+int8"), detailed("keydiff"));
        assert!((number(full, "recovery") - 1.0).abs() < 1e-9, "{full}");
        assert!(
            (number(full, "nll") - number(int8, "nll")).abs() < 0.05,
            "{full} {int8}"
        );
        assert!(number(int8, "bytes_over_full") < 0.75, "{int8}");
        assert!(number(half, "bytes_over_full") < 0.65, "{half}");
        assert!(number(half, "recovery_low") <= number(half, "recovery"));
        assert!(half["over_random_low"].is_number());
        assert!(half["peak_over_full"].is_number());
        let summary = of("keydiff").into_iter().find(|row| row["nll"].is_null());
        assert!(summary.is_none_or(|row| row["over_random_low"].is_number()));
    }
    let elsewhere = kv(&["--task", "trace", "--context", "400"]);
    assert!(String::from_utf8_lossy(&elsewhere.stderr).contains("--context"));
}

#[test]
fn results_do_not_depend_on_how_windows_are_batched() {
    let scene = model();
    let flags = [
        "--policy",
        "random,h2o,lazy,r-kv",
        "--budget",
        "20",
        "--batch",
    ];
    let run = |batch: &'static str| rows(&on_scene(&scene, &[&flags[..], &[batch]].concat()));
    for (one, three) in run("1").iter().zip(run("3")) {
        let gap = number(one, "nll") - number(&three, "nll");
        assert!(gap.abs() < 1e-5, "{} {gap}", one["method"]);
        assert_eq!(one["kv_bytes"], three["kv_bytes"]);
        assert_eq!(one["state_bytes"], three["state_bytes"]);
    }
}

#[test]
fn bad_input_is_one_line_that_names_it() {
    let scene = model();
    let with = |more: &[&str]| error(&on_scene(&scene, more));
    let small = with(&["--policy", "h2o,streaming", "--budget", "32,4"]);
    assert!(
        small.contains("--policy streaming --budget 4") && small.contains("sinks 4"),
        "{small}"
    );
    assert!(with(&["--policy", "oracle"]).contains("--policy oracle"));
    assert!(with(&["--prompt", "64"]).contains("--prompt 64"));
    assert!(with(&["--window", "65"]).contains("--window 65"));
    let other = scene.path("model");
    let other = error(&kv(&[
        "--task",
        "recall",
        "--model",
        other.to_str().unwrap(),
    ]));
    assert!(
        other.contains("--model") && other.contains("recall"),
        "{other}"
    );
    assert!(error(&kv(&["--task", "trace", "--trace", "nowhere"])).contains("nowhere"));
    assert!(error(&kv(&["--task", "trace", "--window", "20"])).contains("--window 20"));
    assert!(error(&kv(&["--task", "recall", "--prompt", "120"])).contains("--prompt 120"));
    for usage in [
        &["--budget", "1.5"][..],
        &["--budget", "0"],
        &["--policy", "lru"],
        &["--policy", "h2o"],
        &["--task", "recall", "--trace", "drift"],
        &["--task", "trace", "--save", "x"],
    ] {
        let output = kv(usage);
        assert_eq!(output.status.code(), Some(2), "{usage:?}");
        assert!(output.stdout.is_empty());
    }
}

#[test]
fn on_traces_no_policy_keeps_more_than_the_oracle() {
    let flags = [
        "--task", "trace", "--window", "192", "--seeds", "2", "--budget", "48", "--policy",
    ];
    let rows = rows(&kv(&[
        &flags[..],
        &["h2o,tova,raas,random,lazy,lagged-random,oracle"],
    ]
    .concat()));
    assert_eq!(rows.len(), 3 * 8);
    for row in &rows {
        assert!(
            row["mri_above_1"].is_number() && row["mri_p80"].is_number(),
            "{row}"
        );
        assert!((0.0..=1.0 + 1e-6).contains(&number(row, "retained_mass")));
        if row["method"] == "full" {
            assert!(number(row, "output_error") < 1e-5 && number(row, "regret") == 0.0);
        } else if row["method"] != "oracle" {
            assert!(number(row, "oracle_gap") > -1e-3, "{row}");
            let lost = 1.0 - number(row, "retained_mass");
            assert!((lost - number(row, "regret")).abs() < 1e-3, "{row}");
        }
    }
}

#[test]
fn a_saved_trace_replays_as_the_recorded_one() {
    let scene = model();
    let save = scene.path("traces");
    let flags = ["--task", "trace", "--policy", "h2o,lazy", "--budget", "20"];
    let more = ["--samples", "1", "--save", save.to_str().unwrap()];
    let (model, text) = (scene.path("model"), scene.path("text.txt"));
    let recorded = rows(&on(&model, &text, &[&flags[..], &more].concat()));
    let file = save.join("trace-0.safetensors");
    let stored = rows(&kv(
        &[&flags[..], &["--trace", file.to_str().unwrap()]].concat()
    ));
    assert_eq!((recorded.len(), stored.len()), (3, 3));
    for (recorded, stored) in recorded.iter().zip(&stored) {
        for field in [
            "retained_mass",
            "recall_at_k",
            "output_error",
            "kv_bytes",
            "mri_above_1",
        ] {
            assert_eq!(recorded[field], stored[field], "{field}");
        }
    }
}

#[test]
fn a_model_trained_to_recall_is_saved_and_answers_again_as_before() {
    let scene = tempfile::tempdir().unwrap();
    let save = scene.path().join("model");
    let save = save.to_str().unwrap();
    let flags = [
        "--task",
        "recall",
        "--policy",
        "streaming,random,h2o",
        "--budget",
        "0.25,0.5",
        "--samples",
        "12",
        "--seeds",
        "2",
    ];
    let trained = rows(&kv(
        &[&flags[..], &["--save", save, "--train-steps", "80"]].concat()
    ));
    let again = rows(&kv(&[&flags[..], &["--model", save]].concat()));
    assert_eq!((trained.len(), again.len()), (4 * 7 + 3, 4 * 7 + 3));
    for (trained, again) in trained.iter().zip(&again) {
        for field in [
            "method",
            "task",
            "accuracy",
            "accuracy_low",
            "accuracy_high",
            "kv_bytes",
            "area_mqar",
        ] {
            assert_eq!(trained[field], again[field], "{field}");
        }
    }
    for row in trained.iter().filter(|row| row["method"] == "full") {
        assert!(number(row, "accuracy") > 0.9, "{row}");
    }
    let streaming = trained
        .iter()
        .filter(|row| row["method"] == "streaming" && row["budget"] == 0.25);
    for row in streaming.filter(|row| row["task"].is_string()) {
        assert!(
            number(row, "accuracy") < 0.8 * number(row, "accuracy_dense"),
            "{row}"
        );
    }
    assert!(error(&kv(&["--task", "recall", "--save", save])).contains("--save"));
}

#[shared_data::needed("models/stories260K", "data/text")]
#[test]
fn a_trained_model_has_its_known_perplexity_and_loses_under_eviction() {
    let model = Path::new(shared_data::path!("models/stories260K"));
    let text = Path::new(shared_data::path!("data/text/tinystories_valid_30KB.txt"));
    let flags = [
        "--window",
        "256",
        "--prompt",
        "1",
        "--policy",
        "streaming",
        "--budget",
        "32",
    ];
    let rows = rows(&on(model, text, &flags));
    let (full, streaming) = (
        number(&rows[0], "perplexity"),
        number(&rows[1], "perplexity"),
    );
    assert!((full / 6.316452 - 1.0).abs() < 1e-5, "{full}");
    assert!(streaming > 1.02 * full, "{streaming}");
}
