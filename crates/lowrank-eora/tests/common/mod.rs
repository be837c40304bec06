//! Small decoders in folders, and windows of text for them.

use candle_core::{DType, Device, Tensor};
use causal_lm::{Decoder, TextTokenizer, Windows, synthetic};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::json;
use std::path::PathBuf;
use tensor_io::{Checkpoint, Config, WriteOptions};

/// A model in a folder that is removed with it.
pub(crate) struct Tiny {
    folder: tempfile::TempDir,
    pub(crate) checkpoint: Checkpoint,
}

/// Two blocks, grouped-query attention; all widths are multiples of 4.
fn config() -> Config {
    let fields = json!({
        "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 50, "max_position_embeddings": 64,
        "tie_word_embeddings": true,
    });
    Config::new(fields.as_object().unwrap().clone())
}

impl Tiny {
    pub(crate) fn new() -> Self {
        Self::with(|_, tensor| tensor)
    }

    /// With tensors changed before they are written.
    pub(crate) fn with(change: impl Fn(&str, Tensor) -> Tensor) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("dense");
        let mut random = synthetic::random(11);
        let make = |name: &str, shape: &[usize]| Ok(change(name, random(name, shape)?));
        synthetic::write(&config(), DType::F32, &dir, &WriteOptions::default(), make).unwrap();
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
pub(crate) fn windows(count: usize, seed: u64) -> Windows {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let text: Vec<u32> = (0..count * 16).map(|_| rng.random_range(0..50)).collect();
    Windows::cut(&text, 16, None).unwrap()
}

/// A trained model beside the project, with windows to calibrate on and others to hold out.
pub(crate) fn trained() -> Option<(Checkpoint, Windows, Windows)> {
    let shared = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../../shared"));
    let model = shared.join("models/stories260K");
    let text = shared.join("data/text/tinystories_train_1MiB.txt");
    if !model.is_dir() || !text.is_file() {
        eprintln!(
            "skipped: {} or {} is absent",
            model.display(),
            text.display()
        );
        return None;
    }
    let tokenizer = TextTokenizer::open(&model).unwrap();
    let tokens = tokenizer.encode_file(&text).unwrap();
    let windows = Windows::cut(&tokens, 128, tokenizer.bos()).unwrap();
    let (calibration, rest) = (windows.first(32), windows.sample(windows.count(), 0));
    let held_out = rest.groups(32).nth(1).unwrap();
    Some((Checkpoint::open(model).unwrap(), calibration, held_out))
}
