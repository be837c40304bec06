//! One call from weights to masks, for the lattice methods and for every control.
//!
//! A method scores neurons, weights or nothing; a rule and an exact budget turn that into masks. [`prune`] does so for a
//! network, [`prune_layers`] for any recurrent matrices, [`rank_neurons`] stops at the ranking, for removing whole neurons.

mod config;
mod masks;
mod method;
mod products;
mod report;
mod score;
mod span;

pub use config::{Compete, LatticeConfig, PruneConfig, Scope};
pub use masks::LayerMask;
pub use method::Method;
pub use report::{
    LayerReport, PruneReport, Recurrence, Sparsity, recurrence_of, sparsity, sparsity_between,
    sparsity_within,
};
pub use score::{Scores, influence_of, neuron_scores};

use crate::{
    calibration::{Calibration, Moments},
    cell::{Cell, GateLayout},
    error::{Error, Result, check_finite, check_sparsity},
    mask::{Mask, MaskSet},
    rnn::{Rnn, Role},
};
use candle_core::Tensor;
use masks::{Ranked, Sides};
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
    if let Some(densities) = &config.densities {
        let shares = densities.iter().all(|d| (0.0..=1.0).contains(d));
        let by_gate = config.method.block().is_some()
            || (config.method, config.compete) == (Method::Magnitude, Compete::PerGate);
        if densities.len() != cell.gates() || !shares || !by_gate {
            return Err(Error::Setting {
                setting: "densities",
                reason: format!(
                    "{densities:?}: {} shares in [0, 1] are needed, and magnitudes per gate or blocks",
                    cell.gates()
                ),
            });
        }
    }
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
/// that exclude each other, a method that needs a calibration.
pub fn prune_layers(
    layers: &[LayerWeights<'_>],
    cell: Cell,
    config: &PruneConfig,
) -> Result<(Vec<LayerMask>, Option<Scores>)> {
    check(layers, cell, config)?;
    if config.weigh_inputs {
        return Err(no_calibration(config.method));
    }
    let scores = config
        .method
        .ranks_neurons()
        .then(|| neuron_scores(&influence_of(layers, cell, &config.lattice)?, config))
        .transpose()?;
    let masks = layer_masks(layers, cell, config, scores.as_ref(), &[])?;
    Ok((masks, scores))
}

fn no_calibration(method: Method) -> Error {
    Error::Setting {
        setting: "calibration",
        reason: format!("{method} needs one: record it and use prune_in"),
    }
}

fn layer_masks(
    layers: &[LayerWeights<'_>],
    cell: Cell,
    config: &PruneConfig,
    scores: Option<&Scores>,
    sides: &[Sides],
) -> Result<Vec<LayerMask>> {
    let ranked = scores.map(|s| Ranked::new(s, layers));
    let matrices = masks::in_scope(layers, cell, config, sides);
    let mut kept = masks::masks(&matrices, ranked.as_ref(), config)?.into_iter();
    Ok(layers
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
        .collect())
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

/// What a method may know of a network beside its weights.
#[derive(Debug, Clone, Copy, Default)]
#[non_exhaustive]
pub struct PruneContext<'a> {
    /// Moments of its states on examples.
    pub calibration: Option<&'a Calibration>,
    /// The entries that exist (the masks of a wiring): budgets count only them, and the masks lie
    /// within them.
    pub within: Option<&'a MaskSet>,
    /// Weights with which something outside the network reads the states of a layer, `[rows, neurons]` by rows, for each layer; no
    /// rows where nothing does. Methods `span` and `flow` take them for read-outs.
    pub readers: &'a [Vec<f32>],
    /// The scores of the method, where they are known: they do not depend on the sparsity. Others are computed.
    pub scores: Option<&'a Scores>,
}

impl<'a> PruneContext<'a> {
    /// With a calibration.
    #[must_use]
    pub fn calibrated(mut self, calibration: &'a Calibration) -> Self {
        self.calibration = Some(calibration);
        self
    }

    /// Within masks.
    #[must_use]
    pub fn within(mut self, masks: &'a MaskSet) -> Self {
        self.within = Some(masks);
        self
    }

    /// With readers outside the network.
    #[must_use]
    pub fn read_by(mut self, readers: &'a [Vec<f32>]) -> Self {
        self.readers = readers;
        self
    }

    /// With the scores that [`scores_in`] gave for the same network, method, seed and settings of the lattice.
    #[must_use]
    pub fn scored(mut self, scores: &'a Scores) -> Self {
        self.scores = Some(scores);
        self
    }

    /// The scores of a method that ranks neurons.
    fn scores(&self, rnn: &Rnn, config: &PruneConfig) -> Result<Scores> {
        if let (Some(scores), true) = (self.scores, config.method.ranks_neurons()) {
            let neurons: usize = rnn.config().hidden.iter().sum();
            return match (scores.values.len(), scores.ties.len()) == (neurons, neurons) {
                true => Ok(scores.clone()),
                false => Err(Error::Shape {
                    tensor: "scores".into(),
                    expected: format!("[{neurons}]"),
                    found: vec![scores.values.len()],
                }),
            };
        }
        if config.method.needs_calibration() {
            let calibration = self
                .calibration
                .ok_or_else(|| no_calibration(config.method))?;
            return span::scores(rnn, config.method, calibration, self.readers);
        }
        let layers = layers_of(rnn);
        let influence = influence_of(&layers, rnn.config().cell, &config.lattice)?;
        neuron_scores(&influence, config)
    }

    fn sides(&self, rnn: &Rnn, config: &PruneConfig) -> Result<Vec<Sides>> {
        let calibration = match (config.weigh_inputs, self.calibration) {
            (false, _) => None,
            (true, Some(calibration)) => {
                calibration.check(rnn.config().input.width(), &rnn.config().hidden)?;
                Some(calibration)
            }
            (true, None) => return Err(no_calibration(config.method)),
        };
        let rms = |m: &Moments| {
            (0..m.dim())
                .map(|j| m.second(j, j).max(0.0).sqrt())
                .collect()
        };
        Ok((0..rnn.config().hidden.len())
            .map(|l| {
                let allowed = |role: Role| {
                    let mask = self.within?.get(rnn.name_of(role)?)?;
                    Some(mask.keep().clone())
                };
                Sides {
                    recurrent: allowed(Role::RecurrentWeight(l)),
                    input: allowed(Role::InputWeight(l)),
                    recurrent_scale: calibration.map(|c| rms(&c.layers[l].before)),
                    input_scale: calibration.map(|c| rms(c.input_of(l))),
                }
            })
            .collect())
    }
}

/// The scores of all neurons by a method that ranks them, once for all sparsities
/// ([`PruneContext::scored`]).
///
/// # Errors
/// Those of [`rank_neurons_in`].
pub fn scores_in(rnn: &Rnn, context: &PruneContext<'_>, config: &PruneConfig) -> Result<Scores> {
    check(&layers_of(rnn), rnn.config().cell, config)?;
    context.scores(rnn, config)
}

/// Masks of a network's weights by name, with a report. The weights are not changed.
///
/// # Errors
/// Those of [`prune_layers`].
pub fn prune(rnn: &Rnn, config: &PruneConfig) -> Result<(MaskSet, PruneReport)> {
    prune_in(rnn, &PruneContext::default(), config)
}

/// The same for methods that need a calibration, and for networks that do not have all connections.
///
/// # Errors
/// Those of [`prune_layers`]; masks or a calibration that do not fit the network.
pub fn prune_in(
    rnn: &Rnn,
    context: &PruneContext<'_>,
    config: &PruneConfig,
) -> Result<(MaskSet, PruneReport)> {
    let mut wired;
    let rnn = match context.within {
        None => rnn,
        Some(within) => {
            wired = rnn.clone();
            within.apply(wired.params_mut())?;
            &wired
        }
    };
    let layers = layers_of(rnn);
    let cell = rnn.config().cell;
    let start = Instant::now();
    check(&layers, cell, config)?;
    let ranks = config.method.ranks_neurons();
    let scores = ranks.then(|| context.scores(rnn, config)).transpose()?;
    let sides = context.sides(rnn, config)?;
    let kept = layer_masks(&layers, cell, config, scores.as_ref(), &sides)?;
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
    if let Some(within) = context.within {
        set = set.intersection(within);
    }
    let report = PruneReport {
        config: config.clone(),
        sparsity: report::sparsity_within(rnn, &set, context.within),
        layers: reports,
        cuts: scores.map(|s| s.cuts).unwrap_or_default(),
        seconds,
    };
    Ok((set, report))
}

/// For each layer, which neurons to keep so that `W_hh` shrinks by `config.sparsity`: the best `round(n sqrt(1 - s))`,
/// at least one. For [`hard_remove`](crate::mask::hard_remove) and merging.
///
/// # Errors
/// A method that ranks no neurons, a sparsity outside `[0, 1)`, a degenerate order.
pub fn rank_neurons(rnn: &Rnn, config: &PruneConfig) -> Result<Vec<Vec<bool>>> {
    rank_neurons_in(rnn, &PruneContext::default(), config)
}

/// The same for methods that need a calibration.
///
/// # Errors
/// Those of [`rank_neurons`]; a calibration that does not fit the network.
pub fn rank_neurons_in(
    rnn: &Rnn,
    context: &PruneContext<'_>,
    config: &PruneConfig,
) -> Result<Vec<Vec<bool>>> {
    let scores = scores_in(rnn, context, config)?;
    let mut start = 0;
    Ok(rnn
        .config()
        .hidden
        .iter()
        .map(|&n| {
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
