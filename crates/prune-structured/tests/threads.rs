//! Plans and weights do not depend on the number of threads, at widths where products and factorisations are divided
//! among them.

use candle_core::{DType, Device};
use causal_lm::{Decoder, Windows, synthetic};
use prune_structured::{Calibration, Collect, NoProgress, Plan, Recipe, Settings, write};
use serde_json::json;
use std::path::Path;
use tensor_io::{Checkpoint, Config, WriteOptions};

/// Calibrates, plans by optimal brain surgeon with rate-distortion widths, refits by least squares and writes.
fn pruned(checkpoint: &Checkpoint, dir: &Path, threads: usize) -> (String, String) {
    let dst = dir.join(format!("pruned-{threads}"));
    let grams = dir.join(format!("gram-{threads}"));
    std::fs::create_dir(&grams).unwrap();
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
    let run = || {
        let decoder = Decoder::new(checkpoint, DType::F32, &Device::Cpu).unwrap();
        let text: Vec<u32> = (0..960).map(|i| (i * i + 3 * i) % 49).collect();
        let windows = Windows::cut(&text, 16, None).unwrap();
        let recipe = Recipe::named("rd-dp", 0).unwrap();
        let collect = Collect::new(recipe.needs(&decoder), grams);
        let calibration = Calibration::run(&decoder, &windows, &collect, &NoProgress).unwrap();
        let plan = Plan::make(&decoder, &calibration, &recipe, 0.4, &NoProgress).unwrap();
        write(
            &decoder,
            &plan,
            &dst,
            &Settings::new(&calibration),
            &NoProgress,
        )
        .unwrap();
        serde_json::to_string(&plan).unwrap()
    };
    let plan = pool.unwrap().install(run);
    let weights = Checkpoint::open(&dst).unwrap().content_hash().unwrap();
    (plan, weights.to_string())
}

#[test]
fn plans_and_weights_are_the_same_for_one_two_and_three_threads() {
    let dir = tempfile::tempdir().unwrap();
    let dense = dir.path().join("dense");
    let config = json!({
        "model_type": "qwen3", "hidden_size": 96, "intermediate_size": 768, "num_hidden_layers": 2,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 48, "vocab_size": 50,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "hidden_act": "silu", "rope_theta": 10000.0,
    });
    let config = Config::new(config.as_object().unwrap().clone());
    let options = WriteOptions::default();
    synthetic::write(&config, DType::F32, &dense, &options, synthetic::random(11)).unwrap();
    let checkpoint = Checkpoint::open(&dense).unwrap();
    let one = pruned(&checkpoint, dir.path(), 1);
    for threads in [2, 3] {
        let other = pruned(&checkpoint, dir.path(), threads);
        assert!(other == one, "{threads} threads");
    }
}
