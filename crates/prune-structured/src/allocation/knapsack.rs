//! A multiple-choice knapsack: one point of each curve, the least total distortion, never more parameters than the
//! budget.
//!
//! Costs are counted in their greatest common divisor; where that gives too many states, in coarser units rounded up.
//! Back pointers are kept for every state, so the result is the optimum itself.

use rayon::prelude::*;

/// Budget states of the dynamic programme; with more the costs are rounded up.
const STATES: u64 = 1 << 16;
/// Points of a curve that enter it; a longer curve is thinned.
const POINTS: usize = 256;
/// States that one task computes.
const CHUNK: usize = 4096;

/// A point of a curve.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Point {
    /// Parameters kept.
    pub cost: u64,
    /// What that does to the output.
    pub distortion: f64,
}

/// Index of the point to take from each curve so that the sum of distortions is least and that of
/// costs at most `budget`; on equal distortion the dearer. `None` when even the cheapest points
/// cost more.
///
/// Costs of a curve must not fall. Exact when the budget beyond the cheapest points, in units of
/// the greatest common divisor of costs, has at most 65,536 states; else it leaves at most one
/// 65,536th of it unspent for every curve.
pub fn knapsack(curves: &[Vec<Point>], budget: u64) -> Option<Vec<usize>> {
    Knapsack::new(curves, budget)?.at(budget)
}

/// The solutions for all budgets up to a largest one, by one dynamic programme.
#[derive(Clone, Debug)]
pub struct Knapsack {
    /// What each point of each curve costs beyond the cheapest, in units, rounded up.
    units: Vec<Vec<usize>>,
    /// The point taken of each curve, for every number of units that this and the curves before may spend.
    taken: Vec<Vec<u32>>,
    /// Sum of the cheapest points.
    smallest: u64,
    unit: u64,
    states: usize,
}

impl Knapsack {
    /// Solves for every budget up to `largest`; `None` when even the cheapest points cost more. Costs of a curve must
    /// not fall.
    pub fn new(curves: &[Vec<Point>], largest: u64) -> Option<Self> {
        let smallest: u64 = curves.iter().map(|c| c[0].cost).sum();
        let spare = largest.checked_sub(smallest)?;
        let extra = |curve: &[Point], i: usize| curve[i].cost - curve[0].cost;
        let divisor = curves
            .iter()
            .flat_map(|c| (0..c.len()).map(|i| extra(c, i)))
            .fold(0, gcd)
            .max(1);
        let most: u64 = curves.iter().map(|c| extra(c, c.len() - 1)).sum();
        let spare = spare.min(most);
        let unit = divisor.max(spare.div_ceil(STATES));
        let states = (spare / unit) as usize + 1;

        // least[b]: the least distortion of the curves so far for at most b units.
        let mut least = vec![0.0; states];
        let mut taken: Vec<Vec<u32>> = Vec::with_capacity(curves.len());
        let mut units = Vec::with_capacity(curves.len());
        for curve in curves {
            let costs: Vec<usize> = (0..curve.len())
                .map(|i| extra(curve, i).div_ceil(unit) as usize)
                .collect();
            let mut next = vec![f64::INFINITY; states];
            let mut chosen = vec![0u32; states];
            next.par_chunks_mut(CHUNK)
                .zip(chosen.par_chunks_mut(CHUNK))
                .enumerate()
                .for_each(|(chunk, (next, chosen))| {
                    let start = chunk * CHUNK;
                    for (i, (&cost, point)) in costs.iter().zip(curve).enumerate().rev() {
                        for b in cost.saturating_sub(start)..next.len() {
                            let total = least[start + b - cost] + point.distortion;
                            if total < next[b] {
                                (next[b], chosen[b]) = (total, i as u32);
                            }
                        }
                    }
                });
            least = next;
            taken.push(chosen);
            units.push(costs);
        }
        Some(Self {
            units,
            taken,
            smallest,
            unit,
            states,
        })
    }

    /// The least budget that any choice fits.
    pub fn smallest(&self) -> u64 {
        self.smallest
    }

    /// By how much a cost may have been rounded up for each curve, at most.
    pub fn rounding(&self) -> u64 {
        self.unit - 1
    }

    /// Index of the point to take from each curve for a budget, at most the largest that was solved for; `None` for one
    /// below the cheapest points.
    pub fn at(&self, budget: u64) -> Option<Vec<usize>> {
        let spare = budget.checked_sub(self.smallest)?;
        let mut left =
            (self.states - 1).min(usize::try_from(spare / self.unit).unwrap_or(usize::MAX));
        let mut choice: Vec<usize> = self
            .units
            .iter()
            .zip(&self.taken)
            .rev()
            .map(|(units, taken)| {
                let i = taken[left] as usize;
                left -= units[i];
                i
            })
            .collect();
        choice.reverse();
        Some(choice)
    }
}

/// Replaces every distortion by the lower convex hull of the curve at its cost, which takes out the
/// bumps of measured curves.
pub fn convexify(curve: &mut [Point]) {
    let mut hull: Vec<Point> = Vec::with_capacity(curve.len());
    let slope = |a: Point, b: Point| (b.distortion - a.distortion) / (b.cost - a.cost) as f64;
    for &point in curve.iter() {
        if let Some(&last) = hull.last()
            && last.cost == point.cost
        {
            if point.distortion >= last.distortion {
                continue;
            }
            hull.pop();
        }
        while let [.., a, b] = hull[..]
            && slope(a, b) >= slope(b, point)
        {
            hull.pop();
        }
        hull.push(point);
    }
    let mut at = 0;
    for point in curve {
        while at + 1 < hull.len() && hull[at + 1].cost <= point.cost {
            at += 1;
        }
        let a = hull[at];
        point.distortion = match hull.get(at + 1) {
            Some(&b) => a.distortion + slope(a, b) * (point.cost - a.cost) as f64,
            None => a.distortion,
        };
    }
}

/// Index of the point to take from each curve, as [`knapsack`], for curves of any length; what the budget leaves over
/// is spent step by step.
pub(super) fn keep(curves: &[Vec<Point>], budget: u64) -> Option<Vec<usize>> {
    let kept: Vec<Vec<usize>> = curves.iter().map(|curve| thin(curve.len())).collect();
    let coarse: Vec<Vec<Point>> = curves
        .iter()
        .zip(&kept)
        .map(|(curve, kept)| kept.iter().map(|&i| curve[i]).collect())
        .collect();
    let choice = knapsack(&coarse, budget)?;
    let mut at: Vec<usize> = choice.iter().zip(&kept).map(|(&c, kept)| kept[c]).collect();
    spend(curves, &mut at, budget);
    Some(at)
}

/// Indices of at most [`POINTS`] points of a curve, both ends among them.
fn thin(len: usize) -> Vec<usize> {
    let points = len.min(POINTS);
    (0..points)
        .map(|i| i * (len - 1) / (points - 1).max(1))
        .collect()
}

/// Spends what is left of the budget on the steps that save most for each parameter.
fn spend(curves: &[Vec<Point>], at: &mut [usize], budget: u64) {
    let spent: u64 = curves.iter().zip(&*at).map(|(c, &i)| c[i].cost).sum();
    let mut left = budget - spent;
    loop {
        let gain = |l: usize| -> Option<(f64, u64)> {
            let (now, next) = (curves[l][at[l]], curves[l].get(at[l] + 1)?);
            let (cost, saved) = (next.cost - now.cost, now.distortion - next.distortion);
            (cost <= left && saved >= 0.0).then_some((saved / cost as f64, cost))
        };
        let best = (0..curves.len())
            .filter_map(|l| gain(l).map(|(gain, cost)| (l, gain, cost)))
            .max_by(|a, b| a.1.total_cmp(&b.1).then(b.0.cmp(&a.0)));
        let Some((l, _, cost)) = best else { return };
        at[l] += 1;
        left -= cost;
    }
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Curves of the golden problem: the amounts pruned are 0, ¼, ½, ¾ and 1, cheapest first here.
    fn golden() -> Vec<Vec<Point>> {
        let distortions = [
            [0.0, 1.0, 4.0, 9.0, 30.0],
            [0.0, 0.5, 1.0, 3.0, 8.0],
            [0.0, 2.0, 6.0, 20.0, 60.0],
        ];
        [8u64, 12, 16]
            .into_iter()
            .zip(distortions)
            .map(|(n, distortions)| {
                let point = |i: usize| Point {
                    cost: n * (4 - i as u64) / 4,
                    distortion: distortions[i],
                };
                (0..5).rev().map(point).collect()
            })
            .collect()
    }

    fn total(curves: &[Vec<Point>], choice: &[usize]) -> (u64, f64) {
        let points = || curves.iter().zip(choice).map(|(c, &i)| c[i]);
        (
            points().map(|p| p.cost).sum(),
            points().map(|p| p.distortion).sum(),
        )
    }

    /// The least distortion within the budget over all choices.
    fn brute_force(curves: &[Vec<Point>], budget: u64) -> Option<f64> {
        let Some((first, rest)) = curves.split_first() else {
            return Some(0.0);
        };
        first
            .iter()
            .filter(|p| p.cost <= budget)
            .filter_map(|p| Some(p.distortion + brute_force(rest, budget - p.cost)?))
            .min_by(f64::total_cmp)
    }

    #[test]
    fn the_published_examples_come_out_and_so_does_the_one_that_crashes_the_published_solver() {
        let curves = golden();
        for (ratio, distortion) in [(0.25, 3.0), (0.4, 6.0), (0.5, 10.0)] {
            let budget = ((1.0 - ratio) * 36.0f64).floor() as u64;
            let (cost, found) = total(&curves, &knapsack(&curves, budget).unwrap());
            assert!(cost <= budget);
            assert_eq!(found, distortion, "{ratio}");
        }
        // Cheapest first: index 3 prunes a quarter, 1 three quarters, 2 half.
        assert_eq!(knapsack(&curves, 21).unwrap(), [3, 1, 3]);
        assert_eq!(knapsack(&curves, 18).unwrap(), [3, 1, 2]);
        let (cost, found) = total(&curves, &knapsack(&curves, 14).unwrap());
        assert!(cost <= 14);
        assert_eq!(Some(found), brute_force(&curves, 14));
        assert_eq!(knapsack(&curves, 0).unwrap(), [0, 0, 0]);
    }

    #[test]
    fn identical_convex_curves_are_split_equally() {
        let curve: Vec<Point> = (0..=10u64)
            .map(|k| Point {
                cost: 7 * k,
                distortion: (10.0 - k as f64).powi(2),
            })
            .collect();
        assert_eq!(knapsack(&vec![curve; 5], 5 * 7 * 6).unwrap(), [6; 5]);
    }

    #[test]
    fn the_hull_is_convex_below_the_curve_and_leaves_convex_curves_alone() {
        let point = |(cost, distortion)| Point { cost, distortion };
        let mut bumpy: Vec<Point> = [(0, 10.0), (1, 9.5), (2, 4.0), (3, 3.9), (4, 0.0)]
            .map(point)
            .to_vec();
        convexify(&mut bumpy);
        let distortions: Vec<f64> = bumpy.iter().map(|p| p.distortion).collect();
        assert_eq!(distortions, [10.0, 7.0, 4.0, 2.0, 0.0]);
        let before = bumpy.clone();
        convexify(&mut bumpy);
        assert_eq!(bumpy, before);
    }

    #[test]
    fn a_budget_of_many_states_is_kept_and_nearly_spent() {
        let curve = |scale: f64| -> Vec<Point> {
            (0..=300u64)
                .map(|k| Point {
                    cost: 1_000_003 * k + k % 2,
                    distortion: scale / (1.0 + k as f64),
                })
                .collect()
        };
        let curves: Vec<_> = [1.0, 3.0, 0.2, 5.0].map(curve).to_vec();
        let budget = 555_555_555;
        let (cost, _) = total(&curves, &knapsack(&curves, budget).unwrap());
        assert!(cost <= budget && cost > budget - 5_000_000, "{cost}");
    }

    proptest! {
        #[test]
        fn it_is_brute_force_on_up_to_four_curves(
            curves in prop::collection::vec(prop::collection::vec((1u64..9, 0.0f64..10.0), 1..6), 1..5),
            budget in 0u64..60,
        ) {
            let curves: Vec<Vec<Point>> = curves
                .into_iter()
                .map(|steps| {
                    let mut cost = 0;
                    steps
                        .into_iter()
                        .map(|(step, distortion)| {
                            cost += step;
                            Point { cost, distortion }
                        })
                        .collect()
                })
                .collect();
            match (knapsack(&curves, budget), brute_force(&curves, budget)) {
                (None, None) => {}
                (Some(choice), Some(best)) => {
                    let (cost, found) = total(&curves, &choice);
                    prop_assert!(cost <= budget);
                    prop_assert!((found - best).abs() < 1e-9);
                }
                (ours, best) => prop_assert!(false, "{ours:?} against {best:?}"),
            }
        }
    }
}
