//! Building a supernet: one block after the other, every sublayer at all its levels.
//!
//! The inputs of both projections of a block come from one pass of the dense block over inputs
//! that carry the error of the blocks before; what carries on is set by [`Accumulation`]. Memory:
//! the hidden states of the calibration windows, twice under [`Accumulation::Mixture`], one block
//! at one width beside the dense one, and one sweep.

use super::options::{Accumulation, Options};
use super::space::Sublayer;
use crate::calibrate::Collector;
use crate::divergence::{Activations, Half, LevelStore};
use crate::obs::{Problem, Rounds, Units, sweep};
use crate::stats::{Part, gains};
use crate::{Collect, Error, Result};
use candle_core::Tensor;
use causal_lm::{Block, Decoder, Progress, Windows};
use rayon::prelude::*;

/// A supernet and what it is built from.
pub(crate) struct Supernet<'a> {
    pub(crate) decoder: &'a Decoder<'a>,
    pub(crate) windows: &'a Windows,
    pub(crate) space: &'a [Sublayer],
    pub(crate) options: &'a Options,
    pub(crate) ridge: f64,
    pub(crate) store: &'a LevelStore,
}

impl Supernet<'_> {
    /// Builds what is missing in the store; a step of `progress` is a block.
    pub(crate) fn build(&self, progress: &dyn Progress) -> Result<()> {
        let &Self {
            decoder,
            windows,
            space,
            options,
            ridge,
            store,
        } = self;
        let layers = decoder.config().layers();
        if (0..layers).try_fold(true, |all, layer| {
            Ok::<_, Error>(all && store.stats(layer)?.is_some())
        })? {
            return Ok(progress.advance(layers as u64)?);
        }
        let mut hidden = Activations::embed(decoder, windows)?;
        for layer in 0..layers {
            let block = decoder.block(layer)?;
            decoder.release(layer);
            let of_layer: Vec<&Sublayer> =
                space.iter().filter(|s| s.ranking.layer == layer).collect();
            let mut dense = None;
            if store.stats(layer)?.is_none() {
                let collect = Collect {
                    gram: Some(store.gram()),
                    ..Collect::default()
                };
                let mut collector = Collector::new(&block, windows.window_len(), &collect)?;
                let outputs = hidden.observed(&block, &mut collector)?;
                let stats = collector.finish(layer, collect.gram.as_ref(), &outputs)?;
                dense = Some(outputs);
                for sublayer in &of_layer {
                    prune(&block, sublayer, options, ridge, store)?;
                }
                store.finish(layer, &stats)?;
            }
            if layer + 1 < layers {
                hidden.batches = match (options.accumulation, dense) {
                    (Accumulation::Dense, Some(dense)) => dense,
                    (Accumulation::Dense, None) => hidden.through(&block)?,
                    (Accumulation::Centre, _) => {
                        hidden.through(&at_level(decoder, &block, &of_layer, 0, store)?)?
                    }
                    (Accumulation::Mixture, _) => {
                        mixture(decoder, &hidden, &block, &of_layer, store)?
                    }
                };
            }
            progress.advance(1)?;
        }
        Ok(())
    }
}

/// Sweeps a sublayer through its levels and stores them.
fn prune(
    block: &Block,
    sublayer: &Sublayer,
    options: &Options,
    ridge: f64,
    store: &LevelStore,
) -> Result<()> {
    let ranking = &sublayer.ranking;
    let (linear, after) = match ranking.part {
        Part::Attention => {
            let half = &block.attention;
            (half.attention().map(|a| &a.o), &half.after)
        }
        Part::Mlp => {
            let half = &block.mlp;
            (half.body.as_ref().map(|m| &m.down), &half.after)
        }
    };
    // The space has sublayers that exist.
    let Some(linear) = linear else { return Ok(()) };
    let gram = store.gram().load(ranking.layer, ranking.part)?;
    let problem = Problem::new(&linear.weight()?, &gram, ridge, ranking.layer)?;
    let problem = problem.with_gains(after.as_ref().map(gains).transpose()?)?;
    drop(gram);
    let columns = problem.columns();
    let units = Units::of(ranking, columns);
    let rounds = options.rounds.unwrap_or(Rounds::suggested(columns));
    let swept = sweep(problem, &units, rounds, &sublayer.widths())?;
    store.save(ranking, &swept.levels)
}

/// The block with both halves at a level, or the nearest one there is.
fn at_level(
    decoder: &Decoder<'_>,
    block: &Block,
    sublayers: &[&Sublayer],
    level: i8,
    store: &LevelStore,
) -> Result<Block> {
    let mut pruned = block.clone();
    for sublayer in sublayers {
        let kept = store.load(&sublayer.ranking, sublayer.nearest(level))?;
        let widths = decoder.config().widths[block.layer];
        Half::new(block, widths, &sublayer.ranking, kept)?.place(&mut pruned);
    }
    Ok(pruned)
}

/// Σ_e w_e X_e over the levels, w_e = (1 − S_e) / Σ (1 − S_e), S_e being the sparsity of the block.
fn mixture(
    decoder: &Decoder<'_>,
    hidden: &Activations,
    block: &Block,
    sublayers: &[&Sublayer],
    store: &LevelStore,
) -> Result<Vec<Tensor>> {
    let reach = sublayers.first().map_or(0, |s| s.reach);
    // Levels beyond what a sublayer has are its nearest, so several may be the same block.
    let mut levels: Vec<(Vec<usize>, i8, f64)> = Vec::new();
    for level in -reach..=reach {
        let widths: Vec<usize> = sublayers.iter().map(|s| s.nearest(level)).collect();
        let costs = sublayers.iter().zip(&widths);
        let kept: u64 = costs.map(|(s, &w)| s.ranking.cost(w)).sum();
        match levels.iter_mut().find(|(seen, ..)| *seen == widths) {
            Some((.., share)) => *share += kept as f64,
            None => levels.push((widths, level, kept as f64)),
        }
    }
    let total: f64 = levels.iter().map(|(.., share)| share).sum();
    if total == 0.0 {
        return hidden.through(&at_level(decoder, block, sublayers, 0, store)?);
    }
    let mut sum: Option<Vec<Tensor>> = None;
    for (_, level, share) in levels {
        let pruned = at_level(decoder, block, sublayers, level, store)?;
        let weight = share / total;
        let add = |(i, batch): (usize, Tensor)| -> Result<Tensor> {
            let scaled = (batch * weight)?;
            Ok(match &sum {
                Some(sum) => (&sum[i] + scaled)?,
                None => scaled,
            })
        };
        let outputs = hidden.through(&pruned)?;
        sum = Some(
            outputs
                .into_par_iter()
                .enumerate()
                .map(add)
                .collect::<Result<_>>()?,
        );
    }
    Ok(sum.unwrap_or_else(|| hidden.batches.clone()))
}
