//! What can go wrong when a model is compressed or repaired.

use std::path::PathBuf;

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
    /// The call was cancelled by its [`Progress`](tensor_io::Progress). What was saved before is kept.
    #[error(transparent)]
    Cancelled(#[from] tensor_io::Cancelled),
    /// Rounding to, or reading, blocks of a GGUF file failed.
    #[error(transparent)]
    Blocks(#[from] packed::Error),
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
    /// A matrix, vector or tensor of the wrong shape.
    #[error("{what} has shape {found:?}, expected {expected:?}")]
    Shape {
        /// Which.
        what: &'static str,
        /// Its shape.
        found: Vec<usize>,
        /// The shape that fits.
        expected: Vec<usize>,
    },
    /// A rank that no correction of this layer can have.
    #[error("rank {rank}: a layer of {rows} × {cols} takes ranks from 1 to {}", rows.min(cols))]
    Rank {
        /// What was asked for.
        rank: usize,
        /// Outputs of the layer.
        rows: usize,
        /// Inputs of the layer.
        cols: usize,
    },
    /// An activation is NaN or infinite.
    #[error("activation of token {token}, channel {channel} is {value}")]
    Activation {
        /// Token of the batch.
        token: usize,
        /// Input channel.
        channel: usize,
        /// NaN or an infinity.
        value: f64,
    },
    /// A setting outside its range.
    #[error("{name} is {value}, expected {expected}")]
    Setting {
        /// The setting.
        name: &'static str,
        /// Its value.
        value: String,
        /// What it may be.
        expected: &'static str,
    },
    /// No method has this name.
    #[error("unknown method {name:?}, expected one of {}", expected.join(", "))]
    UnknownMethod {
        /// What was asked for.
        name: String,
        /// The names there are.
        expected: &'static [&'static str],
    },
    /// A method needs a statistic that was not collected.
    #[error("{method} needs {statistic}, which was not collected")]
    MissingStatistic {
        /// The method.
        method: &'static str,
        /// What it needs.
        statistic: &'static str,
    },
    /// A factorisation did not succeed.
    #[error("{what}: {source}")]
    Factorization {
        /// The factorisation and its matrix, and what to do where there is something.
        what: &'static str,
        /// Why.
        source: linalg::Error,
    },
    /// A budget below what the smallest allowed ranks need.
    #[error("a budget of {budget} bytes: the smallest allowed ranks alone take {needed} bytes")]
    Budget {
        /// The budget.
        budget: u64,
        /// What the minima need.
        needed: u64,
    },
    /// A statistics file holds something else than expected.
    #[error("{}: {reason}", path.display())]
    StatisticsFile {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// Something went wrong with one linear.
    #[error("{layer}: {source}")]
    Layer {
        /// The linear.
        layer: String,
        /// What went wrong.
        source: Box<Error>,
    },
    /// The compressed model differs from the dense one in more than its linears.
    #[error("tensor {tensor} of the compressed model is not that of the dense one: {reason}")]
    OtherTensor {
        /// The tensor.
        tensor: String,
        /// How it differs.
        reason: String,
    },
    /// A folder holds the state of another run.
    #[error("{}: this is another run, with {difference}; use another folder", folder.display())]
    OtherRun {
        /// The folder.
        folder: PathBuf,
        /// What was run otherwise: "ranks {\"constant\":2} instead of {\"constant\":3}".
        difference: String,
    },
    /// A file or folder of a repair, an adapter or a probe that does not hold what it should.
    #[error("{}: {reason}", path.display())]
    Malformed {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
}

/// Result with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;
