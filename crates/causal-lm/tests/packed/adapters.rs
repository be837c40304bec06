//! LoRA adapters beside packed weights.

use std::collections::BTreeMap;
use std::path::PathBuf;

use candle_core::DType;
use serde_json::json;
use tensor_io::{Checkpoint, write_file};

use causal_lm::testing::TestModel;
use causal_lm::{Adapter, Decoder, Execution, LinearName, open_adapted};

use crate::stored::{STORED, write_compressed};
use crate::{decoder, gap, kind, logits, wide};

/// A PEFT folder with factors of rank 3 for two linears of each block.
pub(crate) fn write_adapter(model: &TestModel) -> PathBuf {
    let config = json!({"peft_type": "LORA", "r": 3, "lora_alpha": 6, "bias": "none"});
    write_adapter_with(model, "adapter", config)
}

/// The same factors with another config.
fn write_adapter_with(model: &TestModel, name: &str, config: serde_json::Value) -> PathBuf {
    let dir = model.path(name);
    std::fs::create_dir_all(&dir).unwrap();
    std::fs::write(dir.join("adapter_config.json"), config.to_string()).unwrap();
    let mut tensors = Vec::new();
    let mut random = causal_lm::synthetic::random(5);
    for layer in 0..3 {
        for module in ["self_attn.q_proj", "mlp.down_proj"] {
            let name = format!("model.layers.{layer}.{module}");
            let shape = &model
                .checkpoint()
                .info(&format!("{name}.weight"))
                .unwrap()
                .shape;
            for (part, shape) in [("lora_A", [3, shape[1]]), ("lora_B", [shape[0], 3])] {
                let name = format!("base_model.model.{name}.{part}.weight");
                let values = random(&name, &shape).unwrap();
                tensors.push((name, values));
            }
        }
    }
    let data = tensors.iter().map(|(name, tensor)| (name, tensor));
    write_file(
        dir.join("adapter_model.safetensors"),
        data,
        &BTreeMap::new(),
    )
    .unwrap();
    dir
}

#[test]
fn an_adapter_beside_packed_weights_gives_the_logits_of_the_merged_model() {
    let model = TestModel::with(&wide(), DType::BF16, |_, tensor| tensor);
    let adapter = write_adapter(&model);
    let groups = model.path("groups");
    write_compressed(&model, STORED[1], &groups);
    for base in [model.dir(), groups.as_path()] {
        let checkpoint = open_adapted(base, &adapter).unwrap();
        let packed = decoder(&checkpoint).packed(Execution::default());
        assert!(kind(&packed, LinearName::Q).is_some());
        let merged = logits(&decoder(&checkpoint));
        assert!(gap(&logits(&packed), &merged) < 1e-5, "{}", base.display());
        let alone = causal_lm::open(base).unwrap();
        assert!(gap(&merged, &logits(&decoder(&alone))) > 1e-2);
        let weight = |decoder: &Decoder<'_>| -> Vec<f32> {
            let weight = decoder.weight(2, LinearName::Q).unwrap().unwrap();
            weight.flatten_all().unwrap().to_vec1().unwrap()
        };
        let gap = gap(&weight(&packed), &weight(&decoder(&checkpoint)));
        assert!(gap < 1e-6, "{gap}");
    }
}

#[test]
fn ranks_and_alphas_of_an_adapter_are_those_of_the_patterns_that_match() {
    let model = TestModel::with(&wide(), DType::BF16, |_, tensor| tensor);
    let config = |r: usize, ranks: serde_json::Value, alphas: serde_json::Value| {
        json!({"peft_type": "LORA", "r": r, "lora_alpha": 6, "bias": "none", "rank_pattern": ranks,
            "alpha_pattern": alphas})
    };
    let open = |name: &str, config| {
        let dir = write_adapter_with(&model, name, config);
        Adapter::open(dir, model.checkpoint())
    };
    let scales = |adapter: &Adapter| -> Vec<f32> {
        let scale = |name| adapter.factors(name).unwrap().unwrap().scale;
        adapter.names().map(scale).collect()
    };
    // In the order of names: down_proj and q_proj of each of three blocks.
    let plain = open("plain", config(3, json!({}), json!({}))).unwrap();
    assert_eq!(scales(&plain), [2.0; 6]);
    let ranks = json!({".*q_proj": 3, r"layers\.\d+\.mlp\..*": 3});
    let by_rank = open("ranks", config(12, ranks, json!({}))).unwrap();
    assert_eq!(scales(&by_rank), [2.0; 6]);
    let alphas = json!({r"layers\.[01]\..*q_proj": 12, "down_proj": 3});
    let by_alpha = open("alphas", config(3, json!({}), alphas)).unwrap();
    assert_eq!(scales(&by_alpha), [1.0, 4.0, 1.0, 4.0, 1.0, 2.0]);

    // A rank that is not that of the factors would give them another strength.
    let wrong = open("wrong", config(12, json!({"q_proj": 3}), json!({})));
    let error = wrong.unwrap_err().to_string();
    for part in [
        "adapter_model.safetensors",
        "down_proj",
        "rank 3",
        "states 12",
    ] {
        assert!(error.contains(part), "{error}");
    }
}

#[test]
fn an_adapter_may_be_added_in_part() {
    let model = TestModel::with(&wide(), DType::BF16, |_, tensor| tensor);
    let dir = write_adapter(&model);
    let half = write_adapter_with(
        &model,
        "half",
        json!({"peft_type": "LORA", "r": 3, "lora_alpha": 3, "bias": "none"}),
    );
    let open = || Adapter::open(&dir, model.checkpoint()).unwrap();
    let scaled = |scale: f32| {
        let base = Checkpoint::open(model.dir()).unwrap();
        let checkpoint = open().with_scale(scale).unwrap().added_to(base).unwrap();
        let packed = logits(&decoder(&checkpoint).packed(Execution::default()));
        let merged = logits(&decoder(&checkpoint));
        assert!(gap(&packed, &merged) < 1e-5);
        (merged, checkpoint.content_hash().unwrap())
    };
    let expected = open_adapted(model.dir(), &half).unwrap();
    let (found, hash) = scaled(0.5);
    assert!(gap(&found, &logits(&decoder(&expected))) < 1e-6);
    assert_ne!(scaled(1.0).1, hash);
    assert!(gap(&scaled(0.0).0, &logits(&model.decoder())) < 1e-6);
    let error = open().with_scale(f32::NAN).unwrap_err().to_string();
    assert!(error.contains("NaN"), "{error}");
}

#[test]
fn an_adapter_says_which_model_it_names_as_its_base() {
    let model = TestModel::with(&wide(), DType::BF16, |_, tensor| tensor);
    let config = |base| {
        json!({"peft_type": "LORA", "r": 3, "lora_alpha": 6, "bias": "none",
            "base_model_name_or_path": base})
    };
    for (name, base, expected) in [
        ("named", json!("../model"), Some("../model")),
        ("empty", json!(""), None),
        ("null", json!(null), None),
    ] {
        let adapter = write_adapter_with(&model, name, config(base));
        let found = Adapter::base_model(adapter).unwrap();
        assert_eq!(found.as_deref(), expected);
    }
    let none = write_adapter(&model);
    assert_eq!(Adapter::base_model(none).unwrap(), None);
}
