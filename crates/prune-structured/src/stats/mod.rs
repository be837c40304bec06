//! What calibration keeps of a model's activations: enough to score, allocate and compensate
//! without running the model again.
//!
//! Only the inputs of o_proj and down_proj matter, because removing a unit removes columns there.
//! Everything is a sum over tokens. Gram matrices, which are as large as weights, go to files.

pub(crate) mod fluctuation;
mod gram;
mod moments;
mod standardise;

use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use causal_lm::block::Norm;
use causal_lm::{Decoder, LinearName};
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

/// The output projection of one half of a block, as the checkpoint stores it, `[outputs, columns]` f32.
///
/// # Errors
/// When the block has no such half, and what reading the tensor reports.
pub(crate) fn output_weight(decoder: &Decoder<'_>, layer: usize, part: Part) -> Result<Tensor> {
    let names = decoder.config().names;
    let module = names.module_of(part.output()).ok_or(Error::Missing {
        layer,
        what: "an output projection",
        need: "the architecture has none",
    })?;
    let name = names.weight(layer, module);
    Ok(decoder
        .checkpoint()
        .tensor_as(&name, DType::F32, &Device::Cpu)?)
}

/// Weights of the norm after one half of a block, one for each output; `None` where there is no such norm.
///
/// # Errors
/// What reading the tensor reports.
pub(crate) fn output_gains(
    decoder: &Decoder<'_>,
    layer: usize,
    part: Part,
) -> Result<Option<Vec<f64>>> {
    let table = decoder.config().names.table();
    let path = match part {
        Part::Attention => table.attention_after,
        Part::Mlp => table.mlp_after,
    };
    let norm = decoder.block_norm(layer, path)?;
    norm.map(|norm| gains(&norm)).transpose()
}

/// The weights of a norm.
pub(crate) fn gains(norm: &Norm) -> Result<Vec<f64>> {
    let weight = norm.weight.to_dtype(DType::F64)?.to_device(&Device::Cpu)?;
    Ok(weight.to_vec1()?)
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
    /// Σ over outputs of (γ W)², of each column; γ is the weight of the norm after the sublayer, 1 where there is none.
    pub weight_square: Vec<f64>,
    /// Σ over outputs of |γ W|, of each column.
    pub weight_abs: Vec<f64>,
    /// Σ over outputs of W², of each column, when the fluctuation is collected: the published implementation knows no
    /// norm after a sublayer.
    #[serde(default)]
    pub plain_square: Option<Vec<f64>>,
    /// Mean of the squared outputs before a norm after the sublayer; `None` without such a norm.
    #[serde(default)]
    pub output_square: Option<f64>,
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
