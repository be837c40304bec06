//! Neurons ranked by what their states do: a greedy basis of all states (span), or one pass over their flow.
//!
//! A consumer reads linear combinations of states, so a neuron can be removed without loss when its state is an affine
//! combination of the others': the closure operator is the affine span. It has the exchange property, neurons form a matroid,
//! and the greedy choice of a basis is optimal for additive weights (Rado 1957, Edmonds 1971). With noise the greedy choice is
//! a pivoted Cholesky factorisation of the covariance of the states, weighted by how the states are read.

use super::{Method, products, score::Scores};
use crate::{
    calibration::Calibration,
    error::{Error, Result},
    rnn::{Rnn, Role},
};

/// A state whose remaining variance is below this share of its first one is in the span of those chosen.
const RESIDUAL: f64 = 1e-7;

/// Weights that read the states of a layer, `[rows, n]` each, with the factor that makes matrices comparable.
struct Consumers<'a> {
    matrices: Vec<(&'a [f32], f64)>,
    n: usize,
}

impl<'a> Consumers<'a> {
    /// `W_hh`, `W_ih` of the layer above or the read-out, and readers outside the network; each divided by the deviation of its
    /// entries, read-outs also weighted up to as many rows as `W_hh` has.
    fn of(rnn: &'a Rnn, layer: usize, outside: &'a [f32]) -> Self {
        let shape = rnn.config();
        let n = shape.hidden[layer];
        let value = |role: Role| {
            let at = rnn.roles().iter().position(|&r| r == role);
            at.and_then(|k| rnn.params().iter().nth(k))
                .map_or(&[][..], |p| p.data.as_slice())
        };
        let w_hh = value(Role::RecurrentWeight(layer));
        let mut matrices = vec![(w_hh, 1.0)];
        let mut read_outs = vec![outside];
        match layer + 1 < shape.hidden.len() {
            true => matrices.push((value(Role::InputWeight(layer + 1)), 1.0)),
            false => read_outs.push(value(Role::OutputWeight)),
        }
        for w in read_outs.into_iter().filter(|w| !w.is_empty()) {
            matrices.push((w, (w_hh.len() as f64 / w.len() as f64).sqrt()));
        }
        for (w, factor) in &mut matrices {
            let deviation = deviation(w);
            *factor = if deviation > 0.0 {
                *factor / deviation
            } else {
                0.0
            };
        }
        Self { matrices, n }
    }

    /// VᵀV, `n * n`.
    fn gram(&self) -> Vec<f64> {
        products::gram(&self.matrices, self.n)
    }

    /// Norms of the columns of V.
    fn norms(&self) -> Vec<f64> {
        let mut squares = vec![0.0; self.n];
        for (w, factor) in &self.matrices {
            for row in w.chunks_exact(self.n) {
                for (s, &v) in squares.iter_mut().zip(row) {
                    *s += (factor * f64::from(v)).powi(2);
                }
            }
        }
        squares.into_iter().map(f64::sqrt).collect()
    }
}

fn deviation(w: &[f32]) -> f64 {
    let n = w.len().max(1) as f64;
    let mean = w.iter().map(|&v| f64::from(v)).sum::<f64>() / n;
    let square = w
        .iter()
        .map(|&v| (f64::from(v) - mean).powi(2))
        .sum::<f64>();
    (square / n).sqrt()
}

/// All neurons in the order in which they are chosen. Each step takes the state that explains most of what is read:
/// `argmax_j ‖S_j‖² / C_jj` for `S = V C`, then removes what it explains from `S` and `C`. `‖S_j‖²` is the diagonal of
/// `T = C G C` with `G = VᵀV`, so that a step costs O(n²) whatever the number of readers. States without remaining variance
/// come last, those with the larger first variance first.
fn greedy(mut c: Vec<f64>, gram: Option<&[f64]>, n: usize) -> Vec<usize> {
    let first: Vec<f64> = (0..n).map(|j| c[j * n + j]).collect();
    let largest = first.iter().copied().fold(0.0, f64::max);
    let mut t = match gram {
        Some(g) => products::product(&products::product(&c, g, n), &c, n),
        None => products::product(&c, &c, n),
    };
    let mut chosen = Vec::with_capacity(n);
    let mut free = vec![true; n];
    let (mut pivot, mut explained) = (vec![0.0; n], vec![0.0; n]);
    loop {
        let value = |j: usize| t[j * n + j] / c[j * n + j];
        let varies = |j: usize| {
            let left = c[j * n + j];
            left > RESIDUAL * first[j] && left > f64::EPSILON * largest
        };
        let best = (0..n)
            .filter(|&j| free[j] && varies(j))
            .max_by(|&a, &b| value(a).total_cmp(&value(b)).then(b.cmp(&a)));
        let Some(j) = best else { break };
        free[j] = false;
        chosen.push(j);
        let (cjj, tjj) = (c[j * n + j], t[j * n + j]);
        pivot.copy_from_slice(&c[j * n..(j + 1) * n]);
        // S loses S_j c / C_jj, so T loses T_j c' + c T_j' - c T_jj c' with c = C_j / C_jj.
        let row = &t[j * n..(j + 1) * n];
        explained
            .iter_mut()
            .zip(row)
            .zip(&pivot)
            .for_each(|((e, t), p)| *e = t - tjj * p / cjj);
        let tj: Vec<f64> = row.to_vec();
        for i in (0..n).filter(|&i| free[i]) {
            let share = pivot[i] / cjj;
            let ct = &mut c[i * n..(i + 1) * n];
            ct.iter_mut().zip(&pivot).for_each(|(c, p)| *c -= share * p);
            let tt = &mut t[i * n..(i + 1) * n];
            let ti = tj[i] / cjj;
            for ((t, e), p) in tt.iter_mut().zip(&explained).zip(&pivot) {
                *t -= ti * p + share * e;
            }
        }
    }
    let mut rest: Vec<usize> = (0..n).filter(|&j| free[j]).collect();
    rest.sort_by(|&a, &b| first[b].total_cmp(&first[a]).then(a.cmp(&b)));
    chosen.extend(rest);
    chosen
}

fn check_readers(readers: &[Vec<f32>], hidden: &[usize]) -> Result<()> {
    let whole = |(read, n): (&Vec<f32>, &usize)| read.len().is_multiple_of(*n);
    let fits = readers.len() == hidden.len() && readers.iter().zip(hidden).all(whole);
    if readers.is_empty() || fits {
        return Ok(());
    }
    Err(Error::Shape {
        tensor: "readers".into(),
        expected: format!("rows of {hidden:?} weights, a list for each layer"),
        found: readers.iter().map(Vec::len).collect(),
    })
}

/// Scores of all neurons of a network by [`Method::Span`], [`Method::Flow`] or [`Method::PivotedCholesky`]. For the greedy
/// methods a score is the share of the neurons of its layer that are chosen later. `readers` is none at all or one for each layer.
pub(super) fn scores(
    rnn: &Rnn,
    method: Method,
    calibration: &Calibration,
    readers: &[Vec<f32>],
) -> Result<Scores> {
    let shape = rnn.config();
    calibration.check(shape.input.width(), &shape.hidden)?;
    check_readers(readers, &shape.hidden)?;
    let (mut values, mut ties) = (Vec::new(), Vec::new());
    for (layer, moments) in calibration.layers.iter().enumerate() {
        let n = shape.hidden[layer];
        let outside = readers.get(layer).map_or(&[][..], Vec::as_slice);
        let consumers = Consumers::of(rnn, layer, outside);
        let deviations = moments.after.deviations();
        match method {
            Method::Flow => {
                let read = consumers.norms().into_iter();
                let flow: Vec<f64> = deviations.iter().zip(read).map(|(d, v)| d * v).collect();
                let largest = flow.iter().copied().fold(f64::MIN_POSITIVE, f64::max);
                values.extend(flow.iter().map(|f| f / largest));
            }
            Method::Span | Method::PivotedCholesky => {
                let gram = (method == Method::Span).then(|| consumers.gram());
                let order = greedy(moments.after.covariance(), gram.as_deref(), n);
                let start = values.len();
                values.resize(start + n, 0.0);
                for (place, &j) in order.iter().enumerate() {
                    values[start + j] = (n - place) as f64 / n as f64;
                }
            }
            other => {
                return Err(Error::Setting {
                    setting: "method",
                    reason: format!("{other} does not rank neurons by a calibration"),
                });
            }
        }
        ties.extend(deviations);
    }
    Ok(Scores {
        values,
        ties,
        cuts: Vec::new(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::seed;
    use rand::Rng;

    /// Covariance of `x -> mix x` for independent x of unit variance, `mix` [n, k].
    fn covariance(mix: &[Vec<f64>]) -> Vec<f64> {
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        mix.iter()
            .flat_map(|a| mix.iter().map(move |b| dot(a, b)))
            .collect()
    }

    #[test]
    fn a_planted_basis_of_duplicates_and_sums_is_spanned_by_the_first_neurons() {
        let mut rng = seed::rng(4, "span");
        for round in 0..20 {
            // 5 independent directions, 7 duplicates or sums of two.
            let mut mix: Vec<Vec<f64>> = (0..5)
                .map(|k| (0..5).map(|j| f64::from(u8::from(j == k))).collect())
                .collect();
            for _ in 0..7 {
                let (a, b) = (rng.random_range(0..5), rng.random_range(0..5));
                let row = (0..5).map(|j| mix[a][j] * 0.7 + mix[b][j] * 0.2).collect();
                mix.push(row);
            }
            let gram: Vec<f64> = {
                let v: Vec<Vec<f64>> = (0..12)
                    .map(|_| (0..30).map(|_| rng.random_range(-1.0..1.0)).collect())
                    .collect();
                covariance(&v)
            };
            for gram in [None, Some(gram.as_slice())] {
                let order = greedy(covariance(&mix), gram, 12);
                let mut sorted = order.clone();
                sorted.sort_unstable();
                assert_eq!(sorted, (0..12).collect::<Vec<_>>());
                // Rank of the first five by Gaussian elimination.
                let mut rows: Vec<Vec<f64>> = order[..5].iter().map(|&j| mix[j].clone()).collect();
                let mut rank = 0;
                for column in 0..5 {
                    let Some(p) = (rank..5).find(|&r| rows[r][column].abs() > 1e-9) else {
                        continue;
                    };
                    rows.swap(rank, p);
                    for r in rank + 1..5 {
                        let f = rows[r][column] / rows[rank][column];
                        (0..5).for_each(|k| rows[r][k] -= f * rows[rank][k]);
                    }
                    rank += 1;
                }
                assert_eq!(rank, 5, "round {round}: {order:?}");
            }
        }
    }

    #[test]
    fn each_choice_is_the_best_by_the_definition_with_all_readers() {
        let mut rng = seed::rng(5, "span");
        let (n, m) = (9, 14);
        let mut random = |rows: usize, cols: usize| -> Vec<Vec<f64>> {
            (0..rows)
                .map(|_| (0..cols).map(|_| rng.random_range(-1.0..1.0)).collect())
                .collect()
        };
        let (mix, v) = (random(n, 20), random(m, n));
        let c0 = covariance(&mix);
        let gram: Vec<f64> = (0..n * n)
            .map(|e| (0..m).map(|r| v[r][e / n] * v[r][e % n]).sum())
            .collect();
        let order = greedy(c0.clone(), Some(&gram), n);
        // The definition: S = V C, updated itself.
        let mut c = c0;
        let mut s: Vec<Vec<f64>> = (0..m)
            .map(|r| {
                (0..n)
                    .map(|j| (0..n).map(|k| v[r][k] * c[k * n + j]).sum())
                    .collect()
            })
            .collect();
        let mut free: Vec<usize> = (0..n).collect();
        for &found in &order {
            let value = |j: usize| (0..m).map(|r| s[r][j] * s[r][j]).sum::<f64>() / c[j * n + j];
            let best = free
                .iter()
                .copied()
                .max_by(|&a, &b| value(a).total_cmp(&value(b)))
                .unwrap();
            assert_eq!(best, found);
            free.retain(|&j| j != found);
            let row: Vec<f64> = (0..n)
                .map(|j| c[found * n + j] / c[found * n + found])
                .collect();
            for r in &mut s {
                let own = r[found];
                (0..n).for_each(|j| r[j] -= own * row[j]);
            }
            let column: Vec<f64> = (0..n).map(|i| c[i * n + found]).collect();
            for i in 0..n {
                (0..n).for_each(|j| c[i * n + j] -= column[i] * row[j]);
            }
        }
    }
}
