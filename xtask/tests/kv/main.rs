//! `eval kv` as its users run it: on a model made for the test, and on a trained one where it lies beside the project.

mod files;
mod long_context;
mod perplexity;
#[path = "../common/scene.rs"]
mod scene;
mod traces;

use scene::Scene;
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

fn number(row: &Value, field: &str) -> f64 {
    row[field]
        .as_f64()
        .unwrap_or_else(|| panic!("{field} of {row}"))
}
