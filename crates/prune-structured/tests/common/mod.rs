//! Small random decoders of every supported kind, written as checkpoint folders.

use candle_core::{DType, Device, Tensor};
pub(crate) use causal_lm::testing::gap;
use causal_lm::testing::{self, TestModel};
use causal_lm::{Decoder, Windows};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::json;
use std::path::Path;
use tensor_io::{Checkpoint, Config, WriteOptions};

/// Kinds of models that [`tiny`] makes.
pub(crate) const KINDS: [&str; 6] = [
    "llama",
    "llama-mha-tied",
    "llama-biases",
    "mistral",
    "qwen2",
    "qwen3",
];

/// The random model of a kind.
pub(crate) fn tiny(kind: &str, dtype: DType) -> TestModel {
    tiny_with(kind, dtype, |_, tensor| tensor)
}

/// As [`tiny`], with tensors changed before they are written.
pub(crate) fn tiny_with(
    kind: &str,
    dtype: DType,
    change: impl Fn(&str, Tensor) -> Tensor,
) -> TestModel {
    TestModel::with(&config(kind), dtype, change)
}

pub(crate) fn decoder(checkpoint: &Checkpoint) -> Decoder<'_> {
    Decoder::new(checkpoint, DType::F32, &Device::Cpu).unwrap()
}

/// Replacing what an earlier step of a test wrote.
pub(crate) fn overwrite() -> WriteOptions {
    WriteOptions::default().with_overwrite(true)
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
    let tokens: Vec<u32> = (0..20).map(|i| i * 7 % 50).collect();
    testing::logits(&decoder(&checkpoint), &tokens)
}

fn config(kind: &str) -> Config {
    let mut changes = json!({"a_field_of_its_own": {"kept": true}});
    match kind {
        "llama-mha-tied" => {
            changes["num_key_value_heads"] = json!(8);
            changes["tie_word_embeddings"] = json!(true);
        }
        "llama-biases" => {
            changes["attention_bias"] = json!(true);
            changes["mlp_bias"] = json!(true);
        }
        "mistral" => changes["sliding_window"] = json!(8),
        // Few key/value heads: query heads are the unit.
        "qwen2" => changes["num_key_value_heads"] = json!(2),
        _ => {}
    }
    testing::config(kind.split('-').next().unwrap(), changes)
}
