//! StructPrune's closed form, reconstructed: see [`crate::structprune`].

use super::shares::{check_budget, check_max_ratio, energies, keep};
use super::{Allocate, Budget};
use crate::Result;
use crate::ranking::Ranking;
use serde::{Deserialize, Serialize};

/// Each sublayer's share of its own parameters is `λ n_l / E_l`, n its parameters and E its energy.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct ClosedForm {
    /// Maximum fraction removed from any sublayer.
    pub max_ratio: f64,
}

impl Default for ClosedForm {
    fn default() -> Self {
        Self { max_ratio: 1.0 }
    }
}

impl Allocate for ClosedForm {
    fn keep(&self, rankings: &[Ranking], budget: Budget) -> Result<Vec<usize>> {
        keep(rankings, &log_weights(rankings), self.max_ratio, budget)
    }

    fn check_options(&self) -> Result<()> {
        check_max_ratio(self.max_ratio)
    }

    fn check_budget(&self, rankings: &[Ranking], budget: Budget) -> Result<()> {
        check_budget(rankings, self.max_ratio, budget)
    }
}

/// `ln(n_l² / E_l)`: logarithms of the removals that the closed form asks for, up to a constant.
pub(super) fn log_weights(rankings: &[Ranking]) -> Vec<f64> {
    rankings
        .iter()
        .zip(energies(rankings))
        .map(|(r, energy)| 2.0 * (r.total() as f64).ln() - energy.ln())
        .collect()
}
