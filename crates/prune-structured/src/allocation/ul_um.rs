//! UL-UM: the same share of every sublayer.

use super::{Allocate, Budget};
use crate::Result;
use crate::ranking::Ranking;
use serde::{Deserialize, Serialize};

/// The same share of every sublayer, each rounded to whole units (FLAP, arXiv 2312.11983).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct UlUm;

impl Allocate for UlUm {
    fn keep(&self, rankings: &[Ranking], budget: Budget) -> Result<Vec<usize>> {
        let share = budget.share(rankings);
        let keep = |r: &Ranking| r.nearest(r.total() as f64 * share);
        Ok(rankings.iter().map(keep).collect())
    }
}
