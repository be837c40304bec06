//! What a network reads.

use serde::{Deserialize, Serialize};

/// What the network reads at each step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum InputKind {
    /// Symbols, one-hot: a step reads a column of `W_ih`.
    OneHot {
        /// Number of symbols.
        vocab: usize,
    },
    /// Symbols through an embedding.
    Embedding {
        /// Number of symbols.
        vocab: usize,
        /// Width of the embedding.
        dim: usize,
    },
    /// Vectors.
    Dense {
        /// Their width.
        dim: usize,
    },
}

impl InputKind {
    /// Width of the first layer's input.
    pub fn width(self) -> usize {
        match self {
            InputKind::OneHot { vocab } => vocab,
            InputKind::Embedding { dim, .. } | InputKind::Dense { dim } => dim,
        }
    }

    /// Number of symbols, for symbol inputs.
    pub fn vocab(self) -> Option<usize> {
        match self {
            InputKind::OneHot { vocab } | InputKind::Embedding { vocab, .. } => Some(vocab),
            InputKind::Dense { .. } => None,
        }
    }
}

/// Input of all steps, time-major.
#[cfg(feature = "train")]
#[derive(Debug, Clone, Copy)]
pub enum Input<'a> {
    /// `[steps * batch]`
    Symbols(&'a [u32]),
    /// `[steps * batch * dim]`
    Vectors(&'a [f32]),
}
