//! What can go wrong when a model is compressed or repaired.

/// An error of this crate; every case names what was wrong and where.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The model could not be read or run.
    #[error(transparent)]
    Model(#[from] causal_lm::Error),
    /// A checkpoint or statistics file could not be read or written.
    #[error(transparent)]
    Checkpoint(#[from] tensor_io::Error),
    /// A tensor operation failed.
    #[error("tensor operation failed")]
    Candle(#[from] candle_core::Error),
    /// A compressor's name that cannot be read.
    #[error("compressor `{name}`: {reason}; {expected}", expected = crate::compress::GRAMMAR)]
    CompressorName {
        /// The name given.
        name: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A compressor whose parameters do not go together, or do not fit the weight.
    #[error("compressor `{compressor}`: {reason}")]
    Compressor {
        /// Its name.
        compressor: String,
        /// What does not fit.
        reason: String,
    },
    /// A compressor was given less about the inputs than it needs.
    #[error("compressor `{compressor}` needs {needs}")]
    NeedsInputs {
        /// Its name.
        compressor: String,
        /// What it needs.
        needs: &'static str,
    },
    /// A matrix or vector of the wrong size.
    #[error("{what}: expected {expected:?}, found {found:?}")]
    Size {
        /// The matrix.
        what: &'static str,
        /// Rows and columns expected.
        expected: (usize, usize),
        /// Rows and columns found.
        found: (usize, usize),
    },
    /// NaN or an infinity.
    #[error("{what}: {value} at row {row}, column {column}")]
    NotFinite {
        /// The matrix.
        what: &'static str,
        /// Row, counted from 0.
        row: usize,
        /// Column, counted from 0.
        column: usize,
        /// The value found.
        value: f64,
    },
    /// Weights stored in a form that cannot be read.
    #[error(
        "{}: weights are stored as {found}; what can be read is dense floats, GPTQ (checkpoint_format gptq or gptq_v2, 2, 3, 4 or 8 bits) and compressed-tensors (pack-quantized, sparse-24-bitmask or sparse-bitmask)",
        path.display()
    )]
    UnsupportedFormat {
        /// The checkpoint.
        path: std::path::PathBuf,
        /// What it says of itself.
        found: String,
    },
    /// A tensor of a compressed weight does not fit the others.
    #[error("tensor `{tensor}`: {reason}")]
    StoredTensor {
        /// The tensor.
        tensor: String,
        /// What does not fit.
        reason: String,
    },
    /// A quantised weight that a format cannot hold.
    #[error("`{module}` cannot be stored as {format}: {reason}")]
    NotStorable {
        /// The linear.
        module: String,
        /// The format.
        format: &'static str,
        /// Why, and what to do.
        reason: String,
    },
    /// A matrix that no inputs can have as their X Xᵀ.
    #[error("not a Gram matrix X Xᵀ: {reason}")]
    NotGram {
        /// What shows it.
        reason: String,
    },
}

/// Result with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;
