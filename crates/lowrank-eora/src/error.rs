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
}

/// Result with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;
