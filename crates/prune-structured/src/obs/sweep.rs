//! One elimination sweep through a sublayer, from dense to the narrowest level asked for.
//!
//! H is factored once and inverted from its factor. Eliminating columns p changes what is left by
//!
//! ```text
//! B   ← B   − H⁻¹[:,p] ([H⁻¹]_pp)⁻¹ B_p
//! H⁻¹ ← H⁻¹ − H⁻¹[:,p] ([H⁻¹]_pp)⁻¹ H⁻¹[p,:]
//! ```
//!
//! so that B always is the least-squares refit on the columns left, and a level costs no more than
//! its copy. Units that are left stand in front, in no order, so that work shrinks with them. Only
//! the lower triangle of H⁻¹ is kept up to date.
//!
//! Memory for n columns and m outputs: 2 n² + 2 nm f64 while the factor of H is inverted, n² + 2 nm
//! after that. For 14,336 × 4,096 that is 4.2 and 2.6 GB, beside 0.8 GB of statistics in f32 where
//! the caller keeps them.

use super::{Problem, Units};
use crate::{Error, Result};
use candle_core::{Device, Tensor};
use faer::{Mat, MatMut, MatRef};
use linalg::{Cholesky, Entries, add_product, dot, product, solve_lower};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, VecDeque};

/// How many units go before scores are computed anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Rounds {
    /// This many neurons, or one step of attention.
    Fine {
        /// Neurons; the paper takes 16.
        neurons: usize,
    },
    /// As the published implementation: a sixteenth of the neurons, and all of attention by its
    /// first scores.
    Released,
}

impl Rounds {
    /// The paper's: 16 neurons or one unit of attention.
    pub const PAPER: Self = Self::Fine { neurons: 16 };

    /// 16 neurons in layers of at least 2,048, down to one in narrow ones.
    pub fn suggested(neurons: usize) -> Self {
        Self::Fine {
            neurons: (neurons / 128).clamp(1, 16),
        }
    }

    /// Steps of a round.
    fn steps(self, units: &Units) -> usize {
        // Neurons are units of a single column.
        let neurons = units.columns == 1;
        match self {
            Self::Fine { neurons: round } if neurons => (round / units.steps[0]).max(1),
            Self::Fine { .. } => 1,
            Self::Released if neurons => units.steps.len().div_ceil(16),
            Self::Released => units.steps.len(),
        }
    }
}

/// A sublayer at one width.
#[derive(Clone, Debug)]
pub struct Level {
    /// Steps that are left.
    pub steps: usize,
    /// Units that are left, ascending.
    pub units: Vec<usize>,
    /// The projection refitted to their columns, `[outputs, columns left]` f32.
    pub weight: Tensor,
    /// tr(ΔB ᵀ H ΔB): squared error of the output, damping included.
    pub error: f64,
}

/// What a sweep has found.
#[derive(Clone, Debug)]
pub struct Sweep {
    /// All units, best first: those never eliminated, then the others from the last to the first
    /// that went.
    pub order: Vec<usize>,
    /// The levels asked for, widest first.
    pub levels: Vec<Level>,
    /// tr(BᵀHB): squared output of the dense projection, damping included.
    pub energy: f64,
}

/// Eliminates units down to the smallest of `levels`, which count the steps that stay, and returns
/// the sublayer at each of them.
///
/// Levels are nested, none depends on which others were asked for, and equal scores go by id.
///
/// # Errors
/// [`Error::Singular`] when H is not positive definite, and levels beyond the number of steps.
pub fn sweep(problem: Problem, units: &Units, rounds: Rounds, levels: &[usize]) -> Result<Sweep> {
    let mut levels = levels.to_vec();
    levels.sort_unstable_by(|a, b| b.cmp(a));
    levels.dedup();
    if levels.first().is_some_and(|&most| most > units.steps.len())
        || units.count * units.columns != problem.columns()
    {
        return Err(Error::PlanMismatch(format!(
            "layer {}: levels {levels:?} of {} steps over {} columns",
            problem.layer,
            units.steps.len(),
            problem.columns()
        )));
    }
    let round = rounds.steps(units);
    let mut state = State::new(problem, units)?;
    let energy = state.energy;
    let mut gone: Vec<Vec<usize>> = Vec::new();
    // What the round has chosen and no level has needed gone yet, in order.
    let mut chosen: VecDeque<Vec<usize>> = VecDeque::new();
    let mut found = Vec::with_capacity(levels.len());
    let mut steps = units.steps.len();
    for level in levels {
        while steps > level {
            if chosen.is_empty() {
                chosen = state.choose(steps.saturating_sub(round)..steps)?.into();
            }
            let now: Vec<Vec<usize>> = chosen.drain(..chosen.len().min(steps - level)).collect();
            state.remove(&now)?;
            steps -= now.len();
            gone.extend(now);
        }
        found.push(state.level(steps)?);
    }
    let mut order = state.survivors(steps)?;
    order.extend(gone.into_iter().rev().flatten());
    Ok(Sweep {
        order,
        levels: found,
        energy,
    })
}

/// The running weights and inverse; unit `alive[i]` owns columns `i · columns ..` of them.
struct State<'a> {
    units: &'a Units,
    layer: usize,
    alive: Vec<usize>,
    /// Bᵀ, `[outputs, columns]`.
    weight: Mat<f64>,
    /// (H B)ᵀ of the dense B, which stays.
    target: Mat<f64>,
    /// H⁻¹ of the columns left; its lower triangle counts.
    inverse: Mat<f64>,
    energy: f64,
    error: f64,
    dead: BTreeMap<usize, Vec<f32>>,
    gains: Option<Vec<f64>>,
}

impl<'a> State<'a> {
    fn new(problem: Problem, units: &'a Units) -> Result<Self> {
        let target = product(problem.weight.as_ref(), problem.gram.as_ref());
        let singular = problem.singular();
        let Problem {
            weight,
            gram,
            dead,
            gains,
            layer,
        } = problem;
        let factor = Cholesky::new(gram).map_err(|_| singular)?;
        let energy = dot(weight.as_ref(), target.as_ref());
        Ok(Self {
            units,
            layer,
            alive: (0..units.count).collect(),
            inverse: factor.into_inverse(),
            weight,
            target,
            energy,
            error: 0.0,
            dead,
            gains,
        })
    }

    /// s_g of every unit left, in their places.
    fn scores(&self) -> Result<Vec<f64>> {
        let c = self.units.columns;
        let place = |i: usize| -> Result<f64> {
            let at = i * c;
            let weight = self.weight.as_ref().subcols(at, c);
            let along = dot(weight, self.target.as_ref().subcols(at, c));
            let block = self.inverse.as_ref().submatrix(at, at, c, c);
            let loss = if c == 1 {
                let square: f64 = weight.col(0).iter().map(|w| w * w).sum();
                square / block[(0, 0)]
            } else {
                let solved = half_solved(block, weight).ok_or(self.singular())?;
                dot(solved.as_ref(), solved.as_ref())
            };
            Ok(0.5 * loss + along)
        };
        (0..self.alive.len()).into_par_iter().map(place).collect()
    }

    /// The lowest units, for the steps `going`, the first to go in front.
    fn choose(&self, going: std::ops::Range<usize>) -> Result<Vec<Vec<usize>>> {
        let mut best = self.best_first()?;
        Ok(going
            .rev()
            .map(|step| {
                let each = self.units.steps[step] / self.units.pools;
                // Within a step the better stand in front, as in a ranking.
                best.iter_mut()
                    .flat_map(|pool| pool.split_off(pool.len() - each))
                    .collect()
            })
            .collect())
    }

    /// Eliminates units and lets the others take over.
    fn remove(&mut self, units: &[Vec<usize>]) -> Result<()> {
        let mut removed = vec![false; self.units.count];
        units
            .iter()
            .flatten()
            .for_each(|&unit| removed[unit] = true);
        // Units that go change places with the last that stay.
        let stay = self.alive.iter().filter(|&&u| !removed[u]).count();
        let mut from = stay;
        for to in 0..stay {
            if removed[self.alive[to]] {
                while removed[self.alive[from]] {
                    from += 1;
                }
                self.swap(to, from);
                from += 1;
            }
        }
        let columns = self.alive.len() * self.units.columns;
        let left = stay * self.units.columns;
        let going = columns - left;
        let weight = self.weight.as_ref();
        let inverse = self.inverse.as_ref();
        let block = inverse.submatrix(left, left, going, going);
        let factor = Cholesky::new(block.to_owned()).map_err(|_| self.singular())?;
        // L⁻¹ B_p and L⁻¹ H⁻¹[p, :] with L Lᵀ = [H⁻¹]_pp.
        let mut lost = weight.subcols(left, going).transpose().to_owned();
        solve_lower(factor.l(), lost.as_mut());
        let mut cross = inverse.submatrix(left, 0, going, left).to_owned();
        solve_lower(factor.l(), cross.as_mut());
        self.error += dot(lost.as_ref(), lost.as_ref());
        add_product(
            self.weight.as_mut().subcols_mut(0, left),
            lost.transpose(),
            cross.as_ref(),
            -1.0,
            Entries::All,
        );
        add_product(
            self.inverse.as_mut().submatrix_mut(0, 0, left, left),
            cross.transpose(),
            cross.as_ref(),
            -1.0,
            Entries::Lower,
        );
        self.alive.truncate(stay);
        Ok(())
    }

    /// Exchanges the places of two units.
    fn swap(&mut self, a: usize, b: usize) {
        self.alive.swap(a, b);
        let (a, b) = (a.min(b), a.max(b));
        for i in 0..self.units.columns {
            let (a, b) = (a * self.units.columns + i, b * self.units.columns + i);
            swap_columns(self.weight.as_mut(), a, b);
            swap_columns(self.target.as_mut(), a, b);
            let used = self.alive.len() * self.units.columns;
            swap_symmetric(self.inverse.as_mut().submatrix_mut(0, 0, used, used), a, b);
        }
    }

    /// The units left, best first by their scores now, in steps.
    fn survivors(&self, steps: usize) -> Result<Vec<usize>> {
        let mut best = self.best_first()?;
        let mut order = Vec::with_capacity(self.alive.len());
        for step in &self.units.steps[..steps] {
            for pool in &mut best {
                order.extend(pool.drain(..step / self.units.pools));
            }
        }
        Ok(order)
    }

    /// The units left of each pool, best first by their scores now; equal scores go by id.
    fn best_first(&self) -> Result<Vec<VecDeque<usize>>> {
        let scores = self.scores()?;
        let mut best: Vec<usize> = (0..self.alive.len()).collect();
        best.sort_by(|&a, &b| {
            let id = |i: usize| self.alive[i];
            scores[b].total_cmp(&scores[a]).then(id(a).cmp(&id(b)))
        });
        let mut pools = vec![VecDeque::new(); self.units.pools];
        for i in best {
            pools[self.units.pool(self.alive[i])].push_back(self.alive[i]);
        }
        Ok(pools)
    }

    fn level(&self, steps: usize) -> Result<Level> {
        let mut places: Vec<usize> = (0..self.alive.len()).collect();
        places.sort_by_key(|&i| self.alive[i]);
        let units: Vec<usize> = places.iter().map(|&i| self.alive[i]).collect();
        // Where each column stands now, and what stands for it where its input was always zero.
        let columns: Vec<(usize, Option<&Vec<f32>>)> = self
            .units
            .columns_of(&places)
            .into_iter()
            .zip(self.units.columns_of(&units))
            .map(|(place, column)| (place, self.dead.get(&column)))
            .collect();
        let outputs = self.weight.nrows();
        let value = |o: usize, (place, dead): (usize, Option<&Vec<f32>>)| match dead {
            Some(dense) => dense[o],
            None => match &self.gains {
                Some(gains) => (self.weight[(o, place)] / gains[o]) as f32,
                None => self.weight[(o, place)] as f32,
            },
        };
        let weight: Vec<f32> = (0..outputs)
            .into_par_iter()
            .flat_map_iter(|o| columns.iter().map(move |&column| value(o, column)))
            .collect();
        Ok(Level {
            steps,
            units,
            weight: Tensor::from_vec(weight, (outputs, columns.len()), &Device::Cpu)?,
            error: self.error,
        })
    }

    fn singular(&self) -> Error {
        Error::Singular { layer: self.layer }
    }
}

/// L⁻¹ Wᵀ with L Lᵀ = `block`; `None` when the block is not positive definite.
fn half_solved(block: MatRef<'_, f64>, weight: MatRef<'_, f64>) -> Option<Mat<f64>> {
    let factor = Cholesky::new(block.to_owned()).ok()?;
    let mut solved = weight.transpose().to_owned();
    solve_lower(factor.l(), solved.as_mut());
    Some(solved)
}

fn swap_columns(mut matrix: MatMut<'_, f64>, a: usize, b: usize) {
    for i in 0..matrix.nrows() {
        let kept = matrix[(i, a)];
        matrix[(i, a)] = matrix[(i, b)];
        matrix[(i, b)] = kept;
    }
}

/// Exchanges rows and columns `a < b` of a symmetric matrix stored in its lower triangle.
fn swap_symmetric(mut matrix: MatMut<'_, f64>, a: usize, b: usize) {
    let rows = matrix.nrows();
    let mut swap = |x: (usize, usize), y: (usize, usize)| {
        let kept = matrix[x];
        matrix[x] = matrix[y];
        matrix[y] = kept;
    };
    swap((a, a), (b, b));
    (0..a).for_each(|k| swap((a, k), (b, k)));
    (a + 1..b).for_each(|k| swap((k, a), (b, k)));
    (b + 1..rows).for_each(|k| swap((k, a), (k, b)));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compensation::tests::problem as golden;
    use crate::compensation::{Bias, Compensation, NoCompensation, complement, refit};
    use crate::obs::{Nested, error_curve};
    use proptest::prelude::*;

    fn problem(ridge: f64) -> Problem {
        let (x, weight) = golden();
        Problem::new(&weight, &gram(&x), ridge, 0).unwrap()
    }

    fn gram(x: &Tensor) -> Tensor {
        x.t().unwrap().matmul(x).unwrap()
    }

    const ONE: Rounds = Rounds::Fine { neurons: 1 };

    #[test]
    fn first_scores_are_those_of_the_published_implementation() {
        for (units, golden) in [
            (
                Units::single(6, 1),
                vec![44.30209, 33.01045, 15.47837, 30.40057, 38.24950, 36.42971],
            ),
            (Units::single(3, 2), vec![78.50838, 45.32466, 74.86420]),
        ] {
            let state = State::new(problem(0.01), &units).unwrap();
            for (ours, golden) in state.scores().unwrap().iter().zip(golden) {
                assert!((ours - golden).abs() < 2e-5, "{ours} is not {golden}");
            }
        }
    }

    #[test]
    fn kept_sets_and_losses_are_those_of_the_published_implementation() {
        let neurons: [(&[usize], f64); 4] = [
            (&[0, 1, 3, 4, 5], -80.33347),
            (&[0, 1, 4, 5], -74.03837),
            (&[0, 4, 5], -67.27440),
            (&[4, 5], -54.62428),
        ];
        let swept = sweep(problem(0.01), &Units::single(6, 1), ONE, &[2, 3, 4, 5]).unwrap();
        for (level, (kept, loss)) in swept.levels.iter().zip(neurons) {
            assert_eq!(level.units, kept);
            // The implementation leaves out the half of the energy that nothing changes.
            let ours = (level.error - swept.energy) / 2.0;
            assert!((ours - loss).abs() < 2e-5, "{ours} is not {loss}");
        }
        let units = Units::single(3, 2);
        let one_at_a_time = sweep(problem(0.01), &units, ONE, &[2]).unwrap();
        assert_eq!(one_at_a_time.levels[0].units, [0, 2]);
        let swept = sweep(problem(0.01), &units, Rounds::Released, &[1, 2]).unwrap();
        assert_eq!(swept.levels[0].units, [0, 2]);
        assert_eq!(swept.levels[1].units, [0]);
        let ours = (swept.levels[1].error - swept.energy) / 2.0;
        assert!((ours + 46.98471).abs() < 2e-5, "{ours}");
    }

    #[test]
    fn refitted_rows_are_those_of_the_published_implementation() {
        let golden: [[f32; 3]; 4] = [
            [-1.37619, 0.11317, 1.15035],
            [-0.54429, 1.19637, -0.30064],
            [-1.40433, 0.59412, -1.04245],
            [-0.34822, -1.56315, -0.28744],
        ];
        let swept = sweep(problem(0.01), &Units::single(6, 1), ONE, &[4]).unwrap();
        let rows = swept.levels[0].weight.t().unwrap();
        for (row, golden) in rows.to_vec2::<f32>().unwrap().iter().zip(golden) {
            for (ours, golden) in row.iter().zip(golden) {
                assert!((ours - golden).abs() < 2e-5, "{ours} is not {golden}");
            }
        }
    }

    #[test]
    fn gains_weight_errors_and_leave_refits_alone() {
        let sweep_with = |gains: Option<Vec<f64>>| {
            let problem = problem(0.01).with_gains(gains).unwrap();
            sweep(problem, &Units::single(6, 1), ONE, &[2, 3, 4, 5, 6]).unwrap()
        };
        let plain = sweep_with(None);
        let doubled = sweep_with(Some(vec![-2.0; 3]));
        assert_eq!(doubled.order, plain.order);
        for (a, b) in doubled.levels.iter().zip(&plain.levels) {
            assert_eq!(a.units, b.units);
            assert!((a.error - 4.0 * b.error).abs() < 1e-9 * plain.energy);
            assert!(gap(&a.weight, &b.weight) < 1e-5);
        }
        // An output that a norm removes has no say: the order is that of the others alone.
        let (x, weight) = golden();
        let others = Problem::new(&weight.narrow(0, 1, 2).unwrap(), &gram(&x), 0.01, 0).unwrap();
        let others = sweep(others, &Units::single(6, 1), ONE, &[2, 3, 4, 5, 6]).unwrap();
        let removed = sweep_with(Some(vec![0.0, 1.0, 1.0]));
        assert_eq!(removed.order, others.order);
        assert_ne!(removed.order, plain.order);
        let of_removed =
            |sweep: &Sweep| sweep.levels.iter().find(|l| l.steps == 3).unwrap().clone();
        let rows = of_removed(&removed).weight.narrow(0, 1, 2).unwrap();
        assert!(gap(&rows, &of_removed(&others).weight) < 1e-5);
    }

    #[test]
    fn the_widest_level_is_the_dense_weight_and_the_narrowest_is_empty() {
        let (_, weight) = golden();
        let swept = sweep(problem(0.01), &Units::single(6, 1), ONE, &[0, 6]).unwrap();
        let dense = weight.to_vec2::<f32>().unwrap();
        assert_eq!(swept.levels[0].weight.to_vec2::<f32>().unwrap(), dense);
        assert_eq!(swept.levels[0].error, 0.0);
        assert_eq!(swept.levels[1].weight.dims(), [3, 0]);
        let all_lost = (swept.levels[1].error - swept.energy).abs();
        assert!(all_lost < 1e-9 * swept.energy);
    }

    /// A random weight `[5, n]` and Gram matrix of `tokens` random inputs, with a dead column.
    fn random(n: usize, tokens: usize, seed: u64) -> (Tensor, Tensor) {
        use rand::{Rng, SeedableRng};
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
        let mut tensor = |rows: usize, dead: Option<usize>| {
            let draw = |i: usize| {
                let x: f32 = rng.random_range(-1.0..1.0);
                if dead == Some(i % n) { 0.0 } else { x }
            };
            let values: Vec<f32> = (0..rows * n).map(draw).collect();
            Tensor::from_vec(values, (rows, n), &Device::Cpu).unwrap()
        };
        let weight = tensor(5, None);
        (weight, gram(&tensor(tokens, Some(n / 2))))
    }

    fn gap(a: &Tensor, b: &Tensor) -> f32 {
        let gap = (a - b).unwrap().abs().unwrap();
        gap.flatten_all()
            .unwrap()
            .max(0)
            .unwrap()
            .to_scalar()
            .unwrap()
    }

    proptest! {
        #[test]
        fn running_weights_are_the_refit_and_errors_grow_over_nested_levels(
            units in 4usize..12,
            columns in 1usize..4,
            pools in 1usize..3,
            round in 1usize..4,
            seed in 0u64..1000,
        ) {
            let count = units * pools;
            let n = count * columns;
            let (weight, gram) = random(n, 3 * n, seed);
            let problem = Problem::new(&weight, &gram, 0.01, 0).unwrap();
            let structure = Units::new(columns, count, pools, vec![pools; units]);
            let levels: Vec<usize> = (1..=units).collect();
            let rounds = Rounds::Fine { neurons: round };
            let swept = sweep(problem.clone(), &structure, rounds, &levels).unwrap();
            let alone = sweep(problem.clone(), &structure, rounds, &[units / 2]).unwrap();
            prop_assert_eq!(&alone.levels[0].units, &swept.levels[units - units / 2].units);
            let nested = Nested::new(&problem, &structure.columns_of(&swept.order)).unwrap();
            let errors = nested.errors();
            let uncompensated = error_curve(
                &problem, &structure.columns_of(&swept.order), NoCompensation.into(), (&vec![0.0; n], 0),
            ).unwrap();
            let mut narrower: Option<&Level> = None;
            for level in swept.levels.iter().rev() {
                let kept = structure.columns_of(&level.units);
                let (columns, refitted) = nested.refit(kept.len()).unwrap();
                prop_assert_eq!(&columns, &kept);
                prop_assert!(gap(&level.weight, &refitted) < 1e-4);
                if kept.len() < n {
                    let compensated = refit(&weight, &gram, &kept, &complement(&kept, n), 0.01, 0);
                    prop_assert!(gap(&level.weight, &compensated.unwrap()) < 1e-3);
                }
                prop_assert!((level.error - errors[kept.len()]).abs() < 1e-6 * swept.energy);
                prop_assert!(level.error <= uncompensated[kept.len()] + 1e-9 * swept.energy);
                if let Some(narrower) = narrower {
                    prop_assert!(narrower.units.iter().all(|unit| level.units.contains(unit)));
                    prop_assert!(narrower.error >= level.error);
                }
                for pool in 0..pools {
                    let of_pool = level.units.iter().filter(|&&u| structure.pool(u) == pool);
                    prop_assert_eq!(of_pool.count(), level.steps);
                }
                narrower = Some(level);
            }
        }

        #[test]
        fn curves_without_a_refit_are_the_errors_of_leaving_columns_out(seed in 0u64..100, bias in any::<bool>()) {
            let (weight, gram) = random(8, 20, seed);
            let problem = Problem::new(&weight, &gram, 0.01, 0).unwrap();
            let mean: Vec<f64> = (0..8).map(|c| c as f64 / 40.0).collect();
            let order = [3, 1, 7, 0, 6, 2, 5, 4];
            let (compensation, tokens): (Compensation, _) = if bias { (Bias.into(), 20) } else { (NoCompensation.into(), 0) };
            let curve = error_curve(&problem, &order, compensation, (&mean, tokens)).unwrap();
            for kept in 0..=8 {
                let mut naive = 0.0;
                for o in 0..5 {
                    for &i in &order[kept..] {
                        for &j in &order[kept..] {
                            let h = problem.gram[(i, j)] - tokens as f64 * mean[i] * mean[j];
                            naive += problem.weight[(o, i)] * h * problem.weight[(o, j)];
                        }
                    }
                }
                prop_assert!((curve[kept] - naive).abs() < 1e-9, "{} {}", curve[kept], naive);
            }
        }
    }

    #[test]
    fn sweeps_and_refits_do_not_depend_on_the_number_of_threads() {
        // Wide enough for products and factorisations to be divided among threads.
        let n = 1100;
        let (weight, gram) = random(n, 1300, 1);
        let kept: Vec<usize> = (0..n).step_by(2).collect();
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new()
                .num_threads(threads)
                .build()
                .unwrap();
            pool.install(|| {
                let problem = Problem::new(&weight, &gram, 0.01, 0).unwrap();
                let neurons = Units::single(n, 1);
                let swept = sweep(problem.clone(), &neurons, Rounds::PAPER, &[500, 800]).unwrap();
                let heads = Units::single(n / 100, 100);
                let attention = sweep(problem.clone(), &heads, ONE, &[5]).unwrap();
                let nested = Nested::new(&problem, &swept.order).unwrap();
                let refitted = refit(&weight, &gram, &kept, &complement(&kept, n), 0.01, 0);
                let weights = [
                    swept.levels[1].weight.clone(),
                    attention.levels[0].weight.clone(),
                    nested.refit(600).unwrap().1,
                    refitted.unwrap(),
                ];
                let weights = weights.map(|weight| weight.to_vec2::<f32>().unwrap());
                let errors = (swept.levels[1].error, attention.levels[0].error);
                (swept.order, weights, errors, nested.errors())
            })
        };
        let one = run(1);
        for threads in [2, 3] {
            assert!(run(threads) == one, "{threads} threads");
        }
    }
}
