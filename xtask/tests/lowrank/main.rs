//! `eval lowrank` as its users run it: on a model made for the test, and on a trained one where it lies beside the project.

mod experts;
mod given;
mod refused;
mod rows;
#[path = "../common/scene.rs"]
mod scene;

use scene::Scene;
use serde_json::{Value, json};
use std::path::Path;
use std::process::{Command, Output};

fn llama() -> Scene {
    Scene::new(json!({
        "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 8, "max_position_embeddings": 16,
    }))
}

/// The perplexity of a folder on the scene's text.
fn eval_model(scene: &Scene, model: &Path, more: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_xtask"))
        .args(["eval", "perplexity", "--json"])
        .args(["--model".as_ref(), model.as_os_str()])
        .args(["--text".as_ref(), scene.path("text.txt").as_os_str()])
        .args(more)
        .output()
        .unwrap()
}

/// Runs a suite on the scene with more arguments.
fn eval(scene: &Scene, suite: &str, more: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_xtask"))
        .args(["eval", suite, "--json"])
        .args(["--model".as_ref(), scene.path("model").as_os_str()])
        .args(["--text".as_ref(), scene.path("text.txt").as_os_str()])
        .args(more)
        .output()
        .unwrap()
}

fn lowrank(scene: &Scene, more: &[&str]) -> Output {
    let calib = scene.path("calib.txt");
    let own = [
        "--calib",
        calib.to_str().unwrap(),
        "--calib-samples",
        "20",
        "--held-out-samples",
        "8",
    ];
    eval(scene, "lowrank", &[&own, more].concat())
}

fn number(row: &Value, field: &str) -> f64 {
    row[field]
        .as_f64()
        .unwrap_or_else(|| panic!("{field} in {row}"))
}

/// A scene whose MLP is 172 wide, which is no multiple of 8 codes of 4 bits in a word.
fn odd_width() -> Scene {
    Scene::new(json!({
        "model_type": "llama", "hidden_size": 32, "intermediate_size": 172, "num_hidden_layers": 1,
        "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 8, "max_position_embeddings": 16,
    }))
}
