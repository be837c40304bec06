//! Inference that computes only with the block of `W_hh` a mask leaves.
//!
//! Hidden neurons can be renumbered without changing the function. Sources that still drive somebody come first and targets
//! that are still driven lie together, so that the recurrent product of a step becomes one small dense product:
//! `gates * targets * sources` instead of `gates * n * n` multiplications. A scattered mask (magnitude, random) leaves no
//! empty rows or columns and gains nothing; a neuron-level mask leaves k² of n².

use super::{
    gemm::{Store, View, gemm},
    model::{Rnn, Role},
    tape::{Input, State, Tape},
};
use crate::{
    cell::Cell,
    error::Result,
    mask::MaskSet,
    params::{Param, ParamSet},
};
use std::ops::Range;

/// The nonzero block of a renumbered `W_hh`: sources `0..sources`, targets in `targets`, the same for all gates.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Block {
    sources: usize,
    targets: Range<usize>,
    /// `[gates * targets, sources]`
    weights: Vec<f32>,
}

impl Block {
    /// Adds the recurrent product of one step to the pre-activations (a GRU's candidate part to `aux`).
    pub(super) fn product(
        &self,
        cell: Cell,
        h: usize,
        before: &[f32],
        gates: &mut [f32],
        aux: &mut [f32],
        scratch: &mut Vec<f32>,
    ) {
        let width = self.targets.len();
        if width == 0 || self.sources == 0 {
            return;
        }
        let (batch, rows) = (before.len() / h, cell.gates() * width);
        let state = View::strided(before, batch, self.sources, h);
        scratch.resize(batch * rows, 0.0);
        gemm(
            scratch,
            rows,
            Store::Replace,
            state,
            View::new(&self.weights, rows, self.sources).t(),
        );
        let gh = cell.gates() * h;
        for (b, product) in scratch.chunks_exact(rows).enumerate() {
            for (g, part) in product.chunks_exact(width).enumerate() {
                let to = match (cell, g) {
                    (Cell::Gru, 2) => &mut aux[b * h..],
                    _ => &mut gates[b * gh + g * h..],
                };
                to[self.targets.clone()]
                    .iter_mut()
                    .zip(part)
                    .for_each(|(t, p)| *t += p);
            }
        }
    }
}

/// A network renumbered so that the recurrent products run on the blocks its masks leave.
#[derive(Debug, Clone)]
pub struct CompactRnn {
    rnn: Rnn,
    blocks: Vec<Block>,
    order: Vec<Vec<usize>>,
}

impl CompactRnn {
    /// From a network and its masks; the weights are taken masked.
    ///
    /// # Errors
    /// The masks do not fit the network.
    pub fn new(rnn: &Rnn, masks: &MaskSet) -> Result<Self> {
        let mut masked = rnn.clone();
        masks.apply(masked.params_mut())?;
        let cell = rnn.config().cell;
        let mut order = Vec::new();
        let mut extents = Vec::new();
        for l in 0..rnn.config().hidden.len() {
            let layer = masked.layer(l);
            let n = layer.hidden;
            let live = |i: usize, j: usize| {
                (0..cell.gates()).any(|g| layer.w_hh[(g * n + i) * n + j] != 0.0)
            };
            let source: Vec<bool> = (0..n).map(|j| (0..n).any(|i| live(i, j))).collect();
            let target: Vec<bool> = (0..n).map(|i| (0..n).any(|j| live(i, j))).collect();
            // Only source, both, only target, neither.
            let class = |x: usize| match (source[x], target[x]) {
                (true, false) => 0,
                (true, true) => 1,
                (false, true) => 2,
                (false, false) => 3,
            };
            let mut numbers: Vec<usize> = (0..n).collect();
            numbers.sort_by_key(|&x| class(x));
            let count = |c: usize| (0..n).filter(|&x| class(x) == c).count();
            let (only_source, both, only_target) = (count(0), count(1), count(2));
            extents.push((
                only_source + both,
                only_source..only_source + both + only_target,
            ));
            order.push(numbers);
        }
        let rnn = renumber(&masked, &order)?;
        let blocks = extents
            .into_iter()
            .enumerate()
            .map(|(l, (sources, targets))| {
                let layer = rnn.layer(l);
                let n = layer.hidden;
                let rows = (0..cell.gates()).flat_map(|g| targets.clone().map(move |i| g * n + i));
                let weights = rows
                    .flat_map(|r| &layer.w_hh[r * n..r * n + sources])
                    .copied()
                    .collect();
                Block {
                    sources,
                    targets,
                    weights,
                }
            })
            .collect();
        Ok(Self { rnn, blocks, order })
    }

    /// The renumbered network (masked weights, the same function).
    pub fn network(&self) -> &Rnn {
        &self.rnn
    }

    /// For each layer, the original number of the neuron in each place.
    pub fn order(&self) -> &[Vec<usize>] {
        &self.order
    }

    /// Multiplications of the recurrent products of one step, and what the dense ones cost.
    pub fn recurrent_products(&self) -> (usize, usize) {
        let dense = (0..self.blocks.len())
            .map(|l| self.rnn.layer(l).w_hh.len())
            .sum();
        (self.blocks.iter().map(|b| b.weights.len()).sum(), dense)
    }

    /// As [`Tape::forward`]; states are in the renumbered order.
    ///
    /// # Errors
    /// Those of [`Tape::forward`].
    pub fn forward(
        &self,
        tape: &mut Tape,
        input: Input<'_>,
        steps: usize,
        state: &mut State,
    ) -> Result<()> {
        tape.forward_blocks(&self.rnn, Some(&self.blocks), input, steps, state)
    }
}

/// The same network with neuron `order[l][k]` of layer `l` in place `k`.
fn renumber(rnn: &Rnn, order: &[Vec<usize>]) -> Result<Rnn> {
    let gates = rnn.config().cell.gates();
    let rows_of = |l: usize| -> Vec<usize> {
        let n = order[l].len();
        (0..gates)
            .flat_map(|g| order[l].iter().map(move |&x| g * n + x))
            .collect()
    };
    let params = rnn
        .roles()
        .into_iter()
        .zip(rnn.params().iter())
        .map(|(role, p)| {
            let same = |n: usize| (0..n).collect::<Vec<usize>>();
            let width = p.shape.get(1).copied().unwrap_or(1);
            let (rows, cols) = match role {
                Role::Embedding | Role::OutputBias => (same(p.shape[0]), same(width)),
                Role::InputWeight(0) => (rows_of(0), same(width)),
                Role::InputWeight(l) => (rows_of(l), order[l - 1].clone()),
                Role::RecurrentWeight(l) => (rows_of(l), order[l].clone()),
                Role::Bias(l) => (rows_of(l), vec![0]),
                Role::CandidateBias(l) => (order[l].clone(), vec![0]),
                Role::OutputWeight => (same(p.shape[0]), order[order.len() - 1].clone()),
            };
            let data = rows
                .iter()
                .flat_map(|&r| cols.iter().map(move |&c| p.data[r * width + c]))
                .collect();
            Param {
                name: p.name.clone(),
                shape: p.shape.clone(),
                data,
            }
        })
        .collect();
    Rnn::from_params(rnn.config().clone(), ParamSet::new(params))
}
