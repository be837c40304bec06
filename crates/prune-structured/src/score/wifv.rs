//! WIFV, FLAP's score: a column whose input hardly varies is nearly a constant, which a bias can replace.

use super::{Scoring, weighted};
use crate::Result;
use crate::stats::{ColumnStats, Part};
use serde::{Deserialize, Serialize};

/// `Var(x) · ‖W[:,c]‖²` (FLAP, arXiv 2312.11983, eq. 5).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wifv;

impl Scoring for Wifv {
    fn columns(&self, _layer: usize, _part: Part, stats: &ColumnStats) -> Result<Vec<f64>> {
        Ok(weighted(stats.moments.variance(), &stats.weight_square))
    }

    fn degree(&self) -> i32 {
        2
    }
}
