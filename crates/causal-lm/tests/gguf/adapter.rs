//! LoRA adapters beside a model.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use causal_lm::testing::logits as run;
use causal_lm::{Decoder, Execution, open_adapted};
use tensor_io::Checkpoint;

use crate::golden::floats;

/// With the adapter merged into decoded weights, and beside packed ones.
fn logits(checkpoint: &Checkpoint, tokens: &[u32]) -> Vec<f32> {
    let decoder = || Decoder::new(checkpoint, DType::F32, &Device::Cpu).unwrap();
    let merged = run(&decoder(), tokens);
    near(
        &run(&decoder().packed(Execution::default()), tokens),
        &merged,
    );
    merged
}

fn near(found: &[f32], expected: &[f32]) {
    assert_eq!(found.len(), expected.len());
    for (found, expected) in found.iter().zip(expected) {
        assert!((found - expected).abs() < 1e-4, "{found} is not {expected}");
    }
}

#[shared_data::needed("golden/gguf-models.json")]
#[test]
fn the_golden_adapter_gives_the_logits_of_the_merged_model() {
    let folder = Path::new(shared_data::path!("golden"));
    let golden = std::fs::read(folder.join("gguf-models.json")).unwrap();
    let golden: serde_json::Value = serde_json::from_slice(&golden).unwrap();
    let tokens: Vec<u32> = floats(&golden["tokens"])
        .into_iter()
        .map(|x| x as u32)
        .collect();
    let adapter = folder.join("tiny-llama-gqa-lora.gguf");
    let golden = &golden["lora"]["tiny-llama-gqa-lora.gguf"];
    let merged = open_adapted(folder.join("tiny-llama-gqa-f32.gguf"), &adapter).unwrap();
    let rows = golden["logits"].as_array().unwrap();
    let expected: Vec<f32> = rows.iter().flat_map(floats).collect();
    near(&logits(&merged, &tokens), &expected);
    let quantised = open_adapted(folder.join("tiny-llama-gqa-q8_0.gguf"), &adapter).unwrap();
    let found = logits(&quantised, &tokens);
    let last = floats(&golden["q8_0_base_logits_last_row"]);
    near(&found[found.len() - last.len()..], &last);
    let other = open_adapted(folder.join("tiny-qwen2-q5_0.gguf"), &adapter)
        .unwrap_err()
        .to_string();
    assert!(
        other.contains("tiny-llama-gqa-lora.gguf") && other.contains("qwen2"),
        "{other}"
    );
    let model = open_adapted(
        folder.join("tiny-llama-gqa-f32.gguf"),
        folder.join("tiny-llama-gqa-q8_0.gguf"),
    );
    let model = model.unwrap_err().to_string();
    assert!(model.contains("expected a LoRA adapter"), "{model}");

    // The same factors as a PEFT folder: rows of q and k in the order of Hugging Face, alpha = rank.
    let base = causal_lm::open(folder.join("tiny-llama-gqa-f32.gguf")).unwrap();
    let factors = causal_lm::Adapter::open(&adapter, &base).unwrap().factors;
    let dir = tempfile::tempdir().unwrap();
    let mut tensors = Vec::new();
    let mut ranks = serde_json::Map::new();
    for (name, factors) in &factors {
        let module = name.strip_suffix(".weight").unwrap();
        let rank = factors.rank;
        let tensor = |values: &[f32], shape: (usize, usize)| {
            Tensor::from_slice(values, shape, &Device::Cpu).unwrap()
        };
        let a = tensor(&factors.a, (rank, factors.a.len() / rank));
        let b = tensor(&factors.b, (factors.b.len() / rank, rank));
        tensors.push((format!("base_model.model.{module}.lora_A.weight"), a));
        tensors.push((format!("base_model.model.{module}.lora_B.weight"), b));
        ranks.insert(module.into(), rank.into());
    }
    tensor_io::write_file(
        dir.path().join("adapter_model.safetensors"),
        tensors.iter().map(|(n, t)| (n, t)),
        &BTreeMap::new(),
    )
    .unwrap();
    let config = serde_json::json!({
        "peft_type": "LORA", "r": 8, "lora_alpha": 8, "rank_pattern": ranks, "alpha_pattern": ranks, "bias": "none",
    });
    std::fs::write(dir.path().join("adapter_config.json"), config.to_string()).unwrap();
    let merged = open_adapted(folder.join("tiny-llama-gqa-f32.gguf"), dir.path()).unwrap();
    near(&logits(&merged, &tokens), &expected);
    let bytes = merged.total_bytes();
    assert!(
        bytes > base.total_bytes()
            && merged.content_hash().unwrap() != base.content_hash().unwrap()
    );
}
