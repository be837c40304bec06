//! What can go wrong in an evaluation.

use std::path::PathBuf;

/// An error of this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The model or its tokenizer could not be read or run.
    #[error(transparent)]
    Model(Box<causal_lm::Error>),
    /// A file of the checkpoint could not be read.
    #[error(transparent)]
    Checkpoint(Box<tensor_io::Error>),
    /// The window is longer than the model was made for, or too short to predict a token.
    #[error("a window of {window} positions, expected {least} to {most}")]
    Window {
        /// Positions asked for.
        window: usize,
        /// Fewest positions that leave a token to predict.
        least: usize,
        /// Positions of the model.
        most: usize,
    },
    /// A protocol that cannot be applied to a text or tokenizer.
    #[error("protocol {protocol}: {reason}")]
    Protocol {
        /// The protocol's name.
        protocol: &'static str,
        /// What is missing.
        reason: String,
    },
    /// A continuation that cannot be scored.
    #[error("item {item}, continuation {continuation}: {reason}")]
    Continuation {
        /// Index of the item.
        item: usize,
        /// Index of the continuation within it.
        continuation: usize,
        /// What is wrong with it.
        reason: String,
    },
    /// A long context that cannot be made, or whose answers cannot be scored.
    #[error("{0}")]
    LongContext(String),
    /// A file of questions that cannot be read, or that holds none.
    #[error("{}: {reason}", path.display())]
    TaskFile {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A line that is not a question of the layout of its file.
    #[error("{}:{line}: {reason}", path.display())]
    TaskLine {
        /// The file.
        path: PathBuf,
        /// Number of the line, from 1.
        line: usize,
        /// What is wrong with it.
        reason: String,
    },
    /// Examples for few-shot prompts that the file does not have.
    #[error("{}: {reason}", path.display())]
    Examples {
        /// The file that examples are taken from.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// No position is left for the prompt.
    #[error("{max_new_tokens} new tokens leave no room for a prompt in {positions} positions")]
    NoRoom {
        /// Tokens generated at most.
        max_new_tokens: usize,
        /// Positions of a sequence.
        positions: usize,
    },
    /// The [`Progress`](crate::Progress) of a long call asked to stop.
    #[error(transparent)]
    Cancelled(#[from] tensor_io::Cancelled),
}

impl From<causal_lm::Error> for Error {
    fn from(error: causal_lm::Error) -> Self {
        match error {
            causal_lm::Error::Cancelled(cancelled) => Self::Cancelled(cancelled),
            error => Self::Model(Box::new(error)),
        }
    }
}

impl From<tensor_io::Error> for Error {
    fn from(error: tensor_io::Error) -> Self {
        Self::Checkpoint(Box::new(error))
    }
}

impl From<candle_core::Error> for Error {
    fn from(error: candle_core::Error) -> Self {
        causal_lm::Error::from(error).into()
    }
}

/// Result with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;
