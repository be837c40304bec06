//! What pruning is worth in time: the dense network, the one that computes on the block its mask leaves, and the one whose
//! neurons are removed. A mask alone makes nothing faster.

use crate::{
    error::{Error, Result},
    mask::{MaskSet, hard_remove},
    prune::{PruneConfig, prune, rank_neurons},
    rnn::{BlockRnn, BlockWork, CompactRnn, Input, Rnn, State, Tape},
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

/// Steps per second of one sequence by the block kernels, one thread.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BlockSpeed {
    /// Sparsity of `W_hh` asked for.
    pub sparsity: f64,
    /// All weights, in f32.
    pub dense: f64,
    /// The blocks that are kept, in f32.
    pub floats: f64,
    /// The same with weights and states of 8 bits.
    pub integers: f64,
    /// Bytes of the matrices that a step of each reads.
    pub bytes: [usize; 3],
}

/// Measures single steps of a method that keeps whole blocks, about `seconds` for each of the three networks.
///
/// # Errors
/// A method without blocks, or blocks without a kernel; a sparsity outside `[0, 1)`.
pub fn measure_blocks(rnn: &Rnn, config: &PruneConfig, seconds: f64) -> Result<BlockSpeed> {
    let block = config.method.block().ok_or_else(|| Error::Setting {
        setting: "method",
        reason: format!("{} does not keep whole blocks", config.method),
    })?;
    let (masks, _) = prune(rnn, config)?;
    let floats = BlockRnn::new(rnn, &masks, block)?;
    let networks = [
        BlockRnn::new(rnn, &MaskSet::default(), block)?,
        floats.clone(),
        floats.quantised(),
    ];
    let vectors = vec![0.5; rnn.config().input.width()];
    let input = match rnn.config().input.vocab() {
        Some(_) => Input::Symbols(&[0]),
        None => Input::Vectors(&vectors),
    };
    const STEPS: usize = 64;
    let mut rates = [0.0; 3];
    for (rate_of, network) in rates.iter_mut().zip(&networks) {
        let (mut state, mut work) = (State::zeros(rnn, 1), BlockWork::new());
        *rate_of = rate(STEPS, 1, seconds, || {
            (0..STEPS).try_for_each(|_| network.step(input, &mut state, &mut work))
        })?;
    }
    let [dense, floats, integers] = rates;
    Ok(BlockSpeed {
        sparsity: config.sparsity,
        dense,
        floats,
        integers,
        bytes: networks.each_ref().map(BlockRnn::bytes),
    })
}
