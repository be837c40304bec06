//! Wanda summed over the entries of a column.

use super::{Scoring, weighted};
use crate::Result;
use crate::stats::{ColumnStats, Part};
use serde::{Deserialize, Serialize};

/// `Σ over outputs of |W[o,c]| · ‖x‖₂` (Wanda, arXiv 2306.11695, summed over a column).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WandaSp;

impl Scoring for WandaSp {
    fn columns(&self, _layer: usize, _part: Part, stats: &ColumnStats) -> Result<Vec<f64>> {
        let norms = stats.moments.square_sum().map(f64::sqrt);
        Ok(weighted(norms, &stats.weight_abs))
    }

    fn degree(&self) -> i32 {
        1
    }
}
