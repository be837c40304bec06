//! What a pruning run did, as data.

use super::{LayerWeights, PruneConfig, layers_of};
use crate::{
    cell::Cell,
    error::Result,
    influence::{Aggregate, Influence},
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
    sparsity_between(rnn, rnn, masks, within)
}

/// What a network lacks of the weights of the one that it was made from: those under its masks, and those of neurons that are
/// gone. Shares are of the entries of `from` that exist.
pub fn sparsity_between(
    from: &Rnn,
    rnn: &Rnn,
    masks: &MaskSet,
    within: Option<&MaskSet>,
) -> Sparsity {
    // Entries that exist, and those that are kept.
    let (mut hh, mut ih, mut all) = ((0, 0), (0, 0), (0, 0));
    let pairs = from.params().iter().zip(rnn.params().iter());
    for (role, (whole, p)) in from.roles().into_iter().zip(pairs) {
        let pruned = |masks: &MaskSet, name: &str| masks.get(name).map_or(0, |m| m.pruned());
        let exist = whole.data.len() - within.map_or(0, |w| pruned(w, &whole.name));
        let kept = p.data.len() - pruned(masks, &p.name);
        let add = |sum: &mut (usize, usize)| {
            sum.0 += exist;
            sum.1 += kept;
        };
        add(&mut all);
        match role {
            Role::RecurrentWeight(_) => add(&mut hh),
            Role::InputWeight(_) => add(&mut ih),
            _ => {}
        }
    }
    let share =
        |(exist, kept): (usize, usize)| exist.saturating_sub(kept) as f64 / exist.max(1) as f64;
    Sparsity {
        recurrent: share(hh),
        recurrent_and_input: share((hh.0 + ih.0, hh.1 + ih.1)),
        total: share(all),
    }
}

/// The recurrent connections of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Recurrence {
    /// Neurons with neither incoming nor outgoing recurrent connections (their own memory aside).
    pub dead: usize,
    /// Spectral radius of the influence matrix.
    pub spectral_radius: f64,
}

/// The recurrent connections of every layer of a network as it is.
///
/// # Errors
/// Weights that are not finite.
pub fn recurrence_of(rnn: &Rnn, how: Aggregate) -> Result<Vec<Recurrence>> {
    let gates = rnn.config().cell.gates();
    layers_of(rnn)
        .iter()
        .map(|l| recurrence(l.w_hh, gates, l.hidden, how))
        .collect()
}

fn recurrence(w_hh: &[f32], gates: usize, n: usize, how: Aggregate) -> Result<Recurrence> {
    let block = n * n;
    let alive = |x: usize| {
        (0..gates).any(|g| {
            (0..n).any(|y| {
                y != x && (w_hh[g * block + x * n + y] != 0.0 || w_hh[g * block + y * n + x] != 0.0)
            })
        })
    };
    Ok(Recurrence {
        dead: (0..n).filter(|&x| !alive(x)).count(),
        spectral_radius: Influence::from_gates(w_hh, gates, n, how)?.spectral_radius(),
    })
}

/// A layer before (`layer`) and after (`w_hh`) pruning.
pub(super) fn layer_report(
    layer: &LayerWeights<'_>,
    w_hh: &[f32],
    cell: Cell,
    config: &PruneConfig,
) -> Result<LayerReport> {
    let (n, gates, how) = (layer.hidden, cell.gates(), config.lattice.aggregate);
    let before = Influence::from_gates(layer.w_hh, gates, n, how)?;
    let after = recurrence(w_hh, gates, n, how)?;
    let block = n * n;
    Ok(LayerReport {
        gates: w_hh
            .chunks_exact(block)
            .map(|g| g.iter().filter(|w| **w == 0.0).count() as f64 / block as f64)
            .collect(),
        dead: after.dead,
        spectral_radius_before: before.spectral_radius(),
        spectral_radius: after.spectral_radius,
    })
}
