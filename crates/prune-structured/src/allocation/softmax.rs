//! StructPrune's softmax over energies, reconstructed: see [`crate::structprune`].

use super::shares::{check_budget, check_max_ratio, energies, keep};
use super::{Allocate, Budget};
use crate::ranking::Ranking;
use crate::stats::standardise;
use crate::{Error, Result};
use serde::{Deserialize, Serialize};

/// `exp(−E_l/τ) / Σ exp(−E_k/τ)` of what is removed comes from sublayer l, E its standardised energy.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Softmax {
    /// τ, above 0: small removes all from the weakest sublayers, large the same number of parameters from each.
    pub temperature: f64,
    /// Maximum fraction removed from any sublayer.
    pub max_ratio: f64,
}

impl Default for Softmax {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            max_ratio: 1.0,
        }
    }
}

impl Allocate for Softmax {
    fn keep(&self, rankings: &[Ranking], budget: Budget) -> Result<Vec<usize>> {
        let weights = log_weights(rankings, self.temperature)?;
        keep(rankings, &weights, self.max_ratio, budget)
    }

    fn check_options(&self) -> Result<()> {
        check_temperature(self.temperature)?;
        check_max_ratio(self.max_ratio)
    }

    fn check_budget(&self, rankings: &[Ranking], budget: Budget) -> Result<()> {
        check_budget(rankings, self.max_ratio, budget)
    }
}

fn check_temperature(temperature: f64) -> Result<()> {
    if temperature.is_nan() || temperature <= 0.0 {
        return Err(Error::Option {
            option: "temperature",
            value: temperature,
            expected: "it must be above 0",
        });
    }
    Ok(())
}

/// `−E_l / τ`, E standardised over the sublayers: logarithms of the softmax, up to a constant.
pub(super) fn log_weights(rankings: &[Ranking], temperature: f64) -> Result<Vec<f64>> {
    check_temperature(temperature)?;
    let mut energies = energies(rankings);
    standardise(&mut energies);
    Ok(energies.iter().map(|e| -e / temperature).collect())
}
