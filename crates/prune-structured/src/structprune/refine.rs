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
use crate::divergence::narrowed_attention;
use crate::output::Refits;
use crate::output::layout::kept_of;
use crate::plan::Plan;
use crate::stats::GramCollector;
use crate::{Error, Result};
use candle_core::{DType, Tensor};
use causal_lm::block::{Mlp, TokenMixer};
use causal_lm::config::Activation;
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
/// [`Error::PlanMismatch`] for a plan of another model or another compensation, [`Error::Unsupported`] for MLPs that the
/// scheme does not cover,
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
    check(decoder)?;
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

        let (mut attention, mut mlp) = halves(&block);
        if let Some(dense) = block.attention.attention()
            && plan.layers[layer].heads.len() < dense.heads()
        {
            let half = &mut attention.attention;
            let kept = kept_of(decoder, &plan, layer, LinearName::O);
            let mut tap = GramTap::default();
            hidden.clone().advance(&mlpless(&block), &mut tap)?;
            (half.body, half.constant) = match tap.gram {
                Some(gram) if !kept.is_empty() => {
                    let gram = gram.finish()?;
                    let weight = dense.o.weight()?.to_dtype(DType::F32)?;
                    let removed = complement(&kept, weight.dims()[1]);
                    let o = refit(&weight, &gram, &kept, &removed, ridge, layer)?;
                    let narrow = narrowed_attention(dense, &plan.layers[layer], o)?;
                    weights.push((LinearName::O.to_string(), f32_of(&narrow.o)?));
                    (Some(TokenMixer::Attention(narrow)), None)
                }
                _ => (None, dense.o.bias().cloned()),
            };
        }
        hidden.advance(&attention, &mut NoTap)?;

        let keep = plan.layers[layer].neurons.len();
        if let Some(dense) = &block.mlp.body
            && keep < dense.down.inputs()
        {
            let narrow = match keep {
                0 => (None, dense.down.bias().cloned()),
                _ => {
                    let mut inputs = InputTap::default();
                    hidden.clone().advance(&mlp, &mut inputs)?;
                    let dense = in_dtype(dense, DType::F32)?;
                    let (ids, narrow) =
                        alternate(&dense, inputs.inputs, keep, (rounds.max(1), ridge), layer)?;
                    plan.layers[layer].neurons = ids;
                    let gate = narrow.gate.iter().map(|gate| (LinearName::Gate, gate));
                    let others = [
                        (LinearName::Up, &narrow.up),
                        (LinearName::Down, &narrow.down),
                    ];
                    for (name, linear) in gate.chain(others) {
                        weights.push((name.to_string(), linear.weight()?));
                    }
                    (Some(in_dtype(&narrow, decoder.dtype())?), None)
                }
            };
            (mlp.mlp.body, mlp.mlp.constant) = narrow;
        }
        hidden.advance(&mlp, &mut NoTap)?;
        refits.save(layer, &weights)?;
        progress.advance(1)?;
    }
    Ok((plan, refits))
}

/// Whether the scheme covers a model: it moves the activations of gated SiLU MLPs that read pruned attention.
fn check(decoder: &Decoder<'_>) -> Result<()> {
    let config = decoder.config();
    let reason = match config {
        _ if config.activation != Activation::Silu || !config.gated_mlp => {
            "it is derived for MLPs with a gate and SiLU"
        }
        _ if config.parallel => "attention and MLP read the same input",
        _ if config.layer_scalar => "a factor multiplies the output of each block",
        _ => return Ok(()),
    };
    Err(Error::Unsupported {
        method: "alternating refinement",
        model_type: config.model_type,
        reason,
    })
}

/// A block as two: one with its attention alone, one with its MLP alone.
fn halves(block: &Block) -> (Block, Block) {
    let mut mlp = block.clone();
    (mlp.attention.body, mlp.attention.constant) = (None, None);
    (mlpless(block), mlp)
}

/// A block with its attention alone.
fn mlpless(block: &Block) -> Block {
    let mut attention = block.clone();
    (attention.mlp.body, attention.mlp.constant) = (None, None);
    attention
}

fn f32_of(linear: &Linear) -> Result<Tensor> {
    Ok(linear.weight()?.to_dtype(DType::F32)?)
}

fn in_dtype(mlp: &Mlp, dtype: DType) -> Result<Mlp> {
    let linear = |linear: &Linear| -> Result<Linear> {
        let bias = linear.bias().map(|bias| bias.to_dtype(dtype));
        let weight = linear.weight()?.to_dtype(dtype)?;
        Ok(Linear::new(weight, bias.transpose()?))
    };
    Ok(Mlp {
        gate: mlp.gate.as_ref().map(linear).transpose()?,
        up: linear(&mlp.up)?,
        down: linear(&mlp.down)?,
        activation: mlp.activation,
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
