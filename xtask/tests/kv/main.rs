//! `eval kv` as its users run it: on a model made for the test, and on a trained one where it lies beside the project.

mod files;
mod long_context;
mod perplexity;
#[path = "../common/scene.rs"]
mod scene;
mod traces;

use scene::{Scene, error};
use serde_json::{Value, json};
use std::path::Path;
use std::process::{Command, Output};

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

/// The rows of what was asked for: without the full caches in integers, which are measured beside.
fn asked(output: &Output) -> Vec<Value> {
    let mut rows = scene::rows(output);
    rows.retain(|row| {
        !row["method"]
            .as_str()
            .is_some_and(|m| m.starts_with("full+"))
    });
    rows
}

#[test]
fn flags_that_a_task_would_not_heed_are_refused_by_name() {
    let scene = model();
    let (dir, text) = (scene.path("model"), scene.path("text.txt"));
    let (dir, text) = (dir.to_str().unwrap(), text.to_str().unwrap());
    let speed = ["--task", "speed", "--model", dir, "--window", "64"];
    let perplexity = ["--model", dir, "--text", text];
    let traces = ["--task", "trace", "--trace"];
    let recall = ["--task", "recall"];
    for (task, more, flag) in [
        (&speed[..], &["--text", text][..], "--text"),
        (&speed, &["--protocol", "gptq"], "--protocol"),
        (&speed, &["--seeds", "2"], "--seeds"),
        (&speed, &["--samples", "2"], "--samples"),
        (&speed, &["--prompt-rule", "keep"], "--prompt-rule"),
        (&speed, &["--prompt", "18446744073709551615"], "--prompt"),
        (&perplexity, &["--train-steps", "3"], "--train-steps"),
        (&perplexity, &["--feed", "whole"], "--feed"),
        (&perplexity, &["--context", "64"], "--context"),
        (
            &perplexity,
            &["--policy", "tova,tova"],
            "tova is given twice",
        ),
        (&perplexity, &["--budget", "0.5,0.5"], "0.5 is given twice"),
        (
            &perplexity,
            &["--policy", "tri-attention", "--calib", text],
            "--calib",
        ),
        (&traces, &["plantd"], "'planted'"),
        (&traces, &["drift", "--samples", "2"], "--samples"),
        (
            &traces,
            &["drift", "--window", "18446744073709551615"],
            "--window",
        ),
        (&recall, &["--no-bos"], "--no-bos"),
        (
            &recall,
            &["--model", dir, "--train-steps", "3"],
            "--train-steps",
        ),
        (&recall, &["--prompt", "18446744073709551615"], "--prompt"),
        (&recall, &["--window", "100000"], "--window"),
    ] {
        let output = kv(&[task, more].concat());
        assert!(!output.status.success(), "{task:?} {more:?}");
        let says = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(says.contains(flag), "{task:?} {more:?}: {says}");
    }
}

#[test]
fn one_model_that_fails_leaves_the_rows_of_the_others() {
    let scene = model();
    let text = scene.path("text.txt");
    let models = format!("{},nowhere", scene.path("model").display());
    let dir = scene.path("out");
    let flags = ["--policy", "knorm", "--budget", "24", "--samples", "2"];
    let output = kv(&[
        &["--model", &models, "--text", text.to_str().unwrap()][..],
        &["--out", dir.to_str().unwrap()],
        &flags,
    ]
    .concat());
    assert!(error(&output).contains("nowhere"));
    let report = std::fs::read_to_string(dir.join("report.json")).unwrap();
    assert!(report.contains("knorm"), "{report}");
}

fn number(row: &Value, field: &str) -> f64 {
    row[field]
        .as_f64()
        .unwrap_or_else(|| panic!("{field} of {row}"))
}
