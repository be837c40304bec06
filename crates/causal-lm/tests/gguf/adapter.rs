//! LoRA adapters beside a model.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use causal_lm::testing::logits as run;
use causal_lm::{Decoder, Execution, open_adapted};
use packed::BlockType;
use tensor_io::Checkpoint;
use tensor_io::gguf::{BlockLayout, TensorSpec, Value, Writer};

use crate::golden::floats;
use crate::random_gguf;

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
    let opened = causal_lm::Adapter::open(&adapter, &base).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let mut tensors = Vec::new();
    let mut ranks = serde_json::Map::new();
    for name in opened.names() {
        let factors = opened.factors(name).unwrap().unwrap();
        assert_eq!(factors.scale, 1.0);
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

/// A LoRA of one linear of [`random_gguf::small`], with more tensors beside.
fn write_lora(dir: &Path, more: &[(&str, usize)], alpha: f32) -> std::path::PathBuf {
    let path = dir.join("lora.gguf");
    let metadata: Vec<(String, Value)> = [
        ("general.type", Value::from("adapter")),
        ("general.architecture", "llama".into()),
        ("adapter.type", "lora".into()),
        ("adapter.lora.alpha", alpha.into()),
    ]
    .map(|(key, value)| (key.to_string(), value))
    .into();
    let floats = BlockLayout::named("F32").unwrap();
    let mut specs = vec![
        TensorSpec::new("blk.0.attn_v.weight.lora_a", floats, [2, 64]),
        TensorSpec::new("blk.0.attn_v.weight.lora_b", floats, [32, 2]),
    ];
    specs.extend(
        more.iter()
            .map(|(name, width)| TensorSpec::new(*name, floats, [*width])),
    );
    let mut writer = Writer::create(&path, &metadata, &specs).unwrap();
    for spec in &specs {
        let count = spec.shape.iter().product::<usize>();
        let values = (0..count).flat_map(|i| (((i * 7) % 11) as f32 / 20.0 - 0.25).to_le_bytes());
        writer
            .write(&spec.name, &values.collect::<Vec<u8>>())
            .unwrap();
    }
    writer.finish().unwrap();
    path
}

#[test]
fn norms_in_an_adapter_are_passed_over_and_other_tensors_are_not() {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("base.gguf");
    random_gguf::small(BlockType::Q8_0).write(&base);
    let open = |more: &[(&str, usize)], alpha: f32| {
        let adapter = write_lora(dir.path(), more, alpha);
        let base = causal_lm::open(&base).unwrap();
        let adapter = causal_lm::Adapter::open(adapter, &base)?;
        let factors = adapter
            .factors("model.layers.0.self_attn.v_proj.weight")?
            .unwrap();
        assert_eq!((factors.rank, factors.b.len()), (2, 64));
        Ok::<_, causal_lm::Error>(factors.scale)
    };
    let norms = [("blk.0.attn_norm.weight", 64), ("output_norm.weight", 64)];
    assert_eq!(open(&[], 0.0).unwrap(), 1.0);
    assert_eq!(open(&norms, 6.0).unwrap(), 3.0);
    let error = open(&[("blk.0.attn_v.bias", 32)], 0.0)
        .unwrap_err()
        .to_string();
    assert!(error.contains("blk.0.attn_v.bias"), "{error}");
}
