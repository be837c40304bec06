//! AL-AM, FLAP's default: one cut through all units of the model.

use super::cut::{cut, protected};
use super::{Allocate, Budget};
use crate::Result;
use crate::ranking::Ranking;
use serde::{Deserialize, Serialize};

/// One cut through all units of the model (FLAP, arXiv 2312.11983).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AlAm;

impl Allocate for AlAm {
    fn keep(&self, rankings: &[Ranking], budget: Budget) -> Result<Vec<usize>> {
        let mut keep = protected(rankings);
        cut(rankings, None, budget.parameters, &mut keep);
        Ok(keep)
    }
}
