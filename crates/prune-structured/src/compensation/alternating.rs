//! StructPrune's refinement, whose weights are made before they are written: see [`crate::structprune::refine()`].

use super::{Change, Compensate, DEFAULT_RIDGE, Pruned};
use crate::{Calibration, Result};
use serde::{Deserialize, Serialize};

/// Alternation between the weights and the activations of each MLP, on inputs that are already pruned.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Alternating {
    /// Rounds of the alternation in each MLP; with one, weights alone are refitted.
    pub rounds: usize,
    /// Damping relative to the mean diagonal of the Gram matrix.
    pub ridge: f64,
}

impl Default for Alternating {
    fn default() -> Self {
        Self {
            rounds: 1,
            ridge: DEFAULT_RIDGE,
        }
    }
}

impl Compensate for Alternating {
    /// The refinement's weights replace the stored ones as they are written.
    fn change(&self, _pruned: &Pruned<'_>, _calibration: Option<&Calibration>) -> Result<Change> {
        Ok(Change::Nothing)
    }

    fn ridge(&self) -> f64 {
        self.ridge
    }

    fn refits(&self) -> bool {
        true
    }
}
