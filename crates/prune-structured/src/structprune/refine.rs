//! Refinement of a plan, block by block, on activations that are already pruned.
//!
//! Scores, means and Gram matrices of a [`Calibration`](crate::Calibration) come from the dense
//! model. Here every block sees what the pruned blocks before it give, and its MLP sees its pruned
//! attention: o_proj is refitted on the heads that the plan keeps, then the MLP is narrowed to the
//! plan's width by alternation, which chooses its neurons anew. Widths stay those of the plan.
//!
//! In memory are one block and, of all windows, the hidden states and about five times an MLP's
//! activations.

use super::alternate::alternate;
use crate::compensation::{Alternating, Compensation, complement, refit};
use crate::output::Refits;
use crate::output::layout::kept_features;
use crate::plan::Plan;
use crate::stats::GramCollector;
use crate::{Error, Result};
use candle_core::{DType, Tensor};
use causal_lm::block::{Attention, Mlp};
use causal_lm::{
    Block, Decoder, Hidden, Linear, LinearName, NoTap, Progress, Site, Tap, TapResult, Windows,
};
use std::path::Path;

/// Refines `plan`, whose compensation is [`Compensation::Alternating`], on `windows`.
///
/// Returns the plan with the neurons that the alternation chose, and the weights, written to `dir`,
/// which must exist and outlive them. A step of `progress` is a block.
///
/// # Errors
/// [`Error::PlanMismatch`] for a plan of another model or another compensation,
/// [`Error::Singular`] for a refit without a solution, [`Error::Cancelled`], and what reading and running the model
/// report.
pub fn refine(
    decoder: &Decoder<'_>,
    windows: &Windows,
    plan: &Plan,
    dir: impl AsRef<Path>,
    progress: &dyn Progress,
) -> Result<(Plan, Refits)> {
    plan.check(decoder)?;
    let Compensation::Alternating(Alternating { rounds, ridge }) = plan.compensation else {
        return Err(Error::PlanMismatch(
            "its compensation is not the alternating refinement".into(),
        ));
    };
    let refits = Refits::new(dir.as_ref());
    let mut plan = plan.clone();
    progress.begin("refinement", decoder.config().layers() as u64);
    let mut hidden = Hidden::embed(decoder, windows)?;
    for layer in 0..decoder.config().layers() {
        let block = decoder.block(layer)?;
        decoder.release(layer);
        let mut weights: Vec<(String, Tensor)> = Vec::new();

        let (mut attention, mlp) = halves(&block);
        let kept = kept_features(decoder, &plan, layer, LinearName::O);
        if let Some(dense) = &block.attention
            && kept.len() < dense.o.weight.dims()[1]
        {
            let mut gram = GramTap::default();
            hidden.clone().advance(&attention, &mut gram)?;
            (attention.attention, attention.attention_constant) = match gram.gram {
                Some(gram) if !kept.is_empty() => {
                    let gram = gram.finish()?;
                    let narrow = narrowed(decoder, &plan, layer, dense, &gram, ridge)?;
                    weights.push((LinearName::O.to_string(), f32_of(&narrow.o)?));
                    (Some(narrow), None)
                }
                _ => (None, dense.o.bias.clone()),
            };
        }
        hidden.advance(&attention, &mut NoTap)?;

        let mut mlp = mlp;
        let keep = plan.layers[layer].neurons.len();
        if let Some(dense) = &block.mlp
            && keep < dense.down.weight.dims()[1]
        {
            (mlp.mlp, mlp.mlp_constant) = if keep == 0 {
                (None, dense.down.bias.clone())
            } else {
                let mut inputs = InputTap::default();
                hidden.clone().advance(&mlp, &mut inputs)?;
                let dense = in_f32(dense)?;
                let (ids, narrow) =
                    alternate(&dense, inputs.inputs, keep, rounds.max(1), ridge, layer)?;
                plan.layers[layer].neurons = ids;
                for (name, linear) in [
                    (LinearName::Gate, &narrow.gate),
                    (LinearName::Up, &narrow.up),
                    (LinearName::Down, &narrow.down),
                ] {
                    weights.push((name.to_string(), f32_of(linear)?));
                }
                (Some(in_dtype(&narrow, decoder.dtype())?), None)
            };
        }
        hidden.advance(&mlp, &mut NoTap)?;
        refits.save(layer, &weights)?;
        progress.advance(1)?;
    }
    Ok((plan, refits))
}

/// A block as two: one with its attention alone, one with its MLP alone.
fn halves(block: &Block) -> (Block, Block) {
    let attention = Block {
        mlp: None,
        mlp_constant: None,
        ..block.clone()
    };
    let mlp = Block {
        attention: None,
        attention_constant: None,
        ..block.clone()
    };
    (attention, mlp)
}

/// The heads that the plan keeps, o_proj refitted on them.
fn narrowed(
    decoder: &Decoder<'_>,
    plan: &Plan,
    layer: usize,
    dense: &Attention,
    gram: &Tensor,
    ridge: f64,
) -> Result<Attention> {
    let rows = |linear: &Linear, name| -> Result<Linear> {
        let ids = kept_features(decoder, plan, layer, name);
        let ids = Tensor::from_iter(ids.iter().map(|&id| id as u32), linear.weight.device())?;
        Ok(Linear {
            weight: linear.weight.index_select(&ids, 0)?,
            bias: linear
                .bias
                .as_ref()
                .map(|bias| bias.index_select(&ids, 0))
                .transpose()?,
        })
    };
    let kept = kept_features(decoder, plan, layer, LinearName::O);
    let weight = dense.o.weight.to_dtype(DType::F32)?;
    let removed = complement(&kept, weight.dims()[1]);
    let o = refit(&weight, gram, &kept, &removed, ridge, layer)?;
    Ok(Attention {
        q: rows(&dense.q, LinearName::Q)?,
        k: rows(&dense.k, LinearName::K)?,
        v: rows(&dense.v, LinearName::V)?,
        o: Linear {
            weight: o
                .to_device(dense.o.weight.device())?
                .to_dtype(dense.o.weight.dtype())?,
            bias: dense.o.bias.clone(),
        },
        ..dense.clone()
    })
}

fn f32_of(linear: &Linear) -> Result<Tensor> {
    Ok(linear.weight.to_dtype(DType::F32)?)
}

fn in_f32(mlp: &Mlp) -> Result<Mlp> {
    in_dtype(mlp, DType::F32)
}

fn in_dtype(mlp: &Mlp, dtype: DType) -> Result<Mlp> {
    let linear = |linear: &Linear| -> Result<Linear> {
        Ok(Linear {
            weight: linear.weight.to_dtype(dtype)?,
            bias: linear
                .bias
                .as_ref()
                .map(|bias| bias.to_dtype(dtype))
                .transpose()?,
        })
    };
    Ok(Mlp {
        gate: linear(&mlp.gate)?,
        up: linear(&mlp.up)?,
        down: linear(&mlp.down)?,
    })
}

/// Sums `XᵀX` of o_proj's input.
#[derive(Default)]
struct GramTap {
    gram: Option<GramCollector>,
}

impl Tap for GramTap {
    fn observe(&mut self, _layer: usize, site: Site, x: &Tensor) -> TapResult {
        if site == Site::O {
            let x = x.to_dtype(DType::F32)?;
            let gram = match &mut self.gram {
                Some(gram) => gram,
                None => (self.gram).insert(GramCollector::new(x.dims2()?.1, x.device())?),
            };
            gram.update(&x)?;
        }
        Ok(())
    }
}

/// Keeps the inputs of gate and up.
#[derive(Default)]
struct InputTap {
    inputs: Vec<Tensor>,
}

impl Tap for InputTap {
    fn observe(&mut self, _layer: usize, site: Site, x: &Tensor) -> TapResult {
        if site == Site::GateUp {
            self.inputs.push(x.to_dtype(DType::F32)?);
        }
        Ok(())
    }
}
