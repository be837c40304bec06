//! Small random decoders of every supported kind, written as checkpoint folders.

use candle_core::{DType, Device, Tensor};
use causal_lm::{Decoder, Model, Windows, synthetic};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use tensor_io::{Checkpoint, Config, WriteOptions};

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
        let mut random = synthetic::random(11);
        let make = |name: &str, shape: &[usize]| Ok(change(name, random(name, shape)?));
        synthetic::write(&config, dtype, &dir, &WriteOptions::default(), make).unwrap();
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

/// Replacing what an earlier step of a test wrote.
pub(crate) fn overwrite() -> WriteOptions {
    WriteOptions {
        overwrite: true,
        ..WriteOptions::default()
    }
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
