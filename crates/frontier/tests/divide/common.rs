//! Small models, texts and budgets.

use candle_core::{DType, Device};
use causal_lm::testing::{TestModel, config};
use causal_lm::{Decoder, Windows};
use frontier::{Data, Frontier, Options, Target};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Map, Value, json};
use std::path::Path;
use tensor_io::NoProgress;

pub(crate) const WORDS: usize = 64;

/// Two blocks of 64 channels and 160 neurons, so that rows are whole words and blocks; groups of 64 do not divide 160.
pub(crate) fn model(tied: bool) -> TestModel {
    let changes = json!({
        "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "head_dim": 8,
        "vocab_size": WORDS, "tie_word_embeddings": tied,
    });
    // Random weights of this size make predictions that differ from token to token.
    let louder = |_: &str, tensor: candle_core::Tensor| (tensor * 3.0).unwrap();
    let model = TestModel::with(&config("llama", changes), DType::BF16, louder);
    write_tokenizer(model.dir());
    model
}

/// A byte-level tokenizer of as many tokens as the model has rows.
pub(crate) fn write_tokenizer(dir: &Path) {
    let last = WORDS - 1;
    let vocab: Map<String, Value> = (0..last).map(|i| (format!("t{i}"), json!(i))).collect();
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "post_processor": null, "decoder": null,
        "added_tokens": [{"id": last, "content": "<s>", "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true}],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": []},
    });
    std::fs::write(dir.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    std::fs::write(dir.join("tokenizer_config.json"), r#"{"bos_token": "<s>"}"#).unwrap();
}

pub(crate) fn windows(seed: u64, count: usize) -> Windows {
    windows_of(seed, count, 16)
}

pub(crate) fn windows_of(seed: u64, count: usize, len: usize) -> Windows {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let text: Vec<u32> = (0..count * len)
        .map(|_| rng.random_range(0..WORDS as u32))
        .collect();
    Windows::cut(&text, len, None).unwrap()
}

pub(crate) fn options(target: Target) -> Options {
    let mut options = Options::new(target);
    options.coarse_tokens = 128;
    options.fine_tokens = 256;
    options.ranks = Some(vec![2, 4]);
    if target == Target::Here {
        let names = [
            "gptq-int8-g32",
            "gptq-q5_0",
            "gptq-int4-g64",
            "gptq-int2-g32",
        ];
        options.formats = Some(names.map(|name| name.parse().unwrap()).to_vec());
    }
    options
}

/// A measured model in a folder beside it.
pub(crate) fn with_frontier<T>(
    model: &TestModel,
    options: Options,
    f: impl FnOnce(&mut Frontier<'_>) -> T,
) -> T {
    with_frontier_of(model.dir(), &model.path("state"), options, f)
}

/// The same of the model in a folder, with the state of the run in another one.
pub(crate) fn with_frontier_of<T>(
    model: &Path,
    state: &Path,
    options: Options,
    f: impl FnOnce(&mut Frontier<'_>) -> T,
) -> T {
    let (calibration, comparison) = (windows(1, 24), windows(2, 16));
    // Opened again, so that the tokenizer is among its files.
    let checkpoint = causal_lm::open(model).unwrap();
    let decoder = Decoder::new(&checkpoint, DType::F32, &Device::Cpu).unwrap();
    let data = Data {
        calibration: &calibration,
        comparison: &comparison,
    };
    f(&mut Frontier::measure(&decoder, data, options, state, &NoProgress).unwrap())
}

/// Plans at a share of the bytes between the smallest plan and the dense model.
pub(crate) fn budget(frontier: &Frontier<'_>, share: f64) -> u64 {
    let (least, dense) = (frontier.smallest().unwrap(), frontier.dense_bytes());
    least + ((dense - least) as f64 * share) as u64
}

/// Bytes of the files of weights below a folder.
pub(crate) fn weight_files(dir: &Path) -> u64 {
    let mut sum = 0;
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let extension = path
            .extension()
            .and_then(|e| e.to_str())
            .unwrap_or_default();
        if path.is_dir() {
            sum += weight_files(&path);
        } else if matches!(extension, "safetensors" | "gguf") {
            sum += path.metadata().unwrap().len();
        }
    }
    sum
}
