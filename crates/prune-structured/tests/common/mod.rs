//! Small random decoders of every supported kind, written as checkpoint folders.

use candle_core::{DType, Device, Tensor};
use causal_lm::{Decoder, Model, Windows};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use tensor_io::{Checkpoint, CheckpointWriter, Config, TensorSpec, WriteOptions};

/// Names of the models that [`Tiny::new`] makes.
pub(crate) const KINDS: [&str; 6] = [
    "llama",
    "llama-mha-tied",
    "llama-biases",
    "mistral",
    "qwen2",
    "qwen3",
];

/// A model in a folder that is removed with it.
pub(crate) struct Tiny {
    folder: tempfile::TempDir,
    pub(crate) checkpoint: Checkpoint,
}

impl Tiny {
    pub(crate) fn new(kind: &str, dtype: DType) -> Self {
        Self::with(kind, dtype, |_, tensor| tensor)
    }

    /// As `new`, with tensors changed before they are written.
    pub(crate) fn with(kind: &str, dtype: DType, change: impl Fn(&str, Tensor) -> Tensor) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("dense");
        let config = Config::new(config(kind).as_object().unwrap().clone());
        let tensors = tensors(&config);
        let specs = tensors
            .iter()
            .map(|(name, shape)| TensorSpec::new(name, dtype, shape.clone()))
            .collect();
        let mut writer =
            CheckpointWriter::create(&dir, &config, specs, &WriteOptions::default()).unwrap();
        let mut rng = ChaCha8Rng::seed_from_u64(11);
        for (name, shape) in &tensors {
            let fan_in = *shape.last().unwrap() as f32;
            let (centre, spread) = match name {
                n if n.ends_with("norm.weight") => (1.0, 0.2),
                n if n.ends_with(".bias") => (0.0, 0.3),
                n if n.contains("embed") => (0.0, 1.0),
                _ => (0.0, 2.0 / fan_in.sqrt()),
            };
            let values: Vec<f32> = (0..shape.iter().product())
                .map(|_| centre + spread * rng.random_range(-1.0..1.0f32))
                .collect();
            let tensor = Tensor::from_vec(values, shape.as_slice(), &Device::Cpu).unwrap();
            writer.write_tensor(name, &change(name, tensor)).unwrap();
        }
        writer.finish().unwrap();
        Self {
            checkpoint: Checkpoint::open(&dir).unwrap(),
            folder,
        }
    }

    pub(crate) fn decoder(&self) -> Decoder<'_> {
        decoder(&self.checkpoint)
    }

    /// A path for an output, removed with the model.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }
}

pub(crate) fn decoder(checkpoint: &Checkpoint) -> Decoder<'_> {
    Decoder::new(checkpoint, DType::F32, &Device::Cpu).unwrap()
}

/// Random text as windows.
pub(crate) fn windows(count: usize) -> Windows {
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    let text: Vec<u32> = (0..count * 16).map(|_| rng.random_range(0..50)).collect();
    Windows::cut(&text, 16, None).unwrap()
}

/// Logits of the model in a folder on fixed tokens.
pub(crate) fn logits(dir: &Path) -> Vec<f32> {
    let checkpoint = Checkpoint::open(dir).unwrap();
    let decoder = decoder(&checkpoint);
    let model = Model::load(&decoder).unwrap();
    let tokens: Vec<u32> = (0..20).map(|i| i * 7 % 50).collect();
    let logits = model
        .forward_all(&[&tokens], &mut model.full_cache(1).unwrap())
        .unwrap();
    logits.flatten_all().unwrap().to_vec1().unwrap()
}

/// Largest difference of two lists of logits.
pub(crate) fn gap(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter()
        .zip(b)
        .map(|(a, b)| (a - b).abs())
        .fold(0.0, f32::max)
}

fn config(kind: &str) -> Value {
    let mut config = json!({
        "model_type": kind.split('-').next().unwrap(),
        "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 8,
        "num_key_value_heads": 4, "head_dim": 6, "vocab_size": 50, "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5, "hidden_act": "silu", "rope_theta": 10000.0, "a_field_of_its_own": {"kept": true},
    });
    match kind {
        "llama-mha-tied" => {
            config["num_key_value_heads"] = json!(8);
            config["tie_word_embeddings"] = json!(true);
        }
        "llama-biases" => {
            config["attention_bias"] = json!(true);
            config["mlp_bias"] = json!(true);
        }
        "mistral" => config["sliding_window"] = json!(8),
        // Few key/value heads: query heads are the unit.
        "qwen2" => config["num_key_value_heads"] = json!(2),
        _ => {}
    }
    config
}

fn tensors(config: &Config) -> Vec<(String, Vec<usize>)> {
    let size = |key| config.usize(key).unwrap();
    let (hidden, neurons, vocab, d) = (
        size("hidden_size"),
        size("intermediate_size"),
        size("vocab_size"),
        size("head_dim"),
    );
    let (q, kv) = (
        size("num_attention_heads") * d,
        size("num_key_value_heads") * d,
    );
    let model = config.str("model_type").unwrap();
    let flag = |key| config.opt_bool(key).unwrap().unwrap_or(false);
    let mut tensors = vec![("model.embed_tokens.weight".to_string(), vec![vocab, hidden])];
    for layer in 0..size("num_hidden_layers") {
        let mut add = |path: &str, shape: Vec<usize>| {
            tensors.push((format!("model.layers.{layer}.{path}"), shape))
        };
        add("input_layernorm.weight", vec![hidden]);
        add("post_attention_layernorm.weight", vec![hidden]);
        if model == "qwen3" {
            add("self_attn.q_norm.weight", vec![d]);
            add("self_attn.k_norm.weight", vec![d]);
        }
        for (name, out, input, bias) in [
            (
                "self_attn.q_proj",
                q,
                hidden,
                flag("attention_bias") || model == "qwen2",
            ),
            (
                "self_attn.k_proj",
                kv,
                hidden,
                flag("attention_bias") || model == "qwen2",
            ),
            (
                "self_attn.v_proj",
                kv,
                hidden,
                flag("attention_bias") || model == "qwen2",
            ),
            ("self_attn.o_proj", hidden, q, flag("attention_bias")),
            ("mlp.gate_proj", neurons, hidden, flag("mlp_bias")),
            ("mlp.up_proj", neurons, hidden, flag("mlp_bias")),
            ("mlp.down_proj", hidden, neurons, flag("mlp_bias")),
        ] {
            add(&format!("{name}.weight"), vec![out, input]);
            if bias {
                add(&format!("{name}.bias"), vec![out]);
            }
        }
    }
    tensors.push(("model.norm.weight".into(), vec![hidden]));
    if !flag("tie_word_embeddings") {
        tensors.push(("lm_head.weight".into(), vec![vocab, hidden]));
    }
    tensors
}
