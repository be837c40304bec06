//! What calibration keeps of a model's activations: enough to score, allocate and compensate
//! without running the model again.
//!
//! Only the inputs of o_proj and down_proj matter, because removing a unit removes columns there.
//! Everything is a sum over tokens. Gram matrices, which are as large as weights, go to files.

pub(crate) mod fluctuation;
mod gram;
mod moments;
mod standardise;

use causal_lm::LinearName;
pub use fluctuation::Fluctuation;
pub(crate) use gram::GramCollector;
pub use gram::GramStore;
pub use moments::Moments;
use serde::{Deserialize, Serialize};
pub use standardise::standardise;

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

    /// Its name in file names.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Attention => "attention",
            Self::Mlp => "mlp",
        }
    }

    /// The projection whose columns are pruned.
    pub fn output(self) -> LinearName {
        match self {
            Self::Attention => LinearName::O,
            Self::Mlp => LinearName::Down,
        }
    }
}

/// Statistics that a method reads beside moments and weight norms.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Needs {
    /// FLAP's fluctuation as its published implementation computes it.
    pub fluctuation: bool,
    /// Gram matrices of the inputs.
    pub gram: bool,
}

impl std::ops::BitOr for Needs {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self {
            fluctuation: self.fluctuation || other.fluctuation,
            gram: self.gram || other.gram,
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
    /// The fluctuation of FLAP's published implementation, when asked for.
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
