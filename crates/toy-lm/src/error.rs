//! What can go wrong when a model is made or trained.

/// An error of this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The model has something that training does not implement.
    #[error("training does not support {0}")]
    Unsupported(String),
    /// The model has no tensor of that name.
    #[error("the model has no tensor {0}")]
    MissingTensor(String),
    /// Initial values of a tensor have the wrong count.
    #[error("tensor {tensor}: {found} initial values for {expected} elements")]
    InitialValues {
        /// The tensor's name.
        tensor: String,
        /// Values that were given.
        found: usize,
        /// Elements of the tensor.
        expected: usize,
    },
    /// Sequences, positions and targets of a step do not fit together or the model.
    #[error("training batch: {0}")]
    Batch(String),
    /// An option has a value that makes no sense.
    #[error("{option}: {reason}")]
    Option {
        /// Field of the option struct.
        option: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// The tokenizer could not be trained, written or used.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    /// A config that is not a supported model.
    #[error(transparent)]
    Model(Box<causal_lm::Error>),
    /// The checkpoint cannot be written.
    #[error(transparent)]
    Checkpoint(Box<tensor_io::Error>),
    /// A tensor operation failed.
    #[error("tensor operation failed")]
    Candle(#[from] candle_core::Error),
    /// The [`Progress`](crate::Progress) of a long call asked to stop.
    #[error(transparent)]
    Cancelled(#[from] tensor_io::Cancelled),
}

/// Result with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

impl From<causal_lm::Error> for Error {
    fn from(error: causal_lm::Error) -> Self {
        Self::Model(Box::new(error))
    }
}

impl From<tensor_io::Error> for Error {
    fn from(error: tensor_io::Error) -> Self {
        Self::Checkpoint(Box::new(error))
    }
}
