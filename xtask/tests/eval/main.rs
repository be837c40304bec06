//! The suites as their users run them: on a model made for the test, and on trained models where they lie beside the
//! project.

mod mixtures;
mod perplexity;
mod refused;
#[path = "../common/scene.rs"]
mod scene;
mod structured;

use scene::Scene;
use serde_json::{Value, json};
use std::path::Path;
use std::process::{Command, Output};

fn llama() -> Scene {
    Scene::new(json!({
        "model_type": "llama", "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2,
        "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 8, "max_position_embeddings": 16,
    }))
}

fn mixtral() -> Scene {
    Scene::new(json!({
        "model_type": "mixtral", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 8, "max_position_embeddings": 16,
        "num_local_experts": 6, "num_experts_per_tok": 2,
    }))
}

/// The methods of rows, in their order.
fn methods(rows: &[Value]) -> Vec<&str> {
    let methods = rows.iter().map(|row| row["method"].as_str().unwrap());
    methods.collect()
}

/// Runs `eval structured` on the scene with more arguments.
fn structured(scene: &Scene, more: &[&str]) -> Output {
    let (model, text, calib) = (
        scene.path("model"),
        scene.path("text.txt"),
        scene.path("calib.txt"),
    );
    let args = ["eval", "structured", "--calib-samples", "20", "--json"];
    Command::new(env!("CARGO_BIN_EXE_xtask"))
        .args(args)
        .args([
            "--model".as_ref(),
            model.as_os_str(),
            "--text".as_ref(),
            text.as_os_str(),
        ])
        .args(["--calib".as_ref(), calib.as_os_str()])
        .args(more)
        .output()
        .unwrap()
}

/// All bytes of a checkpoint folder's weights.
fn weights(dir: &Path) -> Vec<u8> {
    std::fs::read(dir.join("model.safetensors")).unwrap()
}
