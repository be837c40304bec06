//! Inference that computes only with the block of `W_hh` a mask leaves.
//!
//! Hidden neurons can be renumbered without changing the function. Sources that still drive somebody come first and targets
//! that are still driven lie together, so that the recurrent product of a step becomes one small dense product:
//! `gates * targets * sources` instead of `gates * n * n` multiplications. A scattered mask (magnitude, random) leaves no
//! empty rows or columns and gains nothing; a neuron-level mask leaves k² of n².

use super::{
    input::Input,
    model::{Rnn, Role},
    packed::{Extent, Packed, PackedLayer},
    tape::{State, Tape},
};
use crate::{
    error::Result,
    mask::MaskSet,
    params::{Param, ParamSet},
};

/// A network laid out for inference: renumbered so that the recurrent products run on the blocks its masks leave, and with
/// its matrices transposed once. Without masks it is the fastest form of the dense network.
#[derive(Debug, Clone)]
pub struct CompactRnn {
    rnn: Rnn,
    packed: Packed,
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
            extents.push(Extent {
                sources: only_source + both,
                targets: only_source..only_source + both + only_target,
            });
            order.push(numbers);
        }
        let rnn = renumber(&masked, &order)?;
        let mut packed = Packed::default();
        packed.fill(&rnn, Some(&extents));
        Ok(Self { rnn, packed, order })
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
        let dense = (0..self.order.len())
            .map(|l| self.rnn.layer(l).w_hh.len())
            .sum();
        (
            self.packed.layers.iter().map(PackedLayer::products).sum(),
            dense,
        )
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
        tape.forward_packed(&self.rnn, &self.packed, input, steps, state)
    }

    /// As [`Tape::read_out`].
    pub fn read_out(&self, tape: &Tape, rows: Option<&[usize]>, logits: &mut Vec<f32>) {
        tape.read_out_packed(&self.rnn, &self.packed, rows, logits);
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
