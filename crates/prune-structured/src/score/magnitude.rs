//! Norms of weight columns: a baseline without activations.

use super::Scoring;
use crate::Result;
use crate::stats::{ColumnStats, Part};
use serde::{Deserialize, Serialize};

/// `‖W[:,c]‖₂`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Magnitude;

impl Scoring for Magnitude {
    fn columns(&self, _layer: usize, _part: Part, stats: &ColumnStats) -> Result<Vec<f64>> {
        Ok(stats.weight_square.iter().map(|w| w.sqrt()).collect())
    }

    fn degree(&self) -> i32 {
        1
    }
}
