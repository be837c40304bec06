//! What a linear repair could give back of a layer with fewer experts for each token.
//!
//! With y the dense output of the experts, ŷ that of fewer of them and α = Σ⟨y,ŷ⟩ / Σ⟨ŷ,ŷ⟩, the residual R = y − αŷ is
//! regressed on the layer's input x by a matrix of rank r, the least Σ‖R − B A x‖² over tokens. With H = Σ x xᵀ, C = Σ R xᵀ
//! and H = V Λ Vᵀ, the best product has B = U, the leading left singular vectors of M = C V Λ^(−1/2), and
//! A = Uᵀ M Λ^(−1/2) Vᵀ (reduced-rank regression, Izenman 1975); directions in which no token has anything are left out. What
//! stays is Σ‖R‖² less the squares of the r largest singular values.

use super::layer::Layer;
use super::routing::restricted;
use crate::{Error, Result};
use candle_core::{Device, Tensor};
use causal_lm::mixture::{LinearTerm, RoutingRule};
use faer::{Mat, MatRef};
use linalg::{Eigen, Entries, Vectors, add_product, eigen, left_singular, mirror_lower, product};
use rayon::prelude::*;

/// Tokens that are multiplied at a time.
const TOKENS: usize = 256;

/// Sums over the tokens of a layer.
pub(crate) struct Regression {
    /// Σ x xᵀ, the lower triangle.
    inputs: Mat<f64>,
    /// Σ y xᵀ and Σ ŷ xᵀ.
    cross: [Mat<f64>; 2],
    /// Σ⟨y,y⟩, Σ⟨y,ŷ⟩ and Σ⟨ŷ,ŷ⟩.
    products: [f64; 3],
}

/// B A, `[outputs, rank]` and `[rank, inputs]`, and Σ‖R − B A x‖².
pub(crate) struct Fit {
    pub(crate) a: Mat<f64>,
    pub(crate) b: Mat<f64>,
    pub(crate) error: f64,
}

impl Regression {
    pub(crate) fn new(hidden: usize) -> Self {
        Self {
            inputs: Mat::zeros(hidden, hidden),
            cross: [Mat::zeros(hidden, hidden), Mat::zeros(hidden, hidden)],
            products: [0.0; 3],
        }
    }

    /// Of the tokens of a layer that are routed by `rule`.
    pub(crate) fn of(layer: &Layer<'_>, rule: RoutingRule, hidden: usize) -> Result<Self> {
        let all: Vec<usize> = (0..layer.experts()).collect();
        let mut sums = Self::new(hidden);
        let mut seen = 0;
        layer.for_each_rerouted(&all, |batch| {
            let tokens = batch.outputs.tokens;
            for first in (0..tokens).step_by(TOKENS) {
                let last = (first + TOKENS).min(tokens);
                let outputs = |token: usize| {
                    let fewer = restricted(rule, batch.logits(token), |_| true);
                    let dense = batch.sum(token, batch.gates(token));
                    [dense, batch.sum(token, fewer.into_iter())]
                };
                let outputs: Vec<[Vec<f64>; 2]> =
                    (first..last).into_par_iter().map(outputs).collect();
                let inputs = layer.inputs(seen + first, last - first)?;
                let of = |at: usize| -> Vec<f64> {
                    outputs.iter().flat_map(|of| of[at].clone()).collect()
                };
                sums.add(&inputs, [of(0), of(1)]);
            }
            seen += tokens;
            Ok(())
        })?;
        mirror_lower(sums.inputs.as_mut());
        Ok(sums)
    }

    /// Adds tokens: x, y and ŷ, token by token.
    fn add(&mut self, inputs: &[f32], outputs: [Vec<f64>; 2]) {
        let hidden = self.inputs.nrows();
        let inputs: Vec<f64> = inputs.iter().map(|&x| f64::from(x)).collect();
        let tokens = inputs.len() / hidden.max(1);
        let columns = |rows: &Vec<f64>| -> Mat<f64> {
            MatRef::from_column_major_slice(rows, hidden, tokens).to_owned()
        };
        let x = columns(&inputs);
        let [y, fewer] = outputs.each_ref().map(columns);
        for (sum, (a, b)) in
            self.products
                .iter_mut()
                .zip([(&y, &y), (&y, &fewer), (&fewer, &fewer)])
        {
            *sum += linalg::dot(a.as_ref(), b.as_ref());
        }
        let sum = self.inputs.as_mut();
        add_product(sum, x.as_ref(), x.transpose(), 1.0, Entries::Lower);
        for (sum, outputs) in self.cross.iter_mut().zip([&y, &fewer]) {
            add_product(
                sum.as_mut(),
                outputs.as_ref(),
                x.transpose(),
                1.0,
                Entries::All,
            );
        }
    }

    /// α: the best factor on ŷ.
    pub(crate) fn factor(&self) -> f64 {
        let [_, both, fewer] = self.products;
        if fewer > 0.0 { both / fewer } else { 1.0 }
    }

    /// Σ‖y‖².
    pub(crate) fn output(&self) -> f64 {
        self.products[0]
    }

    /// Σ‖y − αŷ‖².
    pub(crate) fn residual(&self) -> f64 {
        let ([dense, both, fewer], factor) = (self.products, self.factor());
        (dense - 2.0 * factor * both + factor * factor * fewer).max(0.0)
    }

    /// The best product of rank `rank`, or of a smaller one where tokens allow no more; `None` without any token.
    pub(crate) fn solve(&self, rank: usize, layer: usize) -> Result<Option<Fit>> {
        let singular = |_| Error::Singular { layer };
        let Eigen { values, vectors } = eigen(self.inputs.as_ref()).map_err(singular)?;
        let hidden = values.len();
        let largest = values.first().copied().unwrap_or(0.0);
        let least = largest * hidden as f64 * f64::EPSILON;
        let seen = values.iter().filter(|&&value| value > least).count();
        if largest <= 0.0 || seen == 0 || rank == 0 {
            return Ok(None);
        }
        let factor = self.factor();
        let [dense, fewer] = &self.cross;
        let cross = Mat::from_fn(hidden, hidden, |i, j| {
            dense[(i, j)] - factor * fewer[(i, j)]
        });
        // V Λ^(−1/2) of the directions in which there are tokens.
        let whitening = Mat::from_fn(hidden, seen, |i, j| vectors[(i, j)] / values[j].sqrt());
        let white = product(cross.as_ref(), whitening.as_ref());
        let found = left_singular(white.as_ref(), Vectors::Thin).map_err(singular)?;
        let rank = rank.min(found.values.len());
        let b = found.vectors.subcols(0, rank).to_owned();
        let inner = product(b.transpose(), white.as_ref());
        let gained: f64 = found.values[..rank].iter().map(|s| s * s).sum();
        Ok(Some(Fit {
            a: product(inner.as_ref(), whitening.transpose()),
            b,
            error: (self.residual() - gained).max(0.0),
        }))
    }
}

impl Fit {
    /// The same in f32.
    pub(crate) fn term(&self) -> Result<LinearTerm> {
        let tensor = |matrix: &Mat<f64>| -> Result<Tensor> {
            let (rows, columns) = matrix.shape();
            let values = (0..rows).flat_map(|i| (0..columns).map(move |j| matrix[(i, j)] as f32));
            let values: Vec<f32> = values.collect();
            Ok(Tensor::from_vec(values, (rows, columns), &Device::Cpu)?)
        };
        Ok(LinearTerm::new(tensor(&self.a)?, tensor(&self.b)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use linalg::Cholesky;

    const HIDDEN: usize = 5;

    /// Numbers without order between −1 and 1, of as many tokens.
    fn numbers(tokens: usize, seed: u64) -> Vec<f64> {
        let mut state = seed;
        let mut next = || {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f64 / f64::from(1 << 23) - 1.0
        };
        (0..tokens * HIDDEN).map(|_| next()).collect()
    }

    fn problem(tokens: usize) -> (Vec<f32>, Vec<f64>, Vec<f64>) {
        let x: Vec<f32> = numbers(tokens, 3).iter().map(|&x| x as f32).collect();
        let fewer = numbers(tokens, 4);
        // The dense output depends on ŷ, on x, and on neither.
        let noise = numbers(tokens, 5);
        let y = (0..tokens * HIDDEN).map(|i| {
            let (token, c) = (i / HIDDEN, i % HIDDEN);
            let row = &x[token * HIDDEN..][..HIDDEN];
            let linear = f64::from(row[c]) - 0.5 * f64::from(row[(c + 1) % HIDDEN]);
            1.5 * fewer[i] + linear + 0.3 * noise[i]
        });
        let y = y.collect();
        (x, y, fewer)
    }

    fn sums((x, y, fewer): &(Vec<f32>, Vec<f64>, Vec<f64>)) -> Regression {
        let mut sums = Regression::new(HIDDEN);
        let half = y.len() / HIDDEN / 2 * HIDDEN;
        for range in [0..half, half..y.len()] {
            let outputs = [y[range.clone()].to_vec(), fewer[range.clone()].to_vec()];
            sums.add(&x[range], outputs);
        }
        mirror_lower(sums.inputs.as_mut());
        sums
    }

    /// Σ‖y − αŷ − W x‖², token by token.
    fn error(of: &(Vec<f32>, Vec<f64>, Vec<f64>), factor: f64, w: MatRef<'_, f64>) -> f64 {
        let (x, y, fewer) = of;
        let square = |i: usize| {
            let (token, c) = (i / HIDDEN, i % HIDDEN);
            let row = x[token * HIDDEN..][..HIDDEN].iter().enumerate();
            let linear: f64 = row.map(|(j, &x)| w[(c, j)] * f64::from(x)).sum();
            (y[i] - factor * fewer[i] - linear).powi(2)
        };
        (0..y.len()).map(square).sum()
    }

    #[test]
    fn the_error_is_that_of_the_product_and_falls_with_the_rank() {
        let problem = problem(40);
        let sums = sums(&problem);
        let zero = Mat::zeros(HIDDEN, HIDDEN);
        let scaled = error(&problem, sums.factor(), zero.as_ref());
        assert!((sums.residual() - scaled).abs() < 1e-9 * scaled);
        // No other factor does better.
        for factor in [sums.factor() - 1e-3, sums.factor() + 1e-3] {
            assert!(error(&problem, factor, zero.as_ref()) > scaled);
        }
        let mut before = scaled;
        for rank in 1..=HIDDEN {
            let fit = sums.solve(rank, 0).unwrap().unwrap();
            assert_eq!(
                (fit.b.shape(), fit.a.shape()),
                ((HIDDEN, rank), (rank, HIDDEN))
            );
            let w = product(fit.b.as_ref(), fit.a.as_ref());
            let found = error(&problem, sums.factor(), w.as_ref());
            assert!(
                (found - fit.error).abs() < 1e-9 * scaled,
                "{found} is not {}",
                fit.error
            );
            assert!(found < before);
            before = found;
        }
    }

    #[test]
    fn full_rank_is_least_squares() {
        let problem = problem(40);
        let sums = sums(&problem);
        let fit = sums.solve(HIDDEN, 0).unwrap().unwrap();
        let found = product(fit.b.as_ref(), fit.a.as_ref());
        // The normal equations.
        let right = Mat::from_fn(HIDDEN, HIDDEN, |i, j| {
            sums.cross[0][(j, i)] - sums.factor() * sums.cross[1][(j, i)]
        });
        let expected = Cholesky::new(sums.inputs.clone()).unwrap().solve(right);
        for i in 0..HIDDEN {
            for j in 0..HIDDEN {
                assert!((found[(i, j)] - expected[(j, i)]).abs() < 1e-10);
            }
        }
    }

    #[test]
    fn no_product_of_the_same_rank_found_step_by_step_is_better() {
        let problem = problem(40);
        let sums = sums(&problem);
        let cross = Mat::from_fn(HIDDEN, HIDDEN, |i, j| {
            sums.cross[0][(i, j)] - sums.factor() * sums.cross[1][(i, j)]
        });
        let inverse = Cholesky::new(sums.inputs.clone()).unwrap().into_inverse();
        for rank in 1..HIDDEN {
            let fit = sums.solve(rank, 0).unwrap().unwrap();
            // B and A in turn, each by least squares.
            let start = numbers(rank, 9);
            let mut a = Mat::from_fn(rank, HIDDEN, |i, j| start[i * HIDDEN + j]);
            let mut b = Mat::zeros(HIDDEN, rank);
            for _ in 0..2000 {
                let seen = product(
                    product(a.as_ref(), sums.inputs.as_ref()).as_ref(),
                    a.transpose(),
                );
                let right = product(a.as_ref(), cross.transpose());
                b = Cholesky::new(seen)
                    .unwrap()
                    .solve(right)
                    .transpose()
                    .to_owned();
                let square = product(b.transpose(), b.as_ref());
                let right = product(
                    product(b.transpose(), cross.as_ref()).as_ref(),
                    inverse.as_ref(),
                );
                a = Cholesky::new(square).unwrap().solve(right);
            }
            let w = product(b.as_ref(), a.as_ref());
            let found = error(&problem, sums.factor(), w.as_ref());
            assert!(
                (found - fit.error).abs() < 1e-6 * found,
                "{found} is not {}",
                fit.error
            );
        }
    }

    #[test]
    fn fewer_tokens_than_channels_are_fitted_exactly_and_none_are_nothing() {
        let problem = problem(3);
        let sums = sums(&problem);
        let fit = sums.solve(HIDDEN, 0).unwrap().unwrap();
        assert_eq!(fit.b.ncols(), 3);
        assert!(fit.error < 1e-9 * sums.residual());
        let w = product(fit.b.as_ref(), fit.a.as_ref());
        assert!(error(&problem, sums.factor(), w.as_ref()) < 1e-9 * sums.residual());
        assert!(Regression::new(HIDDEN).solve(2, 0).unwrap().is_none());
        assert_eq!(Regression::new(HIDDEN).factor(), 1.0);
    }
}
