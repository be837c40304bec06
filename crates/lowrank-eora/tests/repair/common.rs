//! Small decoders in folders, windows of text for them, and what is repeated of repairs.

use candle_core::{DType, Device, Tensor};
use causal_lm::testing::TestModel;
use causal_lm::{Decoder, LinearName, TextTokenizer, Windows};
use faer::{Mat, MatMut, MatRef};
use lowrank_eora::compress::Compressor;
use lowrank_eora::repair::{
    Energy, FactorStorage, LayerId, LayerReport, Ranks, Repair, Repaired, Seconds, Source, Texts,
};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::json;
use std::path::Path;
use tensor_io::{Checkpoint, Config, NoProgress};

/// A linear of a Llama, which stores every linear alone.
pub(crate) fn id(block: usize, linear: LinearName) -> LayerId {
    let half = if linear.is_attention() {
        "self_attn"
    } else {
        "mlp"
    };
    LayerId::parse(&format!("model.layers.{block}.{half}.{linear}")).unwrap()
}

/// Two blocks, grouped-query attention; widths are multiples of 4.
fn config(hidden: usize, intermediate: usize) -> Config {
    let fields = json!({
        "model_type": "llama", "hidden_size": hidden, "intermediate_size": intermediate,
        "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 50,
        "max_position_embeddings": 64, "tie_word_embeddings": true,
    });
    Config::new(fields.as_object().unwrap().clone())
}

/// A small model in f32.
pub(crate) fn tiny() -> TestModel {
    tiny_with(|_, tensor| tensor)
}

/// The same with tensors changed before they are written.
pub(crate) fn tiny_with(change: impl Fn(&str, Tensor) -> Tensor) -> TestModel {
    TestModel::with(&config(32, 64), DType::F32, change)
}

/// A model wide enough for the work on one linear to be divided among threads.
pub(crate) fn wide() -> TestModel {
    wide_with(|_, tensor| tensor)
}

/// The same with tensors changed before they are written.
pub(crate) fn wide_with(change: impl Fn(&str, Tensor) -> Tensor) -> TestModel {
    TestModel::with(&config(160, 400), DType::F32, change)
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
pub(crate) fn trained() -> (Checkpoint, Windows, Windows) {
    let model = shared_data::path!("models/stories260K");
    let text = shared_data::path!("data/text/tinystories_train_1MiB.txt");
    let tokenizer = TextTokenizer::open(model).unwrap();
    let tokens = tokenizer.encode_file(text).unwrap();
    let windows = Windows::cut(&tokens, 128, tokenizer.bos()).unwrap();
    let (calibration, rest) = (windows.first(32), windows.sample(windows.count(), 0));
    let held_out = rest.groups(32).nth(1).unwrap();
    (Checkpoint::open(model).unwrap(), calibration, held_out)
}

pub(crate) fn compressor(name: &str) -> Compressor {
    name.parse().unwrap()
}

/// EoRA of a rank, stored in f32.
pub(crate) fn eora(rank: usize) -> Repair {
    Repair::default()
        .with_ranks(Ranks::Constant(rank))
        .with_factors(FactorStorage::F32)
}

pub(crate) fn run(
    repair: &Repair,
    decoder: &Decoder<'_>,
    source: &dyn Source,
    folder: &Path,
) -> Repaired {
    let (calibration, held_out) = (windows(12, 1), windows(6, 2));
    let texts = Texts::new(&calibration).with_held_out(&held_out);
    repair
        .run(decoder, source, texts, folder, &NoProgress)
        .unwrap()
}

pub(crate) fn held_out(repaired: &Repaired) -> Energy {
    repaired
        .reports()
        .filter_map(|report| report.held_out)
        .sum()
}

pub(crate) fn assert_close(found: MatRef<'_, f64>, expected: MatRef<'_, f64>, tolerance: f64) {
    let difference = (found - expected).norm_l2();
    assert!(
        difference <= tolerance * expected.norm_l2(),
        "differ by {difference} of {}",
        expected.norm_l2()
    );
}

/// A report without its times.
pub(crate) fn timeless(report: &LayerReport) -> LayerReport {
    let mut report = report.clone();
    report.seconds = Seconds::default();
    report
}

/// A tensor `[rows, cols]` as a matrix.
pub(crate) fn from_tensor(tensor: &Tensor) -> Mat<f64> {
    let (rows, cols) = tensor.dims2().unwrap();
    let values = tensor.to_dtype(DType::F64).unwrap().flatten_all().unwrap();
    let values: Vec<f64> = values.to_vec1().unwrap();
    MatRef::from_row_major_slice(&values, rows, cols).to_owned()
}

/// A matrix as a tensor `[rows, cols]` of f32.
pub(crate) fn to_tensor(matrix: MatRef<'_, f64>) -> Tensor {
    let (rows, cols) = matrix.shape();
    let mut values = vec![0f64; rows * cols];
    MatMut::from_row_major_slice_mut(&mut values, rows, cols).copy_from(matrix);
    let tensor = Tensor::from_vec(values, (rows, cols), &Device::Cpu).unwrap();
    tensor.to_dtype(DType::F32).unwrap()
}
