//! One call from weights to masks, for the lattice methods and for every control.
//!
//! A method scores neurons, weights or nothing; a rule and an exact budget turn that into masks. [`prune`] does so for a
//! network, [`prune_layers`] for any recurrent matrices, [`rank_neurons`] stops at the ranking, for removing whole neurons.

mod config;
mod masks;
mod method;
mod report;
mod score;

pub use config::{Compete, LatticeConfig, PruneConfig, Scope};
pub use masks::LayerMask;
pub use method::Method;
pub use report::{LayerReport, PruneReport, Sparsity, sparsity};
pub use score::{Scores, influence_of, neuron_scores};

use crate::{
    cell::{Cell, GateLayout},
    error::{Error, Result, check_finite, check_sparsity},
    mask::{Mask, MaskSet},
    rnn::{Rnn, Role},
};
use candle_core::Tensor;
use masks::Ranked;
use std::time::Instant;

/// The matrices of one layer in PyTorch layout.
#[derive(Debug, Clone, Copy)]
pub struct LayerWeights<'a> {
    /// Recurrent weights `[gates * H, H]`.
    pub w_hh: &'a [f32],
    /// Input weights `[gates * H, width]`, where they are known.
    pub w_ih: Option<&'a [f32]>,
    /// Top-down feedback from the layer above `[gates * H, H_above]`, where the network has it.
    pub feedback: Option<&'a [f32]>,
    /// Hidden size H.
    pub hidden: usize,
}

/// The matrices of a network's layers.
pub fn layers_of(rnn: &Rnn) -> Vec<LayerWeights<'_>> {
    (0..rnn.config().hidden.len())
        .map(|l| {
            let layer = rnn.layer(l);
            LayerWeights {
                w_hh: layer.w_hh,
                w_ih: Some(layer.w_ih),
                feedback: None,
                hidden: layer.hidden,
            }
        })
        .collect()
}

fn check(layers: &[LayerWeights<'_>], cell: Cell, config: &PruneConfig) -> Result<()> {
    check_sparsity(config.sparsity)?;
    for (l, layer) in layers.iter().enumerate() {
        let rows = cell.gates() * layer.hidden;
        let wrong = |name: &str, cols: &str, len: usize| Error::Shape {
            tensor: format!("{name} of layer {l}"),
            expected: format!("[{rows}, {cols}]"),
            found: vec![len],
        };
        if layer.w_hh.is_empty() || layer.w_hh.len() != rows * layer.hidden {
            return Err(wrong("W_hh", &layer.hidden.to_string(), layer.w_hh.len()));
        }
        check_finite(&format!("W_hh of layer {l}"), layer.w_hh)?;
        if let Some(w) = layer.w_ih {
            let below = l.checked_sub(1).map(|b| layers[b].hidden);
            if w.is_empty() || w.len() % rows != 0 || below.is_some_and(|b| w.len() != rows * b) {
                return Err(wrong(
                    "W_ih",
                    &below.map_or("inputs".into(), |b| b.to_string()),
                    w.len(),
                ));
            }
            check_finite(&format!("W_ih of layer {l}"), w)?;
        } else if config.scope.input() {
            return Err(Error::MissingTensor {
                name: format!("W_ih of layer {l}"),
            });
        }
    }
    Ok(())
}

/// Masks for the layers of any recurrent network, with the scores behind them where the method ranks neurons.
///
/// # Errors
/// Sizes that do not fit the cell, weights that are not finite, a sparsity outside `[0, 1)`, a degenerate order, settings
/// that exclude each other.
pub fn prune_layers(
    layers: &[LayerWeights<'_>],
    cell: Cell,
    config: &PruneConfig,
) -> Result<(Vec<LayerMask>, Option<Scores>)> {
    check(layers, cell, config)?;
    let scores = config
        .method
        .ranks_neurons()
        .then(|| neuron_scores(&influence_of(layers, cell, &config.lattice)?, config))
        .transpose()?;
    let ranked = scores.as_ref().map(|s| Ranked::new(s, layers));
    let matrices = masks::in_scope(layers, cell, config);
    let mut kept = masks::masks(&matrices, ranked.as_ref(), config)?.into_iter();
    let per_layer = layers
        .iter()
        .map(|l| LayerMask {
            recurrent: if config.scope.recurrent() {
                kept.next()
            } else {
                None
            },
            input: if config.scope.input() && l.w_ih.is_some() {
                kept.next()
            } else {
                None
            },
        })
        .collect();
    Ok((per_layer, scores))
}

/// The mask of a single recurrent matrix as a framework stores it, in the same layout (1 keeps, 0 prunes; f32).
///
/// # Errors
/// Those of [`prune_layers`], and a shape that does not fit cell and layout.
pub fn prune_matrix(
    w_hh: &Tensor,
    cell: Cell,
    layout: GateLayout,
    config: &PruneConfig,
) -> Result<Tensor> {
    let mut w = layout.to_canonical("W_hh", w_hh, cell)?;
    if w.cols != w.hidden {
        return Err(Error::Shape {
            tensor: "W_hh".into(),
            expected: format!(
                "[{} * H, H] for {cell} (or its transpose for Keras)",
                cell.gates()
            ),
            found: w_hh.dims().to_vec(),
        });
    }
    let layer = LayerWeights {
        w_hh: &w.data,
        w_ih: None,
        feedback: None,
        hidden: w.hidden,
    };
    let (masks, _) = prune_layers(&[layer], cell, config)?;
    let keep = masks[0]
        .recurrent
        .as_ref()
        .ok_or_else(|| Error::MissingTensor {
            name: "W_ih".into(),
        })?;
    let bit = |e: usize| f32::from(u8::from(keep.get(e / w.cols, e % w.cols)));
    w.data = (0..w.data.len()).map(bit).collect();
    Ok(layout.from_canonical(&w, cell)?.reshape(w_hh.dims())?)
}

/// Masks of a network's weights by name, with a report. The weights are not changed.
///
/// # Errors
/// Those of [`prune_layers`].
pub fn prune(rnn: &Rnn, config: &PruneConfig) -> Result<(MaskSet, PruneReport)> {
    let layers = layers_of(rnn);
    let cell = rnn.config().cell;
    let start = Instant::now();
    let (kept, scores) = prune_layers(&layers, cell, config)?;
    let seconds = start.elapsed().as_secs_f64();
    let mut set = MaskSet::default();
    let mut reports = Vec::new();
    for (l, mask) in kept.into_iter().enumerate() {
        let mut pruned = layers[l].w_hh.to_vec();
        for (role, keep) in [
            (Role::RecurrentWeight(l), mask.recurrent),
            (Role::InputWeight(l), mask.input),
        ] {
            let (Some(keep), Some(name)) = (keep, rnn.name_of(role)) else {
                continue;
            };
            let mask = Mask::of_matrix(keep);
            if role == Role::RecurrentWeight(l) {
                mask.apply(&mut pruned);
            }
            if mask.pruned() > 0 {
                set.insert(name, mask);
            }
        }
        reports.push(report::layer_report(&layers[l], &pruned, cell, config)?);
    }
    let report = PruneReport {
        config: config.clone(),
        sparsity: sparsity(rnn, &set),
        layers: reports,
        cuts: scores.map(|s| s.cuts).unwrap_or_default(),
        seconds,
    };
    Ok((set, report))
}

/// For each layer, which neurons to keep so that `W_hh` shrinks by `config.sparsity`: the best `round(n sqrt(1 - s))`,
/// at least one. For [`hard_remove`](crate::mask::hard_remove).
///
/// # Errors
/// A method that ranks no neurons, a sparsity outside `[0, 1)`, a degenerate order.
pub fn rank_neurons(rnn: &Rnn, config: &PruneConfig) -> Result<Vec<Vec<bool>>> {
    let layers = layers_of(rnn);
    check(&layers, rnn.config().cell, config)?;
    let scores = neuron_scores(
        &influence_of(&layers, rnn.config().cell, &config.lattice)?,
        config,
    )?;
    let mut start = 0;
    Ok(layers
        .iter()
        .map(|layer| {
            let n = layer.hidden;
            let count = ((n as f64 * (1.0 - config.sparsity).sqrt()).round() as usize).clamp(1, n);
            let mut keep = vec![false; n];
            scores.ranking(start..start + n)[..count]
                .iter()
                .for_each(|&x| keep[x] = true);
            start += n;
            keep
        })
        .collect())
}
