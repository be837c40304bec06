//! IFV, FLAP's score without the weights.

use super::Scoring;
use crate::Result;
use crate::stats::{ColumnStats, Part};
use serde::{Deserialize, Serialize};

/// Var(x) (FLAP's ablation).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ifv;

impl Scoring for Ifv {
    fn columns(&self, _layer: usize, _part: Part, stats: &ColumnStats) -> Result<Vec<f64>> {
        Ok(stats.moments.variance().collect())
    }
}
