//! Mixtures whose router rows share experts or stand for constants, beside the same as a mixture of as many experts.

use candle_core::{DType, Device, Tensor};
use causal_lm::block::Mlp;
use causal_lm::mixture::ExpertInputs;
use causal_lm::testing::{TestModel, config, gap, logits};
use causal_lm::{
    Decoder, Error, Execution, Hidden, Linear, ModelConfig, NoTap, Windows, synthetic,
};
use serde_json::{Value, json};
use tensor_io::{Checkpoint, Config, WriteOptions};

const TOKENS: [u32; 16] = [1, 17, 5, 33, 8, 21, 39, 2, 12, 30, 7, 26, 9, 9, 40, 3];

/// Three layers: of six rows on three experts and two constants, of six experts, and of six rows on two experts.
fn lists() -> Value {
    json!({
        "num_attention_heads": [8, 8, 8], "num_key_value_heads": [8, 8, 8], "intermediate_size": [0, 0, 0],
        "num_experts": [3, 6, 2], "expert_size": [16, 16, 16],
        "expert_map": [[0, 3, 1, 0, 4, 2], [0, 1, 2, 3, 4, 5], [1, 0, 0, 1, 1, 0]],
    })
}

fn mapped(model_type: &str, changes: Value) -> Config {
    let mut fields = json!({
        "num_key_value_heads": 8, "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 16,
        "intermediate_size": 16, "shared_expert_intermediate_size": 24, "attention_multiplier": 0.3,
        "per_layer_widths": lists(),
    });
    if matches!(model_type, "mixtral" | "granitemoe") {
        fields["num_local_experts"] = json!(6);
    }
    for (field, value) in changes.as_object().unwrap() {
        fields[field] = value.clone();
    }
    config(model_type, fields)
}

const TYPES: [&str; 5] = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe"];

fn each(test: impl Fn(&str, &Config)) {
    for model_type in TYPES {
        for normalise in [false, true] {
            let config = mapped(model_type, json!({"norm_topk_prob": normalise}));
            test(&format!("{model_type} {normalise}"), &config);
        }
    }
}

/// An expert that puts out the same whatever it reads.
fn constant(vector: &Tensor, like: &Mlp) -> Mlp {
    let mut mlp = like.clone();
    let zeros = like.down.weight().unwrap().zeros_like().unwrap();
    mlp.down = Linear::new(zeros, Some(vector.clone()));
    mlp
}

/// Logits of the last token with an expert of its own for each router row.
fn written_out(decoder: &Decoder<'_>) -> Vec<f32> {
    let windows = Windows::cut(&TOKENS, TOKENS.len(), None).unwrap();
    let mut hidden = Hidden::embed(decoder, &windows).unwrap();
    for layer in 0..decoder.config().layers() {
        let mut block = decoder.block(layer).unwrap();
        let moe = block.experts.as_mut().unwrap();
        if let Some(mapped) = moe.mapped.take() {
            let stored = moe.experts.clone();
            let expert = |&id: &usize| match id.checked_sub(stored.len()) {
                None => stored[id].clone(),
                Some(at) => constant(
                    &mapped.novices.as_ref().unwrap().get(at).unwrap(),
                    &stored[0],
                ),
            };
            moe.experts = mapped.map.ids().iter().map(expert).collect();
        }
        hidden.advance(&block, &mut NoTap).unwrap();
    }
    last(decoder, &hidden)
}

fn stored(decoder: &Decoder<'_>) -> Vec<f32> {
    let windows = Windows::cut(&TOKENS, TOKENS.len(), None).unwrap();
    let mut hidden = Hidden::embed(decoder, &windows).unwrap();
    for layer in 0..decoder.config().layers() {
        hidden.advance_stored(decoder, layer, &mut NoTap).unwrap();
    }
    last(decoder, &hidden)
}

fn last(decoder: &Decoder<'_>, hidden: &Hidden) -> Vec<f32> {
    let rows = hidden.batches()[0].get(0).unwrap();
    let logits = decoder.head().unwrap().forward(&rows).unwrap();
    logits.flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn shared_experts_and_constants_compute_what_an_expert_for_each_row_does() {
    each(|name, config| {
        let model = TestModel::new(config);
        let decoder = model.decoder();
        assert!(decoder.config().expert_maps[1].is_none(), "{name}");
        let expected = written_out(&decoder);
        assert!(gap(&stored(&decoder), &expected) < 1e-5, "{name}");
        // Whole in memory, through a cache.
        assert!(gap(&logits(&decoder, &TOKENS), &expected) < 1e-5, "{name}");
    });
}

#[test]
fn constants_stand_beside_experts_that_are_multiplied_as_they_are_stored() {
    each(|name, config| {
        let model = TestModel::with(config, DType::BF16, |_, tensor| tensor);
        let expected = written_out(&model.decoder());
        let packed = model.decoder().packed(Execution::default());
        assert!(gap(&stored(&packed), &expected) < 1e-4, "{name}");
    });
}

#[test]
fn tensors_are_counted_in_memory_and_named_where_they_are_missing() {
    each(|name, config| {
        let model = TestModel::new(config);
        let weights = model.decoder().weights().unwrap();
        let whole = causal_lm::Model::load(&model.decoder())
            .unwrap()
            .weights()
            .bytes;
        assert_eq!(weights.bytes, whole, "{name}");
        let tensors = ModelConfig::new(config).unwrap().tensors();
        let novices: Vec<_> = tensors
            .iter()
            .filter(|(name, _)| name.contains("novices"))
            .collect();
        assert_eq!(novices.len(), 1, "{name}");
        assert_eq!(novices[0].1, [2, 24], "{name}");
        let opened = |lists: Value| {
            let mut config = config.clone();
            config.set("per_layer_widths", lists);
            let dir = model.path("changed");
            std::fs::create_dir_all(&dir).unwrap();
            std::fs::write(dir.join("config.json"), json!(config.raw()).to_string()).unwrap();
            let file = model.dir().join("model.safetensors");
            std::fs::copy(file, dir.join("model.safetensors")).unwrap();
            let checkpoint = Checkpoint::open(&dir).unwrap();
            let error = Decoder::new(&checkpoint, DType::F32, &Device::Cpu).err();
            error.map_or(String::new(), |error| error.to_string())
        };
        assert_eq!(opened(lists()), "", "{name}");
        let mut three = lists();
        three["expert_map"][0] = json!([0, 3, 1, 5, 4, 2]);
        assert!(
            opened(three).contains("novices.weight: shape [2, 24]"),
            "{name}"
        );
        let mut other = lists();
        other["expert_map"][2] = json!([1, 0, 2, 1, 1, 0]);
        assert!(opened(other).contains("model.layers.2"), "{name}");
    });
}

#[test]
fn maps_that_are_none_are_refused() {
    let refused = |change: &dyn Fn(&mut Value)| {
        let mut lists = lists();
        change(&mut lists);
        let config = mapped("mixtral", json!({"per_layer_widths": lists}));
        ModelConfig::new(&config).unwrap_err().to_string()
    };
    for (map, said) in [
        (json!([[0, 3, 1, 0, 4, 2], []]), "3 lists"),
        (
            json!([[0, 3, 1, 0, 4, 9], [0, 1, 2, 3, 4, 5], []]),
            "ids below 10",
        ),
        (
            json!([[0, 0, 0, 0, 1, 1], [0, 1, 2, 3, 4, 5], []]),
            "2 is none",
        ),
        (json!([[0, 1, 2, "a"], [0, 1, 2, 3, 4, 5], []]), "layer 0"),
    ] {
        let error = refused(&|lists| lists["expert_map"] = map.clone());
        assert!(
            error.contains("per_layer_widths") && error.contains(said),
            "{error}"
        );
    }
    let dense = refused(&|lists| lists["num_experts"][2] = json!(0));
    assert!(dense.contains("no experts"), "{dense}");
    // Fewer rows than a token goes to, and more than there are experts.
    let few = refused(&|lists| lists["expert_map"][2] = json!([0, 1]));
    assert!(few.contains("num_experts_per_tok"), "{few}");
    let config = mapped("mixtral", json!({"num_experts_per_tok": 6}));
    let model = ModelConfig::new(&config).unwrap();
    assert_eq!(model.router_rows(2), 6);
    assert!(matches!(
        model.refuse_expert_map("a test"),
        Err(Error::ExpertMap { layer: 0, .. })
    ));
    assert!(!model.is_plain_mixtral());
}

#[test]
fn a_tied_model_of_equal_experts_is_the_model_itself() {
    let dense = config(
        "mixtral",
        json!({"num_local_experts": 6, "num_experts_per_tok": 3, "intermediate_size": 16}),
    );
    // Experts 1 and 4 of every layer are expert 0.
    let mut random = synthetic::random(5);
    let mut first: Vec<(String, Tensor)> = vec![];
    let mut make = |name: &str, shape: &[usize]| {
        let tensor = random(name, shape)?;
        if name.contains("experts.0.") {
            first.push((name.to_string(), tensor.clone()));
        }
        let own = name
            .replace("experts.1.", "experts.0.")
            .replace("experts.4.", "experts.0.");
        let twin = first.iter().find(|(name, _)| *name == own);
        Ok(twin.map_or(tensor, |(_, twin)| twin.clone()))
    };
    let folder = tempfile::tempdir().unwrap();
    let (dir, tied_dir) = (folder.path().join("dense"), folder.path().join("tied"));
    let files = WriteOptions::default();
    synthetic::write(&dense, DType::F32, &dir, &files, &mut make).unwrap();
    let checkpoint = Checkpoint::open(&dir).unwrap();
    let mut tied = dense.clone();
    tied.set(
        "per_layer_widths",
        json!({
            "num_attention_heads": [8, 8, 8], "num_key_value_heads": [4, 4, 4], "intermediate_size": [0, 0, 0],
            "num_experts": [4, 4, 4], "expert_size": [16, 16, 16], "expert_map": vec![[0, 0, 1, 2, 0, 3]; 3],
        }),
    );
    synthetic::write(&tied, DType::F32, &tied_dir, &files, |name, _| {
        let stored = [
            ("experts.1.", "experts.2."),
            ("experts.2.", "experts.3."),
            ("experts.3.", "experts.5."),
        ];
        let from = stored.iter().find(|(to, _)| name.contains(to));
        let from = from.map_or(name.to_string(), |(to, from)| name.replace(to, from));
        Ok(checkpoint.tensor(&from, &Device::Cpu)?)
    })
    .unwrap();
    let smaller = Checkpoint::open(&tied_dir).unwrap();
    assert!(smaller.total_bytes() < checkpoint.total_bytes());
    let [a, b] = [&checkpoint, &smaller].map(|checkpoint| {
        let decoder = Decoder::new(checkpoint, DType::F32, &Device::Cpu).unwrap();
        // Some token goes to two of the equal experts.
        let windows = Windows::cut(&TOKENS, TOKENS.len(), None).unwrap();
        let mut seen = ExpertInputs::default();
        let mut hidden = Hidden::embed(&decoder, &windows).unwrap();
        hidden.advance_stored(&decoder, 0, &mut seen).unwrap();
        let rows = seen.routings[0].ids.chunks(3);
        let both = |rows: &&[u32]| rows.iter().filter(|row| [0, 1, 4].contains(*row)).count() > 1;
        assert!(rows.filter(both).count() > 0);
        logits(&decoder, &TOKENS)
    });
    assert!(gap(&a, &b) < 1e-5);
}
