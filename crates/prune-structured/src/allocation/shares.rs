//! Removals in given proportions, under a bound for each sublayer: water filling, then whole steps.

use super::{Budget, total};
use crate::ranking::Ranking;
use crate::{Error, Result};

/// Energies divided by their mean; a sublayer without any counts as one with next to none.
pub(super) fn energies(rankings: &[Ranking]) -> Vec<f64> {
    let mean = rankings.iter().map(|r| r.energy).sum::<f64>() / rankings.len() as f64;
    let relative = |r: &Ranking| r.energy / mean.max(f64::MIN_POSITIVE);
    rankings
        .iter()
        .map(|r| relative(r).max(f64::EPSILON))
        .collect()
}

/// `r_l = min(cap_l, λ exp(w_l))` with the λ at which they sum to `target`: water filling.
///
/// Only differences of the logarithms `w` matter, and they may be as large as they like. When the
/// caps together are below `target`, every `r_l` is its cap.
fn fill(log_weights: &[f64], caps: &[f64], target: f64) -> Vec<f64> {
    let mut filled = vec![0.0; caps.len()];
    let mut open: Vec<usize> = (0..caps.len()).filter(|&l| caps[l] > 0.0).collect();
    let mut left = target.max(0.0);
    // λ only grows as sublayers reach their caps, so that none of them ever leaves its cap again.
    while !open.is_empty() {
        let largest = open
            .iter()
            .map(|&l| log_weights[l])
            .fold(f64::NEG_INFINITY, f64::max);
        let weight = |l: usize| (log_weights[l] - largest).exp();
        let multiplier = left / open.iter().map(|&l| weight(l)).sum::<f64>();
        let (full, below): (Vec<usize>, Vec<usize>) = open
            .iter()
            .partition(|&&l| multiplier * weight(l) >= caps[l]);
        if full.is_empty() {
            for l in below {
                filled[l] = multiplier * weight(l);
            }
            break;
        }
        for l in full {
            filled[l] = caps[l];
            left -= caps[l];
        }
        left = left.max(0.0);
        open = below;
    }
    filled
}

/// Refuses a largest share outside `(0, 1]`.
pub(super) fn check_max_ratio(max_ratio: f64) -> Result<()> {
    if !(max_ratio > 0.0 && max_ratio <= 1.0) {
        return Err(Error::Option {
            option: "max_ratio",
            value: max_ratio,
            expected: "it must be above 0 and at most 1",
        });
    }
    Ok(())
}

/// Parameters that may be removed from each sublayer.
fn caps(rankings: &[Ranking], max_ratio: f64) -> Vec<f64> {
    let cap = |r: &Ranking| {
        let whole = r.total();
        ((whole - r.cost(r.protected)) as f64).min(whole as f64 * max_ratio)
    };
    rankings.iter().map(cap).collect()
}

/// Refuses a budget that removals of at most `max_ratio` of each sublayer do not reach.
pub(super) fn check_budget(rankings: &[Ranking], max_ratio: f64, budget: Budget) -> Result<()> {
    let total = total(rankings);
    let target = total as f64 - budget.parameters;
    let removable: f64 = caps(rankings, max_ratio).iter().sum();
    let costs = rankings
        .iter()
        .flat_map(Ranking::steps)
        .map(|step| step.cost);
    if target > removable + costs.max().unwrap_or(0) as f64 {
        return Err(Error::Unreachable {
            ratio: budget.ratio,
            kept: total - removable as u64,
            total,
        });
    }
    Ok(())
}

/// Steps that each ranking keeps when removals grow with `exp(log_weights)` and `budget` parameters
/// stay in all.
///
/// Removals are rounded down to whole steps; then the sublayers owed the largest part of a step get
/// it, as long as that brings the total nearer. The result is within half a step of the budget.
///
/// # Errors
/// [`Error::Option`] for a `max_ratio` outside `(0, 1]`; [`Error::Unreachable`] when it leaves too
/// little to remove.
pub(super) fn keep(
    rankings: &[Ranking],
    log_weights: &[f64],
    max_ratio: f64,
    budget: Budget,
) -> Result<Vec<usize>> {
    check_max_ratio(max_ratio)?;
    check_budget(rankings, max_ratio, budget)?;
    let target = total(rankings) as f64 - budget.parameters;
    let caps = caps(rankings, max_ratio);
    let mut due = fill(log_weights, &caps, target);
    let mut keep: Vec<usize> = rankings.iter().map(|r| r.steps().len()).collect();
    let next = |i: usize, keep: &[usize]| {
        let ranking: &Ranking = &rankings[i];
        (keep[i] > ranking.protected).then(|| ranking.steps()[keep[i] - 1].cost as f64)
    };
    let mut missing = target;
    for (i, due) in due.iter_mut().enumerate() {
        // Sums of removals carry rounding; a step short of its cost by that much is a whole one.
        let slack = 1e-9 * target;
        while let Some(cost) = next(i, &keep).filter(|&cost| cost <= *due + slack) {
            keep[i] -= 1;
            *due -= cost;
            missing -= cost;
        }
    }
    let mut owed: Vec<(f64, usize)> = (0..rankings.len())
        .filter_map(|i| next(i, &keep).map(|cost| (due[i] / cost, i)))
        .collect();
    owed.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
    for (_, i) in owed {
        if let Some(cost) = next(i, &keep).filter(|&cost| (missing - cost).abs() < missing.abs()) {
            keep[i] -= 1;
            missing -= cost;
        }
    }
    Ok(keep)
}

#[cfg(test)]
mod tests {
    use super::super::{closed_form, softmax};
    use super::*;
    use crate::stats::Part;
    use proptest::prelude::*;

    /// Sublayers of `sizes[l]` units that cost 10 each.
    fn rankings(sizes: &[usize], energies: &[f64]) -> Vec<Ranking> {
        sizes
            .iter()
            .zip(energies)
            .enumerate()
            .map(|(layer, (&units, &energy))| {
                let mut ranking = Ranking::units(layer, Part::Mlp, &vec![0.0; units], 10, 1);
                ranking.energy = energy;
                ranking
            })
            .collect()
    }

    fn budget(ratio: f64, parameters: f64) -> Budget {
        Budget { ratio, parameters }
    }

    fn removed(rankings: &[Ranking], keep: &[usize]) -> Vec<u64> {
        let removed = |(r, &k): (&Ranking, &usize)| r.total() - r.cost(k);
        rankings.iter().zip(keep).map(removed).collect()
    }

    fn close(ours: &[f64], expected: &[f64]) {
        for (a, b) in ours.iter().zip(expected) {
            assert!(
                (a - b).abs() < 1e-9 * b.abs().max(1.0),
                "{ours:?} is not {expected:?}"
            );
        }
    }

    #[test]
    fn the_closed_form_is_the_one_worked_out_by_hand() {
        // n = 100, 100, 200 and E = 1, 2, 3 (mean 2): n²/E is 20000, 10000 and 80000/3, so that of
        // 170 parameters 60, 30 and 80 go.
        let rankings = rankings(&[10, 10, 20], &[1.0, 2.0, 3.0]);
        let due = fill(
            &closed_form::log_weights(&rankings),
            &[100.0, 100.0, 200.0],
            170.0,
        );
        close(&due, &[60.0, 30.0, 80.0]);
        // With 50 at most, the first is held there and 120 are left for the others, 3 to 8.
        let due = fill(
            &closed_form::log_weights(&rankings),
            &[50.0, 100.0, 200.0],
            170.0,
        );
        close(&due, &[50.0, 360.0 / 11.0, 960.0 / 11.0]);
        let keep = keep(
            &rankings,
            &closed_form::log_weights(&rankings),
            1.0,
            budget(0.425, 230.0),
        )
        .unwrap();
        assert_eq!(removed(&rankings, &keep), [60, 30, 80]);
    }

    #[test]
    fn the_closed_form_minimises_the_energy_of_what_goes() {
        let (sizes, energies) = ([100.0, 100.0, 200.0], [0.5, 1.0, 1.5]);
        let rankings = rankings(&[10, 10, 20], &energies);
        let due = fill(&closed_form::log_weights(&rankings), &sizes, 170.0);
        let loss = |r: &[f64]| -> f64 {
            (0..3)
                .map(|l| 0.5 * energies[l] * (r[l] / sizes[l]).powi(2))
                .sum()
        };
        for from in 0..3 {
            for to in (0..3).filter(|&to| to != from) {
                let mut moved = due.clone();
                moved[from] -= 0.5;
                moved[to] += 0.5;
                assert!(loss(&moved) > loss(&due));
            }
        }
    }

    #[test]
    fn the_softmax_is_the_one_worked_out_by_hand() {
        // Energies 1, 2, 3 standardise to −1, 0, 1.
        let rankings = rankings(&[10, 10, 20], &[1.0, 2.0, 3.0]);
        let due = fill(
            &softmax::log_weights(&rankings, 0.5).unwrap(),
            &[100.0, 100.0, 200.0],
            60.0,
        );
        let parts = [2f64.exp(), 1.0, (-2f64).exp()];
        let sum: f64 = parts.iter().sum();
        close(&due, &parts.map(|part| 60.0 * part / sum));
    }

    #[test]
    fn a_high_temperature_shares_equally_and_a_low_one_is_greedy() {
        let rankings = rankings(&[30, 20, 40, 20], &[3.0, 1.0, 2.0, 5.0]);
        let at = |temperature| {
            let weights = softmax::log_weights(&rankings, temperature).unwrap();
            removed(
                &rankings,
                &keep(&rankings, &weights, 1.0, budget(0.4, 660.0)).unwrap(),
            )
        };
        assert_eq!(at(1e9), [110; 4]);
        assert_eq!(at(f64::INFINITY), [110; 4]);
        // 200 of the weakest, then 240 of the second.
        assert_eq!(at(1e-9), [0, 200, 240, 0]);
        assert!(matches!(
            softmax::log_weights(&rankings, 0.0),
            Err(Error::Option {
                option: "temperature",
                ..
            })
        ));
    }

    #[test]
    fn bounds_that_leave_too_little_are_an_error() {
        let rankings = rankings(&[10, 10], &[1.0, 1.0]);
        let weights = closed_form::log_weights(&rankings);
        assert!(matches!(
            keep(&rankings, &weights, 0.3, budget(0.6, 80.0)),
            Err(Error::Unreachable {
                kept: 140,
                total: 200,
                ..
            })
        ));
        for max_ratio in [0.0, 1.5, f64::NAN] {
            assert!(matches!(
                keep(&rankings, &weights, max_ratio, budget(0.6, 80.0)),
                Err(Error::Option {
                    option: "max_ratio",
                    ..
                })
            ));
        }
    }

    #[test]
    fn a_sublayer_without_energy_goes_first_and_breaks_nothing() {
        let rankings = rankings(&[10, 10], &[0.0, 1.0]);
        let keep = keep(
            &rankings,
            &closed_form::log_weights(&rankings),
            1.0,
            budget(0.25, 150.0),
        )
        .unwrap();
        assert_eq!(removed(&rankings, &keep), [50, 0]);
        let none = super::tests::rankings(&[10, 10], &[0.0, 0.0]);
        let keep = super::keep(
            &none,
            &closed_form::log_weights(&none),
            1.0,
            budget(0.2, 160.0),
        )
        .unwrap();
        assert_eq!(removed(&none, &keep), [20, 20]);
    }

    /// The multiplier by bisection, as one would first write it down.
    fn by_bisection(log_weights: &[f64], caps: &[f64], target: f64) -> Vec<f64> {
        let at = |log_lambda: f64| -> Vec<f64> {
            let removal = |(w, cap): (&f64, &f64)| (log_lambda + w).exp().min(*cap);
            log_weights.iter().zip(caps).map(removal).collect()
        };
        let (mut low, mut high) = (-200.0, 200.0);
        for _ in 0..200 {
            let middle = (low + high) / 2.0;
            if at(middle).iter().sum::<f64>() < target {
                low = middle;
            } else {
                high = middle;
            }
        }
        at(high)
    }

    proptest! {
        #[test]
        fn water_filling_meets_the_budget_like_a_bisection_of_the_multiplier(
            sublayers in prop::collection::vec((-6f64..6.0, 0f64..100.0), 1..12),
            share in 0.01f64..0.99,
        ) {
            let (weights, caps): (Vec<f64>, Vec<f64>) = sublayers.into_iter().unzip();
            let target = share * caps.iter().sum::<f64>();
            let ours = fill(&weights, &caps, target);
            prop_assert!((ours.iter().sum::<f64>() - target).abs() < 1e-9 * target.max(1.0));
            for ((ours, theirs), cap) in ours.iter().zip(by_bisection(&weights, &caps, target)).zip(&caps) {
                prop_assert!((ours - theirs).abs() < 1e-6 * target.max(1.0), "{} {}", ours, theirs);
                prop_assert!(*ours <= *cap);
            }
        }

        #[test]
        fn after_rounding_the_budget_is_met_within_half_a_step(
            sublayers in prop::collection::vec((1usize..40, 1u64..300, 0.01f64..10.0, 0usize..3), 1..10),
            ratio in 0.01f64..0.95,
            temperature in 0.01f64..10.0,
        ) {
            let rankings: Vec<Ranking> = sublayers
                .iter()
                .enumerate()
                .map(|(layer, &(units, cost, energy, protected))| {
                    let mut ranking = Ranking::units(layer, Part::Mlp, &vec![0.0; units], cost, 1);
                    (ranking.energy, ranking.protected) = (energy, protected.min(units));
                    ranking
                })
                .collect();
            let budget = total(&rankings) as f64 * (1.0 - ratio);
            let protected: u64 = rankings.iter().map(|r| r.cost(r.protected)).sum();
            prop_assume!(protected as f64 <= budget);
            for weights in [closed_form::log_weights(&rankings), softmax::log_weights(&rankings, temperature).unwrap()] {
                let keep = keep(&rankings, &weights, 1.0, super::Budget { ratio, parameters: budget }).unwrap();
                let kept: u64 = rankings.iter().zip(&keep).map(|(r, &k)| r.cost(k)).sum();
                let step = rankings.iter().map(|r| r.steps()[0].cost).max().unwrap() as f64;
                prop_assert!((kept as f64 - budget).abs() <= step / 2.0 + 1e-6, "{} of {}", kept, budget);
                for (ranking, &keep) in rankings.iter().zip(&keep) {
                    prop_assert!(keep >= ranking.protected && keep <= ranking.steps().len());
                }
            }
        }
    }
}
