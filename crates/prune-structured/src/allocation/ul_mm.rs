//! UL-MM: the same share of every layer.

use super::{Allocate, Budget};
use crate::Result;
use crate::ranking::Ranking;
use serde::{Deserialize, Serialize};

/// The same share of every layer: attention rounded to whole units, the MLP makes up the difference (FLAP, arXiv
/// 2312.11983).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct UlMm;

impl Allocate for UlMm {
    fn keep(&self, rankings: &[Ranking], budget: Budget) -> Result<Vec<usize>> {
        let share = budget.share(rankings);
        // Rankings are in layer order, attention first.
        let mut missed = (usize::MAX, 0.0);
        let keep = |ranking: &Ranking| {
            let carried = if missed.0 == ranking.layer {
                missed.1
            } else {
                0.0
            };
            let due = ranking.total() as f64 * share + carried;
            let keep = ranking.nearest(due);
            missed = (ranking.layer, due - ranking.cost(keep) as f64);
            keep
        };
        Ok(rankings.iter().map(keep).collect())
    }
}
