//! What pruning is worth in time: the dense network, the one that computes on the block its mask leaves, and the one whose
//! neurons are removed. A mask alone makes nothing faster.

use crate::{
    error::Result,
    mask::{MaskSet, hard_remove},
    prune::{PruneConfig, prune, rank_neurons},
    rnn::{CompactRnn, Input, Rnn, State, Tape},
};
use serde::{Deserialize, Serialize};
use std::time::Instant;

/// Steps per second (all sequences of a batch together), one thread.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SpeedRow {
    /// Sequences side by side.
    pub batch: usize,
    /// Sparsity of `W_hh` asked for.
    pub sparsity: f64,
    /// The dense network.
    pub dense: f64,
    /// The same network under a mask of `W_hh`, computing on the block left.
    pub compact: f64,
    /// The network without the neurons that are not kept: another function than `compact`, and smaller everywhere.
    pub removed: f64,
    /// Multiplications of a recurrent step: dense and on the block.
    pub products: (usize, usize),
    /// Parameters: dense, under the mask, and after removal.
    pub params: (usize, usize, usize),
}

/// Runs `forward` on `steps` steps again and again for about `seconds` and returns the best rate of a run.
fn rate(
    steps: usize,
    batch: usize,
    seconds: f64,
    mut forward: impl FnMut() -> Result<()>,
) -> Result<f64> {
    forward()?;
    let (start, mut best) = (Instant::now(), f64::INFINITY);
    while start.elapsed().as_secs_f64() < seconds {
        let run = Instant::now();
        forward()?;
        best = best.min(run.elapsed().as_secs_f64());
    }
    Ok((steps * batch) as f64 / best)
}

/// Measures single steps (as in generation: a call per step, read-out included) for a method that ranks neurons, about
/// `seconds` for each of the three networks.
///
/// # Errors
/// A method that ranks no neurons, a degenerate order, a sparsity outside `[0, 1)`.
pub fn measure_speed(
    rnn: &Rnn,
    config: &PruneConfig,
    batch: usize,
    seconds: f64,
) -> Result<SpeedRow> {
    let keep = rank_neurons(rnn, config)?;
    let (masks, _) = prune(rnn, config)?;
    let compact = CompactRnn::new(rnn, &masks)?;
    let removed = hard_remove(rnn, &keep)?;
    let vocab = rnn.config().input.vocab();
    let symbols: Vec<u32> = (0..batch as u32)
        .map(|b| b % vocab.unwrap_or(1) as u32)
        .collect();
    let vectors = vec![0.5; batch * rnn.config().input.width()];
    let input = || {
        if vocab.is_some() {
            Input::Symbols(&symbols)
        } else {
            Input::Vectors(&vectors)
        }
    };
    const STEPS: usize = 64;
    let measure = |network: &CompactRnn| {
        let mut state = State::zeros(network.network(), batch);
        let (mut tape, mut logits) = (Tape::new(), Vec::new());
        rate(STEPS, batch, seconds, || {
            for _ in 0..STEPS {
                network.forward(&mut tape, input(), 1, &mut state)?;
                network.read_out(&tape, None, &mut logits);
            }
            Ok(())
        })
    };
    let whole = |network: &Rnn| CompactRnn::new(network, &MaskSet::default());
    let (block, dense_products) = compact.recurrent_products();
    let count = rnn.params().count();
    Ok(SpeedRow {
        batch,
        sparsity: config.sparsity,
        dense: measure(&whole(rnn)?)?,
        compact: measure(&compact)?,
        removed: measure(&whole(&removed)?)?,
        products: (dense_products, block),
        params: (count, count - masks.pruned(), removed.params().count()),
    })
}
