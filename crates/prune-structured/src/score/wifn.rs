//! WIFN, FLAP's score with norms in place of variances.

use super::{Scoring, weighted};
use crate::Result;
use crate::stats::{ColumnStats, Part};
use serde::{Deserialize, Serialize};

/// `mean over outputs of |W[o,c]| · √(Σ x² / windows)` (FLAP's ablation).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wifn;

impl Scoring for Wifn {
    fn columns(&self, _layer: usize, _part: Part, stats: &ColumnStats) -> Result<Vec<f64>> {
        let (samples, outputs) = (stats.samples as f64, stats.outputs as f64);
        let norms = stats.moments.square_sum();
        let norms = norms.map(|sum| (sum / samples).sqrt() / outputs);
        Ok(weighted(norms, &stats.weight_abs))
    }

    fn degree(&self) -> i32 {
        1
    }
}
