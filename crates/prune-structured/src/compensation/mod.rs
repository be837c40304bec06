//! Compensation: how the kept parameters make up for the removed columns.
//!
//! W is the weight of o_proj or down_proj, `[outputs, columns]`, x its input. A compensation is a file of this folder and
//! a line of [`Compensation`].

mod alternating;
mod bias;
mod least_squares;
mod none;

use crate::methods::methods;
use crate::stats::{Needs, Part};
use crate::{Calibration, Error, Result};
use candle_core::Tensor;
use causal_lm::{Decoder, LinearName};

pub use alternating::Alternating;
pub use bias::Bias;
pub use least_squares::LeastSquares;
pub use least_squares::refit;
pub(crate) use least_squares::solve;
#[cfg(test)]
pub(crate) use least_squares::tests;
pub use none::NoCompensation;

methods! {
    /// What replaces the removed columns.
    pub enum Compensation: Compensate {
        /// Nothing.
        "none" => None(NoCompensation),
        /// Their mean contribution, as a bias: `b += W[:,R] E[x_R]` (FLAP, arXiv 2312.11983, eq. 7).
        "bias" => Bias(Bias),
        /// The kept columns, refitted to the dense output by least squares; needs no bias slot.
        "least-squares" => LeastSquares(LeastSquares),
        /// StructPrune's refinement on activations that are already pruned: see [`crate::structprune::refine()`].
        "alternating" => Alternating(Alternating),
    }
}

/// The damping that Týr-the-Pruner and SparseGPT use.
pub const DEFAULT_RIDGE: f64 = 0.01;

/// What compensation changes in one output projection.
#[derive(Clone, Debug)]
pub(crate) enum Change {
    /// Kept columns stay as they are.
    Nothing,
    /// To be added to the bias, one value per output.
    Bias(Vec<f64>),
    /// New kept columns, `[outputs, kept]` f32.
    Weight(Tensor),
}

impl Change {
    /// The new kept columns, if there are any.
    pub(crate) fn into_weight(self) -> Option<Tensor> {
        match self {
            Self::Weight(weight) => Some(weight),
            Self::Nothing | Self::Bias(_) => None,
        }
    }
}

/// An output projection that loses columns.
pub(crate) struct Pruned<'a> {
    pub(crate) layer: usize,
    pub(crate) part: Part,
    /// `[outputs, columns]` f32.
    pub(crate) weight: &'a Tensor,
    /// Columns that stay, ascending.
    pub(crate) kept: &'a [usize],
    /// The others.
    pub(crate) removed: &'a [usize],
}

/// What a compensation computes.
pub(crate) trait Compensate {
    /// The change of an output projection that loses at least one column.
    fn change(&self, pruned: &Pruned<'_>, calibration: Option<&Calibration>) -> Result<Change>;

    /// Statistics that it reads.
    fn needs(&self) -> Needs {
        Needs::default()
    }

    /// Damping of the Gram matrix relative to its mean diagonal, also for what reads it without refitting.
    fn ridge(&self) -> f64 {
        DEFAULT_RIDGE
    }

    /// Whether it adds a bias to output projections.
    fn adds_bias(&self) -> bool {
        false
    }

    /// Whether it refits the kept columns by least squares.
    fn refits(&self) -> bool {
        false
    }
}

/// Refuses a damping that makes no equation solvable.
pub(crate) fn check_ridge(ridge: f64) -> Result<()> {
    match ridge.is_finite() && ridge >= 0.0 {
        true => Ok(()),
        false => Err(Error::Option {
            option: "ridge",
            value: ridge,
            expected: "it must be a finite number, at least 0",
        }),
    }
}

impl Compensation {
    /// Least squares with the usual damping.
    pub const LEAST_SQUARES: Self = Self::LeastSquares(LeastSquares {
        ridge: DEFAULT_RIDGE,
    });

    /// Statistics that it reads.
    pub fn needs(&self) -> Needs {
        self.method().needs()
    }

    /// The damping of the Gram matrix, also for what reads it without refitting.
    pub fn ridge(&self) -> f64 {
        self.method().ridge()
    }

    /// Refuses parameters out of range.
    ///
    /// # Errors
    /// [`Error::Option`].
    pub fn check(&self) -> Result<()> {
        check_ridge(self.ridge())
    }

    /// Whether it adds a bias to output projections.
    pub fn adds_bias(&self) -> bool {
        self.method().adds_bias()
    }

    /// Whether it refits the kept columns by least squares.
    pub fn refits(&self) -> bool {
        self.method().refits()
    }

    /// Bias where the architecture can store one for both o_proj and down_proj, else least squares.
    pub fn suggested(decoder: &Decoder<'_>) -> Self {
        let slot = |name| decoder.config().has_bias_slot(name);
        match slot(LinearName::O) && slot(LinearName::Down) {
            true => Self::Bias(Bias),
            false => Self::LEAST_SQUARES,
        }
    }

    /// Parameters that it adds to a model: a bias for every output projection without one.
    pub fn added(&self, decoder: &Decoder<'_>) -> u64 {
        if !self.adds_bias() {
            return 0;
        }
        let config = decoder.config();
        let without_bias = |sublayers: usize, name| match config.has_bias(name) {
            true => 0,
            false => sublayers,
        };
        let attention = config.widths.iter().filter(|w| w.heads > 0).count();
        let mlp = config.widths.iter().filter(|w| w.neurons > 0).count();
        let biases = without_bias(attention, LinearName::O) + without_bias(mlp, LinearName::Down);
        (biases * config.hidden) as u64
    }

    /// The change for one half of a block that keeps `kept` of the columns of `weight` (`[outputs, columns]` f32).
    pub(crate) fn change(
        &self,
        calibration: Option<&Calibration>,
        (layer, part): (usize, Part),
        weight: &Tensor,
        kept: &[usize],
    ) -> Result<Change> {
        let removed = complement(kept, weight.dims()[1]);
        if removed.is_empty() {
            return Ok(Change::Nothing);
        }
        let pruned = Pruned {
            layer,
            part,
            weight,
            kept,
            removed: &removed,
        };
        self.method().change(&pruned, calibration)
    }
}

/// The calibration, which this compensation reads.
fn needed(calibration: Option<&Calibration>, layer: usize) -> Result<&Calibration> {
    calibration.ok_or(missing(layer, "the calibration"))
}

fn missing(layer: usize, what: &'static str) -> Error {
    Error::Missing {
        layer,
        what,
        need: "the plan's compensation reads it",
    }
}

/// The ids below `width` that are not in the ascending list `ids`.
pub(crate) fn complement(ids: &[usize], width: usize) -> Vec<usize> {
    let mut kept = vec![false; width];
    for &id in ids {
        kept[id] = true;
    }
    (0..width).filter(|&id| !kept[id]).collect()
}
