//! AL-MM: one cut through all attention units, one through all neurons.

use super::cut::{cut, protected};
use super::{Allocate, Budget};
use crate::Result;
use crate::ranking::Ranking;
use crate::stats::Part;
use serde::{Deserialize, Serialize};

/// One cut through all attention units, one through all neurons (FLAP, arXiv 2312.11983).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AlMm;

impl Allocate for AlMm {
    fn keep(&self, rankings: &[Ranking], budget: Budget) -> Result<Vec<usize>> {
        let attention = |steps: &dyn Fn(usize, &Ranking) -> usize| -> f64 {
            let pairs = rankings.iter().enumerate();
            let of_part = pairs.filter(|(_, r)| r.part == Part::Attention);
            of_part.map(|(i, r)| r.cost(steps(i, r))).sum::<u64>() as f64
        };
        let due = attention(&|_, r| r.steps().len()) * budget.share(rankings);
        let mut keep = protected(rankings);
        cut(rankings, Some(Part::Attention), due, &mut keep);
        let left = budget.parameters - attention(&|i, _| keep[i]);
        cut(rankings, Some(Part::Mlp), left, &mut keep);
        Ok(keep)
    }
}
