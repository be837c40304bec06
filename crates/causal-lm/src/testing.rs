//! Small random decoders and tokenizers in temporary folders, for tests of code that runs models.
//!
//! Behind the feature `testing`, for dev-dependencies. Everything here panics where something fails.

use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use serde_json::{Map, Value, json};
use tensor_io::{Checkpoint, Config, WriteOptions};

use crate::{Decoder, Model, synthetic};

/// A decoder with random weights in a folder that is removed with it.
#[derive(Debug)]
pub struct TestModel {
    folder: tempfile::TempDir,
    checkpoint: Checkpoint,
}

impl TestModel {
    /// A model in f32.
    pub fn new(config: &Config) -> Self {
        Self::with(config, DType::F32, |_, tensor| tensor)
    }

    /// A model stored as `dtype`, with tensors that `change` makes of the random ones by their names.
    pub fn with(
        config: &Config,
        dtype: DType,
        mut change: impl FnMut(&str, Tensor) -> Tensor,
    ) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let dir = folder.path().join("model");
        let mut random = synthetic::random(11);
        let make = |name: &str, shape: &[usize]| Ok(change(name, random(name, shape)?));
        synthetic::write(config, dtype, &dir, &WriteOptions::default(), make)
            .expect("a supported config");
        Self {
            checkpoint: Checkpoint::open(&dir).expect("the checkpoint just written"),
            folder,
        }
    }

    /// A model in f32 with the weights of golden files ([`golden_weights`]).
    pub fn golden(config: &Config) -> Self {
        Self::with(config, DType::F32, |name, tensor| {
            let values = golden_weights(name, tensor.dims());
            Tensor::from_vec(values, tensor.shape(), &Device::Cpu).expect("as many values")
        })
    }

    /// Writes a tokenizer with one token for each of `words`, which white space separates, beside the model. The first word
    /// is BOS and the last stands for unknown words.
    pub fn with_words(self, words: &[&str]) -> Self {
        write_tokenizer(self.dir(), words);
        self
    }

    /// The model's folder.
    pub fn dir(&self) -> &Path {
        self.checkpoint.dir()
    }

    /// A path beside the model's folder, for something that is removed with it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The model's checkpoint.
    pub fn checkpoint(&self) -> &Checkpoint {
        &self.checkpoint
    }

    /// The model, computed in f32 on the CPU.
    pub fn decoder(&self) -> Decoder<'_> {
        Decoder::new(&self.checkpoint, DType::F32, &Device::Cpu).expect("a supported checkpoint")
    }
}

/// Logits of a model at every position of one sequence, `[tokens · vocab]`.
pub fn logits(decoder: &Decoder<'_>, tokens: &[u32]) -> Vec<f32> {
    let model = Model::load(decoder).expect("a supported checkpoint");
    let mut cache = model.full_cache(1).expect("a cache");
    let logits = model.forward_all(&[tokens], &mut cache);
    let logits = logits.and_then(|logits| Ok(logits.flatten_all()?.to_vec1()?));
    logits.expect("tokens of the vocabulary")
}

/// Largest difference of two lists of logits.
pub fn gap(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    let gaps = a.iter().zip(b).map(|(a, b)| (a - b).abs());
    gaps.fold(0.0, f32::max)
}

/// Weights that a formula makes from a tensor's name, as golden files of transformers have them: a linear congruential
/// generator begins at the name's FNV hash; norms lie around 1, biases are small, the others divided by √inputs.
pub fn golden_weights(name: &str, shape: &[usize]) -> Vec<f32> {
    let hash = |h: u64, byte: u8| (h ^ u64::from(byte)).wrapping_mul(0x100000001b3);
    let mut x = name.bytes().fold(0xcbf29ce484222325, hash);
    let fan_in = *shape.last().expect("a tensor with dimensions") as f64;
    (0..shape.iter().product())
        .map(|_| {
            x = x
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            let e = 2.0 * ((x >> 11) as f64 / (1u64 << 53) as f64) - 1.0;
            let value = match name {
                n if n.ends_with("norm.weight") => 1.0 + 0.1 * e,
                n if n.ends_with(".bias") => 0.1 * e,
                n if n.contains("embed_tokens") => e,
                _ => e / fan_in.sqrt(),
            };
            value as f32
        })
        .collect()
}

/// Config of a small decoder of a `model_type`: three layers, four of eight heads with keys and values, 50 tokens, 64
/// positions; with the fields of `changes` replaced or added.
pub fn config(model_type: &str, changes: Value) -> Config {
    let fields = json!({
        "model_type": model_type, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 6, "vocab_size": 50,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "hidden_act": "silu", "rope_theta": 10000.0,
    });
    let mut fields = object(fields);
    fields.extend(object(changes));
    Config::new(fields)
}

/// A config of every kind of model that differs in how a block computes.
pub fn configs() -> Vec<Config> {
    // Rotated by other frequencies from the ninth token on.
    let phi3 = json!({
        "original_max_position_embeddings": 8,
        "rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.5, 2.0], "long_factor": [1.5, 3.0, 6.0]},
    });
    [
        ("llama", json!({})),
        (
            "llama",
            json!({"num_key_value_heads": 8, "tie_word_embeddings": true}),
        ),
        ("llama", json!({"attention_bias": true, "mlp_bias": true})),
        ("mistral", json!({"sliding_window": 8})),
        ("qwen2", json!({"num_key_value_heads": 2})),
        ("qwen3", json!({})),
        (
            "gemma2",
            json!({"sliding_window": 8, "query_pre_attn_scalar": 16, "hidden_act": "gelu_pytorch_tanh"}),
        ),
        ("phi3", phi3),
        ("olmo2", json!({})),
        (
            "gpt_neox",
            json!({"hidden_act": "gelu", "num_attention_heads": 4, "rotary_pct": 0.75}),
        ),
        ("glm4", json!({})),
        (
            "granite",
            json!({"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "attention_multiplier": 0.2, "logits_scaling": 8.0}),
        ),
        (
            "qwen2_moe",
            json!({"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
                "shared_expert_intermediate_size": 24, "mlp_only_layers": [1]}),
        ),
        ("mixtral", json!({"num_local_experts": 4})),
        (
            "qwen3_5_text",
            json!({"head_dim": 8, "layer_types": ["full_attention", "linear_attention", "linear_attention"],
                "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 6, "linear_value_head_dim": 5, "linear_conv_kernel_dim": 3}),
        ),
    ]
    .map(|(model_type, changes)| config(model_type, changes))
    .into()
}

/// Writes a byte-level `tokenizer.json` of `tokens` tokens, of which the last is BOS: one that GGUF files can hold.
pub fn write_byte_tokenizer(dir: impl AsRef<Path>, tokens: usize) {
    let vocab: Map<String, Value> = (0..tokens - 1)
        .map(|id| (format!("t{id}"), json!(id)))
        .collect();
    let bos = json!({"id": tokens - 1, "content": "<s>", "single_word": false, "lstrip": false, "rstrip": false,
        "normalized": false, "special": true});
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "added_tokens": [bos],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "post_processor": null, "decoder": null,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": []},
    });
    let config = json!({"bos_token": "<s>"});
    for (name, contents) in [
        ("tokenizer.json", tokenizer),
        ("tokenizer_config.json", config),
    ] {
        let path = dir.as_ref().join(name);
        std::fs::write(path, contents.to_string()).expect("a folder that can be written to");
    }
}

/// Writes `tokenizer.json` and `tokenizer_config.json` with one token for each of `words`, which white space separates. The
/// first word is BOS and the last stands for unknown words.
pub fn write_tokenizer(dir: impl AsRef<Path>, words: &[&str]) {
    let ids = words.iter().enumerate();
    let vocab: Map<String, Value> = ids
        .map(|(id, word)| (word.to_string(), json!(id)))
        .collect();
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": null, "decoder": null,
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": words[words.len() - 1]},
    });
    let config = json!({"bos_token": words[0]});
    for (name, contents) in [
        ("tokenizer.json", tokenizer),
        ("tokenizer_config.json", config),
    ] {
        let path = dir.as_ref().join(name);
        std::fs::write(path, contents.to_string()).expect("a folder that can be written to");
    }
}

fn object(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(fields) => fields,
        other => panic!("expected a JSON object, found {other}"),
    }
}
