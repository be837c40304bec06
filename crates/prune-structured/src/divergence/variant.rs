//! A loaded block at other widths.

use super::levels::Kept;
use crate::Result;
use crate::plan::LayerPlan;
use crate::ranking::Ranking;
use crate::stats::Part;
use candle_core::{Device, Tensor};
use causal_lm::block::{self, Attention, Mlp, TokenMixer};
use causal_lm::{Block, Linear, LinearName, Widths};

/// One half of a block, dense or at another width.
#[derive(Clone, Debug)]
pub enum Half {
    /// Attention.
    Attention(Box<block::Half<TokenMixer>>),
    /// The MLP.
    Mlp(block::Half<Mlp>),
    /// The expert that every token passes through, beside the other experts of a block.
    SharedExpert(Mlp),
}

impl Half {
    /// The half of `block` that `ranking` is about, at the width `kept`.
    ///
    /// # Errors
    /// What candle reports, also for units that the half does not have.
    pub fn new(block: &Block, dense: Widths, ranking: &Ranking, kept: Kept) -> Result<Self> {
        let mut plan = LayerPlan {
            heads: vec![],
            kv_heads: vec![],
            neurons: vec![],
        };
        let weight = match kept {
            Kept::Dense => None,
            Kept::Gone => Some(None),
            Kept::Some { units, weight } => {
                plan.keep(dense, ranking, units);
                Some(Some(weight))
            }
        };
        Ok(match ranking.part {
            Part::Attention => {
                let mut half = block.attention.clone();
                if let (Some(weight), Some(dense)) = (weight, block.attention.attention()) {
                    match weight {
                        Some(weight) => {
                            let narrow = narrowed_attention(dense, &plan, weight)?;
                            half.body = Some(TokenMixer::Attention(narrow));
                        }
                        None => (half.body, half.constant) = (None, dense.o.bias().cloned()),
                    }
                }
                Self::Attention(Box::new(half))
            }
            Part::Mlp => {
                let mut half = block.mlp.clone();
                if let (Some(weight), Some(dense)) = (weight, half.body.take()) {
                    match weight {
                        Some(weight) => half.body = Some(narrowed_mlp(&dense, &plan, weight)?),
                        None => half.constant = dense.down.bias().cloned(),
                    }
                } else {
                    half.body = block.mlp.body.clone();
                }
                Self::Mlp(half)
            }
        })
    }

    /// One of its linears; `None` where it has no such linear.
    pub fn linear_mut(&mut self, name: LinearName) -> Option<&mut Linear> {
        match self {
            Self::Attention(half) => half.body.as_mut()?.linear_mut(name),
            Self::SharedExpert(mlp) => match name {
                LinearName::SharedGate => mlp.gate.as_mut(),
                LinearName::SharedUp => Some(&mut mlp.up),
                LinearName::SharedDown => Some(&mut mlp.down),
                _ => None,
            },
            Self::Mlp(half) => {
                let mlp = half.body.as_mut()?;
                match name {
                    LinearName::Gate => mlp.gate.as_mut(),
                    LinearName::Up => Some(&mut mlp.up),
                    LinearName::Down => Some(&mut mlp.down),
                    _ => None,
                }
            }
        }
    }

    /// Puts it into a block.
    pub fn place(&self, block: &mut Block) {
        match self.clone() {
            Self::Attention(half) => block.attention = *half,
            Self::Mlp(half) => block.mlp = half,
            Self::SharedExpert(mlp) => {
                if let Some(shared) = block.experts.as_mut().and_then(|e| e.shared.as_mut()) {
                    shared.mlp = mlp;
                }
            }
        }
    }
}

/// The heads that a plan keeps, with a weight of o_proj for their columns.
pub(crate) fn narrowed_attention(
    dense: &Attention,
    plan: &LayerPlan,
    weight: Tensor,
) -> Result<Attention> {
    let d = dense.head_dim;
    // A gate has as many rows as its query.
    let per_query = dense.q.outputs() / dense.heads();
    Ok(Attention {
        q: rows(&dense.q, &plan.heads, per_query)?,
        k: rows(&dense.k, &plan.kv_heads, d)?,
        v: dense
            .v
            .as_ref()
            .map(|v| rows(v, &plan.kv_heads, d))
            .transpose()?,
        o: output(&dense.o, weight)?,
        ..dense.clone()
    })
}

fn narrowed_mlp(dense: &Mlp, plan: &LayerPlan, weight: Tensor) -> Result<Mlp> {
    let neurons = |linear: &Linear| rows(linear, &plan.neurons, 1);
    Ok(Mlp {
        gate: dense.gate.as_ref().map(neurons).transpose()?,
        up: neurons(&dense.up)?,
        down: output(&dense.down, weight)?,
        activation: dense.activation,
    })
}

/// A projection with another weight, in its dtype and on its device.
fn output(linear: &Linear, weight: Tensor) -> Result<Linear> {
    let dense = linear.weight()?;
    let weight = weight.to_dtype(dense.dtype())?.to_device(dense.device())?;
    Ok(Linear::new(weight, linear.bias().cloned()))
}

/// The rows of `units` units of `width` rows each.
fn rows(linear: &Linear, units: &[usize], width: usize) -> Result<Linear> {
    let ids = units
        .iter()
        .flat_map(|unit| unit * width..(unit + 1) * width)
        .map(|row| row as u32);
    let ids: Vec<u32> = ids.collect();
    Ok(linear.select(&Tensor::new(ids, &Device::Cpu)?)?)
}
