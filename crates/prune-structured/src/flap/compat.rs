//! The arithmetic of FLAP's published implementation, where it differs from the paper.
//!
//! Kept apart so that the default stays the paper's method. Four differences matter:
//! - the fluctuation updates its mean in place before it is used, so both factors of the running
//!   product hold the new mean, the first sample never counts and later ones are weighted;
//! - the metric of o_proj is squared once more, that of down_proj is not;
//! - a head's cost in neurons is cut to an integer before budgets are summed;
//! - only units strictly above the score at the cut are kept, so the unit at the cut goes too.
//!
//! The implementation covers multi-head attention; for grouped queries the unit is the whole
//! key/value group and its cost the group's, cut to an integer alike.

use crate::ranking::{Ranking, pool};
use crate::stats::Part;
use serde::{Deserialize, Serialize};

/// FLAP's fluctuation as implemented (arXiv 2312.11983, eq. 4, with the aliased mean):
/// F₁ = 0, Fₙ = Fₙ₋₁ (n−2)/(n−1) + Σₜ (xₙₜ − mₙ)² / n, with mₙ the mean of the samples' means.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Fluctuation {
    samples: u64,
    mean: Vec<f64>,
    /// F of each column.
    pub value: Vec<f64>,
}

impl Fluctuation {
    /// No samples yet.
    pub fn new(width: usize) -> Self {
        Self {
            samples: 0,
            mean: vec![0.0; width],
            value: vec![0.0; width],
        }
    }

    /// Takes in one sample (a window), `[tokens, width]` row-major.
    pub fn update(&mut self, sample: &[f32]) {
        let width = self.mean.len();
        let tokens = (sample.len() / width) as f64;
        self.samples += 1;
        let n = self.samples as f64;
        let mut sum = vec![0f64; width];
        for row in sample.chunks_exact(width) {
            for (sum, &x) in sum.iter_mut().zip(row) {
                *sum += f64::from(x);
            }
        }
        for (mean, sum) in self.mean.iter_mut().zip(sum) {
            *mean = *mean * (n - 1.0) / n + sum / tokens / n;
        }
        if self.samples == 1 {
            return;
        }
        for value in &mut self.value {
            *value *= (n - 2.0) / (n - 1.0);
        }
        for row in sample.chunks_exact(width) {
            for ((value, &x), mean) in self.value.iter_mut().zip(row).zip(&self.mean) {
                *value += (f64::from(x) - mean).powi(2) / n;
            }
        }
    }
}

/// Steps that the reference's AL-AM cut keeps of each ranking.
pub(crate) fn keep(rankings: &[Ranking], ratio: f64) -> Vec<usize> {
    let mlp = || {
        rankings
            .iter()
            .filter(|r| r.part == Part::Mlp)
            .flat_map(|r| &r.steps)
    };
    let neuron = mlp()
        .map(|step| step.cost / step.units as u64)
        .next()
        .unwrap_or(1);
    let pool = pool(rankings, None);
    let cost = |&(i, step): &(usize, usize)| rankings[i].steps[step].cost / neuron;
    let total: u64 = pool.iter().map(cost).sum();
    let target = total as f64 * (1.0 - ratio);
    let mut spent = 0;
    let mut nearest = f64::INFINITY;
    let mut threshold = f64::INFINITY;
    for unit in &pool {
        spent += cost(unit);
        let gap = (spent as f64 - target).abs();
        if gap < nearest {
            (nearest, threshold) = (gap, rankings[unit.0].steps[unit.1].score);
        }
    }
    let above = |r: &Ranking| r.steps.iter().filter(|step| step.score > threshold).count();
    rankings.iter().map(|r| above(r).max(r.protected)).collect()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::score::standardise;
    use crate::stats::Part;

    /// Samples of the golden statistics: 4 of 3 tokens with 4 features.
    pub(crate) fn samples() -> Vec<Vec<f32>> {
        let x = |n: usize, t: usize, c: usize| {
            ((7 * n + 3 * t + 5 * c + (n * t * c) % 4) % 11) as f32 - 5.0
        };
        (0..4)
            .map(|n| (0..12).map(|i| x(n, i / 4, i % 4) / 4.0).collect())
            .collect()
    }

    #[test]
    fn the_fluctuation_is_that_of_the_published_implementation() {
        let mut fluctuation = Fluctuation::new(4);
        for sample in samples() {
            fluctuation.update(&sample);
        }
        for (ours, golden) in fluctuation
            .value
            .iter()
            .zip([1.2285599, 1.2873586, 0.9198858, 1.2650826])
        {
            assert!((ours - golden).abs() < 1e-6, "{ours} is not {golden}");
        }
        for (ours, golden) in fluctuation
            .mean
            .iter()
            .zip([0.0625, -0.0833333, -0.1041667, -0.1041667])
        {
            assert!((ours - golden).abs() < 1e-6, "{ours} is not {golden}");
        }
    }

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
            .flat_map(|r| r.steps.iter().map(|s| s.score))
            .collect();
        for (ours, golden) in scores
            .iter()
            .zip([0.836428, -0.836428, 0.079724, -0.079724])
        {
            assert!((ours - golden).abs() < 1e-5, "{ours} is not {golden}");
        }
    }
}
