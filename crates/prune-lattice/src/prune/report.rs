//! What a pruning run did, as data.

use super::{LayerWeights, PruneConfig};
use crate::{
    cell::Cell,
    error::Result,
    influence::Influence,
    mask::MaskSet,
    order::CutReport,
    rnn::{Rnn, Role},
};
use serde::{Deserialize, Serialize};

/// Share of weights removed, over three denominators.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Sparsity {
    /// Of all `W_hh`.
    pub recurrent: f64,
    /// Of all `W_hh` and `W_ih`.
    pub recurrent_and_input: f64,
    /// Of all parameters, embedding, biases and read-out included.
    pub total: f64,
}

/// One layer after pruning.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LayerReport {
    /// Sparsity of each gate of `W_hh`, in PyTorch's order.
    pub gates: Vec<f64>,
    /// Neurons with neither incoming nor outgoing recurrent connections (their own memory aside).
    pub dead: usize,
    /// Spectral radius of the layer's influence matrix before pruning.
    pub spectral_radius_before: f64,
    /// And after.
    pub spectral_radius: f64,
}

/// What a pruning run did.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PruneReport {
    /// What was asked for.
    pub config: PruneConfig,
    /// What was reached.
    pub sparsity: Sparsity,
    /// Layer by layer.
    pub layers: Vec<LayerReport>,
    /// The orders behind a lattice method, cut by cut.
    pub cuts: Vec<CutReport>,
    /// Wall-clock time of scoring and choosing.
    pub seconds: f64,
}

/// The three sparsities of a network under masks.
pub fn sparsity(rnn: &Rnn, masks: &MaskSet) -> Sparsity {
    sparsity_within(rnn, masks, None)
}

/// The same as shares of the entries that exist; the masks lie within them.
pub fn sparsity_within(rnn: &Rnn, masks: &MaskSet, within: Option<&MaskSet>) -> Sparsity {
    let (mut hh, mut ih, mut all) = ((0, 0), (0, 0), (0, 0));
    for (role, p) in rnn.roles().into_iter().zip(rnn.params().iter()) {
        let absent = within
            .and_then(|w| w.get(&p.name))
            .map_or(0, |m| m.pruned());
        let pruned = masks.get(&p.name).map_or(0, |m| m.pruned());
        let add = |sum: &mut (usize, usize)| {
            sum.0 += pruned.saturating_sub(absent);
            sum.1 += p.data.len() - absent;
        };
        add(&mut all);
        match role {
            Role::RecurrentWeight(_) => add(&mut hh),
            Role::InputWeight(_) => add(&mut ih),
            _ => {}
        }
    }
    let share = |(pruned, len): (usize, usize)| pruned as f64 / len.max(1) as f64;
    Sparsity {
        recurrent: share(hh),
        recurrent_and_input: share((hh.0 + ih.0, hh.1 + ih.1)),
        total: share(all),
    }
}

/// A layer before (`layer`) and after (`w_hh`) pruning.
pub(super) fn layer_report(
    layer: &LayerWeights<'_>,
    w_hh: &[f32],
    cell: Cell,
    config: &PruneConfig,
) -> Result<LayerReport> {
    let (n, gates) = (layer.hidden, cell.gates());
    let how = config.lattice.aggregate;
    let before = Influence::from_gates(layer.w_hh, gates, n, how)?;
    let after = Influence::from_gates(w_hh, gates, n, how)?;
    let block = n * n;
    let alive = |x: usize| {
        (0..gates).any(|g| {
            (0..n).any(|y| {
                y != x && (w_hh[g * block + x * n + y] != 0.0 || w_hh[g * block + y * n + x] != 0.0)
            })
        })
    };
    Ok(LayerReport {
        gates: w_hh
            .chunks_exact(block)
            .map(|g| g.iter().filter(|w| **w == 0.0).count() as f64 / block as f64)
            .collect(),
        dead: (0..n).filter(|&x| !alive(x)).count(),
        spectral_radius_before: before.spectral_radius(),
        spectral_radius: after.spectral_radius(),
    })
}
