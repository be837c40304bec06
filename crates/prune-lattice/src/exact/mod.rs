//! Neurons that can be removed without changing the function of a network, each with the reason why.
//!
//! - *Unheard*: no path of nonzero weights leads to an output. This is the one exact use of the reachability order.
//! - *Dead* (ReLU): the state is zero at every step of every input, by a certificate on the weights ([`dead_neurons`]).
//! - *Constant*: the state does not vary on the calibration; its value goes into the biases of its readers, which is
//!   [`merge`](crate::repair::merge) with the others kept. Exact only on inputs like those recorded.
//! - *Unfed*: no path from the input; such a neuron runs by itself and can be removed only where it is constant.
//!
//! [`equitable_partition`] finds neurons that are equal for ever; in trained networks there are none until weights are shared.

mod dead;
mod live;
mod partition;

pub use dead::dead_neurons;
pub use live::{Liveness, live_neurons};
pub use partition::{equitable_partition, quotient};

use crate::{
    calibration::Calibration,
    cell::Cell,
    error::Result,
    mask::hard_remove,
    rnn::{InputKind, Rnn},
};
use serde::{Deserialize, Serialize};

/// Why a neuron can be removed, or what is known of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Finding {
    /// It is zero whatever the input, by a certificate.
    Dead,
    /// Nothing it says reaches an output.
    Unheard,
    /// It was zero at every step of the calibration, which proves nothing for other inputs.
    DeadOnCalibration,
    /// It did not vary on the calibration.
    ConstantOnCalibration,
    /// No input reaches it.
    Unfed,
}

impl Finding {
    /// Whether removing the neuron changes nothing for any input.
    pub fn is_exact(self) -> bool {
        matches!(self, Self::Dead | Self::Unheard)
    }
}

/// What is known of the inputs, and of the states.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct ExactConfig<'a> {
    /// Smallest and largest value of a component of an input vector, for networks that read vectors.
    pub input_range: Option<(f32, f32)>,
    /// States on examples.
    pub calibration: Option<&'a Calibration>,
    /// Standard deviation up to which a state counts as constant; by default 1e-6, about what rounding makes of a constant.
    pub constant_below: f64,
}

impl Default for ExactConfig<'_> {
    fn default() -> Self {
        Self {
            input_range: None,
            calibration: None,
            constant_below: 1e-6,
        }
    }
}

impl<'a> ExactConfig<'a> {
    /// With input vectors whose components lie between two values.
    #[must_use]
    pub fn input_range(mut self, low: f32, high: f32) -> Self {
        self.input_range = Some((low, high));
        self
    }

    /// With states on examples.
    #[must_use]
    pub fn calibrated(mut self, calibration: &'a Calibration) -> Self {
        self.calibration = Some(calibration);
        self
    }
}

/// The strongest finding for every neuron, layer by layer; `None` for neurons that the network needs. Masks (those of a wiring
/// among them) must have been applied to the weights. Where a ReLU network reads vectors and their range is not known, nothing is
/// certified as dead.
///
/// # Errors
/// A calibration that does not fit the network.
pub fn find(rnn: &Rnn, config: &ExactConfig<'_>) -> Result<Vec<Vec<Option<Finding>>>> {
    let shape = rnn.config();
    if let Some(calibration) = config.calibration {
        calibration.check(shape.input.width(), &shape.hidden)?;
    }
    let live = live_neurons(rnn);
    let known = !matches!(shape.input, InputKind::Dense { .. }) || config.input_range.is_some();
    let dead = match shape.cell {
        Cell::Relu if known => Some(dead_neurons(rnn, config.input_range)?),
        _ => None,
    };
    let finding = |l: usize, x: usize| {
        let moments = config.calibration.map(|c| &c.layers[l].after);
        let constant = moments.map(|m| {
            let (mean, square) = (m.mean()[x], m.second(x, x));
            let deviation = (square - mean * mean).max(0.0).sqrt();
            (square == 0.0, deviation <= config.constant_below)
        });
        match () {
            () if dead.as_ref().is_some_and(|d| d[l][x]) => Some(Finding::Dead),
            () if !live[l][x].heard => Some(Finding::Unheard),
            () if constant.is_some_and(|c| c.0) => Some(Finding::DeadOnCalibration),
            () if constant.is_some_and(|c| c.1) => Some(Finding::ConstantOnCalibration),
            () if !live[l][x].fed => Some(Finding::Unfed),
            () => None,
        }
    };
    Ok(shape
        .hidden
        .iter()
        .enumerate()
        .map(|(l, &n)| (0..n).map(|x| finding(l, x)).collect())
        .collect())
}

/// Neurons by what is known of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Counts {
    /// [`Finding::Dead`]
    pub dead: usize,
    /// [`Finding::Unheard`]
    pub unheard: usize,
    /// [`Finding::DeadOnCalibration`]
    pub dead_on_calibration: usize,
    /// [`Finding::ConstantOnCalibration`]
    pub constant_on_calibration: usize,
    /// [`Finding::Unfed`]
    pub unfed: usize,
}

impl Counts {
    /// Counts findings.
    pub fn of(findings: &[Vec<Option<Finding>>]) -> Self {
        let mut counts = Self::default();
        for finding in findings.iter().flatten().flatten() {
            let count = match finding {
                Finding::Dead => &mut counts.dead,
                Finding::Unheard => &mut counts.unheard,
                Finding::DeadOnCalibration => &mut counts.dead_on_calibration,
                Finding::ConstantOnCalibration => &mut counts.constant_on_calibration,
                Finding::Unfed => &mut counts.unfed,
            };
            *count += 1;
        }
        counts
    }
}

/// How many neurons are equal to another one for ever ([`equitable_partition`]): those that sharing weights makes superfluous.
///
/// # Errors
/// A tolerance that is not positive.
pub fn equal_neurons(rnn: &Rnn, tolerance: f64) -> Result<usize> {
    let classes = equitable_partition(rnn, tolerance)?;
    let count = |of: &Vec<usize>| of.len() - of.iter().max().map_or(0, |c| c + 1);
    Ok(classes.iter().map(count).sum())
}

/// The neurons that stay when those are removed whose removal changes nothing for any input; a layer keeps one at least.
pub fn kept(findings: &[Vec<Option<Finding>>]) -> Vec<Vec<bool>> {
    findings
        .iter()
        .map(|layer| {
            let stays = |f: &Option<Finding>| !f.is_some_and(Finding::is_exact);
            let mut keep: Vec<bool> = layer.iter().map(stays).collect();
            if !keep.contains(&true)
                && let Some(first) = keep.first_mut()
            {
                *first = true;
            }
            keep
        })
        .collect()
}

/// The network without the neurons whose removal changes nothing for any input; a layer keeps one neuron at least.
///
/// # Errors
/// Findings of another network.
pub fn remove(rnn: &Rnn, findings: &[Vec<Option<Finding>>]) -> Result<Rnn> {
    hard_remove(rnn, &kept(findings))
}
