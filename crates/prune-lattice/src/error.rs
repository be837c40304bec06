//! The one error type of the crate: every case names the tensor, file, value or name at fault and what was expected.

use std::path::PathBuf;

/// What can go wrong.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A tensor has another shape than its role asks for.
    #[error("{tensor}: expected shape {expected}, found {found:?}")]
    Shape {
        /// Name or role of the tensor.
        tensor: String,
        /// The shape asked for, in words.
        expected: String,
        /// The shape found.
        found: Vec<usize>,
    },
    /// A weight or an input is NaN or infinite.
    #[error("{tensor}: {value} at flat index {index}; weights and inputs must be finite")]
    NonFinite {
        /// Name or role of the tensor.
        tensor: String,
        /// Flat (row-major) index of the first such value.
        index: usize,
        /// The value.
        value: f32,
    },
    /// A sparsity outside `[0, 1)`.
    #[error("sparsity {0} is outside [0, 1)")]
    Sparsity(f64),
    /// The order does not tell neurons apart, so pruning by it would be pruning by something else.
    #[error(
        "degenerate order: {classes} classes on {neurons} neurons, the largest with {largest}, {irreducible} neurons irreducible; \
         lower the mean out-degree of the cut or use the context mode"
    )]
    DegenerateOrder {
        /// Number of neurons.
        neurons: usize,
        /// Number of classes (strongly connected components, or distinct rows in context mode).
        classes: usize,
        /// Size of the largest class.
        largest: usize,
        /// Number of neurons with a positive verdict.
        irreducible: usize,
    },
    /// A name (method, cell, gate layout, task, ...) that is not known.
    #[error("unknown {kind} `{name}`; expected one of {expected}")]
    UnknownName {
        /// What the name should denote.
        kind: &'static str,
        /// The name given.
        name: String,
        /// The names that are known.
        expected: String,
    },
    /// A tensor that the model needs is not in the checkpoint.
    #[error("tensor `{name}` is missing")]
    MissingTensor {
        /// Its name.
        name: String,
    },
    /// A mask that should consist of whole blocks keeps a part of one.
    #[error(
        "{tensor}: the {}x{} block at row {}, column {} keeps {kept} of {of} entries; whole blocks are expected",
        block.0, block.1, at.0, at.1
    )]
    PartialBlock {
        /// Name of the matrix.
        tensor: String,
        /// Rows and columns of a block.
        block: (usize, usize),
        /// First row and column of the block.
        at: (usize, usize),
        /// Entries kept.
        kept: usize,
        /// Entries of the block that lie inside the matrix.
        of: usize,
    },
    /// A setting that cannot be carried out.
    #[error("{setting}: {reason}")]
    Setting {
        /// The setting at fault.
        setting: &'static str,
        /// Why.
        reason: String,
    },
    /// A data file whose content is not what its format asks for.
    #[error("{}: {reason}", file.display())]
    Data {
        /// The file.
        file: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A tensor that should be overwritten is also read by another part of its file, which would change with it.
    #[error("{}: `{tensor}` is also read by {reader}, which would change with it", file.display())]
    SharedTensor {
        /// The file.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// Who else reads it.
        reader: String,
    },
    /// A safetensors file cannot be read or written, or is malformed.
    #[error(transparent)]
    Tensors(#[from] tensor_io::Error),
    /// Reading or writing another file failed.
    #[error("{}: {source}", file.display())]
    Io {
        /// The file.
        file: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// The training loss left the finite numbers.
    #[error("training diverged: loss {loss} in epoch {epoch}; lower the learning rate")]
    Diverged {
        /// Epoch, counted from 0.
        epoch: usize,
        /// The loss.
        loss: f64,
    },
    /// A least-squares problem has no solution: the moments are not those of any states.
    #[error("{what}: {reason}")]
    LeastSquares {
        /// The matrix or states that were to be solved for.
        what: String,
        /// What went wrong.
        reason: String,
    },
    /// The caller's [`Progress`](tensor_io::Progress) cancelled the call.
    #[error(transparent)]
    Cancelled(#[from] tensor_io::Cancelled),
    /// An error from candle.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}

/// Shorthand.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Checks that a sparsity lies in `[0, 1)`.
pub(crate) fn check_sparsity(sparsity: f64) -> Result<()> {
    if (0.0..1.0).contains(&sparsity) {
        Ok(())
    } else {
        Err(Error::Sparsity(sparsity))
    }
}

/// Checks that every value is finite.
pub(crate) fn check_finite(tensor: &str, values: &[f32]) -> Result<()> {
    match values.iter().position(|v| !v.is_finite()) {
        None => Ok(()),
        Some(index) => Err(Error::NonFinite {
            tensor: tensor.to_owned(),
            index,
            value: values[index],
        }),
    }
}
