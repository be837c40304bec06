//! What can go wrong when a decoder is read or run.

use std::path::PathBuf;

/// An error of this crate; every case names what was wrong and where.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The checkpoint itself could not be read.
    #[error(transparent)]
    Checkpoint(#[from] tensor_io::Error),
    /// Attention or its cache refused its input.
    #[error(transparent)]
    Cache(#[from] kv_lazy::Error),
    /// A tensor operation failed; after loading has checked every shape this points at the device.
    #[error("tensor operation failed")]
    Candle(#[from] candle_core::Error),
    /// `model_type` is not one of the supported architectures.
    #[error("model_type {found:?} is not supported (supported: {})", crate::config::model_types().collect::<Vec<_>>().join(", "))]
    UnsupportedModel {
        /// The `model_type` in the config.
        found: String,
    },
    /// A config field has a value that this crate does not implement.
    #[error("config field {field}: {value} is not supported ({supported})")]
    UnsupportedOption {
        /// The field's name.
        field: &'static str,
        /// Its value as written.
        value: String,
        /// What is supported instead.
        supported: &'static str,
    },
    /// Config fields that contradict each other or cannot be a model.
    #[error("config field {field}: {reason}")]
    InvalidConfig {
        /// The field's name.
        field: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// A tensor's shape is not the one that the config asks for.
    #[error("tensor {tensor}: shape {found:?}, but the config asks for {expected:?}")]
    Shape {
        /// The tensor's name.
        tensor: String,
        /// Its shape in the checkpoint.
        found: Vec<usize>,
        /// The shape the config implies.
        expected: Vec<usize>,
    },
    /// A tensor has more values than can be made at once.
    #[error(
        "tensor {tensor}: shape {shape:?} has more values than can be made at once, at most {most} and those that memory holds"
    )]
    TooLarge {
        /// The tensor's name.
        tensor: String,
        /// Its shape.
        shape: Vec<usize>,
        /// Most values of a tensor.
        most: usize,
    },
    /// The checkpoint holds a tensor that the architecture has no place for.
    #[error(
        "tensor {tensor} has no place in a {model_type} checkpoint; reading on would ignore it"
    )]
    UnexpectedTensor {
        /// The tensor's name.
        tensor: String,
        /// The `model_type` of the config.
        model_type: &'static str,
    },
    /// The linears of a folder are stored in a form that this crate does not read.
    #[error(
        "{path}: weights are stored as {found}; what can be read is dense floats, GGUF, GPTQ (checkpoint_format gptq or gptq_v2, 2, 3, 4 or 8 bits) and compressed-tensors (pack-quantized, sparse-24-bitmask or sparse-bitmask)",
        path = path.display()
    )]
    UnsupportedFormat {
        /// The folder.
        path: PathBuf,
        /// What its configuration says.
        found: String,
    },
    /// A weight cannot be multiplied in the form that it is stored in.
    #[error("tensor {tensor}: {source}")]
    Packed {
        /// The weight.
        tensor: String,
        /// Why not, with row and block where they are to blame.
        source: packed::Error,
    },
    /// Quantised weights are to be multiplied as they are where there is no kernel for them.
    #[error(
        "tensor {tensor} is stored as {stored}, which is multiplied in f32 on CPUs alone, not in {dtype} on {device:?}: decode it \
         first (a decoder without `packed`, or a folder of floats)",
        dtype = dtype.as_str()
    )]
    QuantisedWeights {
        /// The weight.
        tensor: String,
        /// What it is stored as.
        stored: String,
        /// The dtype that was asked for.
        dtype: candle_core::DType,
        /// The device that was asked for.
        device: candle_core::DeviceLocation,
    },
    /// An activation is NaN or infinite.
    #[error("activation is not finite after {stage} (window {window}, position {position})")]
    NonFinite {
        /// "layer 3", "the embedding", "the logits".
        stage: String,
        /// Index of the window in the set.
        window: usize,
        /// Position within the window.
        position: usize,
    },
    /// A token id outside the vocabulary.
    #[error("token id {token} is outside the vocabulary of {vocab} entries")]
    TokenOutOfRange {
        /// The id.
        token: u32,
        /// Number of embedding rows.
        vocab: usize,
    },
    /// A token needs more experts than there are, or than were loaded.
    #[error("{chosen} experts are needed, but there are {experts}")]
    Routing {
        /// Experts that are needed.
        chosen: usize,
        /// Experts that are there.
        experts: usize,
    },
    /// A linear term beside the experts of a layer cannot be there, or cannot be written.
    #[error("layer {layer}: the linear term B A beside its experts: {reason}")]
    LinearTerm {
        /// The layer.
        layer: usize,
        /// What is wrong with it.
        reason: String,
    },
    /// Router rows that share experts or stand for constants, where each has to be a stored expert.
    #[error(
        "layer {layer}: {what} takes a stored expert for each router row, but rows of this model share experts or stand for constants (per_layer_widths.expert_map); start from the model that it was made of"
    )]
    ExpertMap {
        /// The first layer with such rows.
        layer: usize,
        /// What cannot be done with them.
        what: &'static str,
    },
    /// The windows asked for cannot be cut from the text.
    #[error("{0}")]
    Windows(String),
    /// A text or tokenizer file could not be read or used.
    #[error("{path}: {reason}", path = path.display())]
    Text {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A sampling option has no meaning.
    #[error("sampling: {0}")]
    Sampling(String),
    /// The [`Progress`](crate::Progress) of a long call asked to stop.
    #[error(transparent)]
    Cancelled(#[from] tensor_io::Cancelled),
    /// A [`Tap`](crate::Tap) refused what it was handed.
    #[error("layer {layer}: {source}")]
    Tap {
        /// The block being run.
        layer: usize,
        /// The tap's own error.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// Result with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;
