//! A loaded block at other widths.

use super::levels::Kept;
use crate::Result;
use crate::plan::LayerPlan;
use crate::ranking::Ranking;
use crate::stats::Part;
use candle_core::Tensor;
use causal_lm::block::{Attention, Mlp};
use causal_lm::{Block, Linear, Widths};

/// One half of a block at a width.
#[derive(Clone, Debug)]
pub(crate) enum Half {
    /// Attention, or what a block without it adds.
    Attention(Option<Attention>, Option<Tensor>),
    /// The MLP, or what a block without it adds.
    Mlp(Option<Mlp>, Option<Tensor>),
}

impl Half {
    /// The half of `block` that `ranking` is about, at the width `kept`.
    pub(crate) fn new(block: &Block, dense: Widths, ranking: &Ranking, kept: Kept) -> Result<Self> {
        let mut plan = LayerPlan {
            heads: vec![],
            kv_heads: vec![],
            neurons: vec![],
        };
        let weight = match kept {
            Kept::Dense => return Ok(Self::of(block, ranking.part)),
            Kept::Gone => None,
            Kept::Some { units, weight } => {
                plan.keep(dense, ranking, units);
                Some(weight)
            }
        };
        let output = |linear: &Linear, weight: Tensor| -> Result<Linear> {
            Ok(Linear {
                weight: weight
                    .to_dtype(linear.weight.dtype())?
                    .to_device(linear.weight.device())?,
                bias: linear.bias.clone(),
            })
        };
        Ok(match (ranking.part, &block.attention, &block.mlp) {
            (Part::Attention, Some(attention), _) => match weight {
                None => Self::Attention(None, attention.o.bias.clone()),
                Some(weight) => {
                    let d = attention.head_dim;
                    let new = Attention {
                        q: rows(&attention.q, &plan.heads, d)?,
                        k: rows(&attention.k, &plan.kv_heads, d)?,
                        v: rows(&attention.v, &plan.kv_heads, d)?,
                        o: output(&attention.o, weight)?,
                        ..attention.clone()
                    };
                    Self::Attention(Some(new), None)
                }
            },
            (Part::Mlp, _, Some(mlp)) => match weight {
                None => Self::Mlp(None, mlp.down.bias.clone()),
                Some(weight) => {
                    let new = Mlp {
                        gate: rows(&mlp.gate, &plan.neurons, 1)?,
                        up: rows(&mlp.up, &plan.neurons, 1)?,
                        down: output(&mlp.down, weight)?,
                    };
                    Self::Mlp(Some(new), None)
                }
            },
            // A ranking is made for halves that exist.
            (part, ..) => Self::of(block, part),
        })
    }

    /// A half as it is.
    fn of(block: &Block, part: Part) -> Self {
        match part {
            Part::Attention => {
                Self::Attention(block.attention.clone(), block.attention_constant.clone())
            }
            Part::Mlp => Self::Mlp(block.mlp.clone(), block.mlp_constant.clone()),
        }
    }

    /// Puts it into a block.
    pub(crate) fn place(&self, block: &mut Block) {
        match self.clone() {
            Self::Attention(attention, constant) => {
                (block.attention, block.attention_constant) = (attention, constant);
            }
            Self::Mlp(mlp, constant) => (block.mlp, block.mlp_constant) = (mlp, constant),
        }
    }
}

/// The rows of `units` units of `width` rows each.
fn rows(linear: &Linear, units: &[usize], width: usize) -> Result<Linear> {
    let ids = units
        .iter()
        .flat_map(|unit| unit * width..(unit + 1) * width)
        .map(|row| row as u32);
    let ids = Tensor::from_iter(ids, linear.weight.device())?;
    Ok(Linear {
        weight: linear.weight.index_select(&ids, 0)?,
        bias: linear
            .bias
            .as_ref()
            .map(|bias| bias.index_select(&ids, 0))
            .transpose()?,
    })
}
