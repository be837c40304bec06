//! What calibration keeps of a model's activations: enough to score, allocate and compensate
//! without running the model again.
//!
//! Only the inputs of o_proj and down_proj matter, because removing a unit removes columns there.
//! Everything is a sum over tokens. Gram matrices, which are as large as weights, go to files.

mod gram;
mod moments;

use crate::flap::compat::Fluctuation;
use causal_lm::LinearName;
pub(crate) use gram::GramCollector;
pub use gram::GramStore;
pub use moments::Moments;
use serde::{Deserialize, Serialize};

/// The two halves of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Part {
    /// Attention; its columns are the inputs of o_proj.
    Attention,
    /// MLP; its columns are the inputs of down_proj.
    Mlp,
}

impl Part {
    /// Both, in the order of the data.
    pub const ALL: [Self; 2] = [Self::Attention, Self::Mlp];

    /// The projection whose columns are pruned.
    pub fn output(self) -> LinearName {
        match self {
            Self::Attention => LinearName::O,
            Self::Mlp => LinearName::Down,
        }
    }
}

/// Statistics of one output projection (o_proj or down_proj) and its input.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ColumnStats {
    /// Mean and variance of each input feature over all tokens.
    pub moments: Moments,
    /// Windows seen.
    pub samples: u64,
    /// The reference's fluctuation, when asked for.
    pub fluctuation: Option<Fluctuation>,
    /// Σ over outputs of W², of each column.
    pub weight_square: Vec<f64>,
    /// Σ over outputs of |W|, of each column.
    pub weight_abs: Vec<f64>,
    /// Rows of the weight.
    pub outputs: usize,
}

/// Statistics of one block; `None` where it has no such half.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LayerStats {
    /// Of o_proj.
    pub attention: Option<ColumnStats>,
    /// Of down_proj.
    pub mlp: Option<ColumnStats>,
    /// Σ x² over the hidden states that the block puts out, all tokens.
    pub hidden_square: f64,
}

impl LayerStats {
    /// Statistics of one half.
    pub fn part(&self, part: Part) -> Option<&ColumnStats> {
        match part {
            Part::Attention => self.attention.as_ref(),
            Part::Mlp => self.mlp.as_ref(),
        }
    }
}
