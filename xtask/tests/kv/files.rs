//! Configurations of caches and statistics of queries in files.

use crate::scene::{Scene, error};
use crate::{asked, kv, model, number, on_scene};
use serde_json::{Value, json};
use std::process::Command;

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
    let alone = asked(&on_scene(&scene, &cache));
    assert_eq!(alone.len(), 2, "the full cache and the file");
    assert_eq!(alone[1]["method"], "per-head.json");
    assert_eq!(
        (&alone[1]["budget"], &alone[1]["evicts"]),
        (&json!(24), &json!("while decoding"))
    );
    assert!(number(&alone[1], "nll") != number(&alone[0], "nll"));
    let both = asked(&on_scene(
        &scene,
        &[&cache[..], &["--policy", "knorm", "--budget", "16,32"]].concat(),
    ));
    assert_eq!(both.len(), 4);
    let task = |more: &[&str]| asked(&kv(&[more, &cache].concat()));
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
        let run = |more: &[&str]| asked(&on_scene(&scene, &[&flags[..], task, more].concat()));
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
    let measured = asked(&run(&[&calib[..], &["--save-statistics", file]].concat()));
    let again = asked(&run(&["--statistics", file]));
    assert_eq!(measured[1]["nll"], again[1]["nll"]);
    assert_ne!(measured[1]["nll"], asked(&run(&[]))[1]["nll"]);
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
