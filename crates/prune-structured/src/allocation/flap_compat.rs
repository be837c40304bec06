//! AL-AM as FLAP's published implementation cuts, where it differs from the paper.
//!
//! Two differences matter: a head's cost in neurons is cut to an integer before budgets are summed, and only units
//! strictly above the score at the cut are kept, so that the unit at the cut is removed too. The implementation covers
//! multi-head attention; for grouped queries the unit is the whole key/value group and its cost the group's, cut to an
//! integer alike. What differs in the score is in [`crate::score::FlapCompat`].

use super::{Allocate, Budget};
use crate::Result;
use crate::ranking::{Ranking, pool};
use crate::stats::Part;
use serde::{Deserialize, Serialize};

/// The published implementation's cut.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FlapCompatCut;

impl Allocate for FlapCompatCut {
    fn keep(&self, rankings: &[Ranking], budget: Budget) -> Result<Vec<usize>> {
        Ok(keep(rankings, budget.ratio))
    }
}

/// Steps that the published AL-AM cut keeps of each ranking.
fn keep(rankings: &[Ranking], ratio: f64) -> Vec<usize> {
    let mlp = || {
        rankings
            .iter()
            .filter(|r| r.part == Part::Mlp)
            .flat_map(Ranking::steps)
    };
    let neuron = mlp()
        .map(|step| step.cost / step.units as u64)
        .next()
        .unwrap_or(1);
    let pool = pool(rankings, None);
    let cost = |&(i, step): &(usize, usize)| rankings[i].steps()[step].cost / neuron;
    let total: u64 = pool.iter().map(cost).sum();
    let target = total as f64 * (1.0 - ratio);
    let mut spent = 0;
    let mut nearest = f64::INFINITY;
    let mut threshold = f64::INFINITY;
    for unit in &pool {
        spent += cost(unit);
        let gap = (spent as f64 - target).abs();
        if gap < nearest {
            (nearest, threshold) = (gap, rankings[unit.0].steps()[unit.1].score);
        }
    }
    let above = |r: &Ranking| {
        r.steps()
            .iter()
            .filter(|step| step.score > threshold)
            .count()
    };
    rankings.iter().map(|r| above(r).max(r.protected)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stats::standardise;

    /// Two layers with two heads of width 2 and six neurons, as the published statements see them.
    fn rankings() -> Vec<Ranking> {
        let mut rankings = Vec::new();
        for l in 0..2 {
            let mut attention: Vec<f64> = (0..4)
                .map(|c| (((5 * l + 3 * c * c) % 17) + 1) as f64 / 2.0)
                .collect();
            standardise(&mut attention);
            let heads: Vec<f64> = attention.chunks(2).map(|d| (d[0] + d[1]) / 2.0).collect();
            // A head of width 2 has 4 · 2 · h parameters and a neuron 3 · h; here h = 1.
            rankings.push(Ranking::units(l, Part::Attention, &heads, 8, 1));
            let mut mlp: Vec<f64> = (0..6)
                .map(|j| (((7 * l + 5 * j) % 13) + 1) as f64 / 3.0)
                .collect();
            standardise(&mut mlp);
            rankings.push(Ranking::units(l, Part::Mlp, &mlp, 3, 1));
        }
        rankings
    }

    #[test]
    fn the_cut_keeps_the_units_of_the_published_implementation() {
        let rankings = rankings();
        let kept = |ratio| -> Vec<Vec<usize>> {
            keep(&rankings, ratio)
                .iter()
                .zip(&rankings)
                .map(|(&steps, r)| r.kept(steps))
                .collect()
        };
        assert_eq!(
            kept(0.2),
            [vec![1], vec![1, 2, 4, 5], vec![0, 1], vec![0, 1, 3, 5]]
        );
        assert_eq!(kept(0.5), [vec![1], vec![2, 4, 5], vec![], vec![0, 1, 3]]);
    }

    #[test]
    fn head_scores_are_means_of_standardised_columns() {
        let scores: Vec<f64> = rankings()
            .iter()
            .filter(|r| r.part == Part::Attention)
            .flat_map(|r| r.steps().iter().map(|s| s.score))
            .collect();
        for (ours, golden) in scores
            .iter()
            .zip([0.836428, -0.836428, 0.079724, -0.079724])
        {
            assert!((ours - golden).abs() < 1e-5, "{ours} is not {golden}");
        }
    }
}
