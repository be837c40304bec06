//! Errors and refits of every prefix of an order of columns, from one factorisation.
//!
//! With H in that order and H = L Lᵀ, Y = Lᵀ B holds all of it: keeping the first k columns and
//! refitting them, `B_k = L_kk⁻ᵀ Y_k`, leaves the squared output error `Σ_{i ≥ k} ‖Y_i‖²`.

use super::Problem;
use crate::compensation::Compensation;
use crate::{Error, Result};
use candle_core::{Device, Tensor};
use faer::Mat;
use linalg::{Cholesky, product, solve_upper};
use std::collections::BTreeMap;

/// A projection with its columns in an order, factored.
///
/// Memory for n columns and m outputs: n² + 2 nm f64.
#[derive(Clone, Debug)]
pub struct Nested {
    order: Vec<usize>,
    factor: Mat<f64>,
    /// Lᵀ B, `[columns, outputs]`.
    half: Mat<f64>,
    dead: BTreeMap<usize, Vec<f32>>,
    gains: Option<Vec<f64>>,
}

impl Nested {
    /// Puts the columns of `problem` into `order`, a permutation of them.
    ///
    /// # Errors
    /// [`Error::Singular`] when H is not positive definite.
    pub fn new(problem: &Problem, order: &[usize]) -> Result<Self> {
        let n = order.len();
        let gram = Mat::from_fn(n, n, |i, j| problem.gram[(order[i], order[j])]);
        let factor = Cholesky::new(gram).map_err(|_| problem.singular())?;
        let outputs = problem.weight.nrows();
        let weight = Mat::from_fn(n, outputs, |i, o| problem.weight[(o, order[i])]);
        let factor = factor.into_l();
        let half = product(factor.transpose(), weight.as_ref());
        Ok(Self {
            order: order.to_vec(),
            factor,
            half,
            dead: problem.dead.clone(),
            gains: problem.gains.clone(),
        })
    }

    /// Squared output error (damping included) when the first k columns are kept and refitted, for
    /// k = 0 ..= columns; it never rises.
    pub fn errors(&self) -> Vec<f64> {
        let row = |i: usize| self.half.row(i).iter().map(|y| y * y).sum::<f64>();
        suffix_sums((0..self.order.len()).map(row).collect())
    }

    /// The first `kept` columns refitted, `[outputs, kept]` f32, their ids ascending.
    ///
    /// # Errors
    /// When `kept` is more than there are.
    pub fn refit(&self, kept: usize) -> Result<(Vec<usize>, Tensor)> {
        if kept > self.order.len() {
            return Err(Error::PlanMismatch(format!(
                "{kept} columns to keep of {}",
                self.order.len()
            )));
        }
        let mut solved = self.half.subrows(0, kept).to_owned();
        let factor = self.factor.submatrix(0, 0, kept, kept);
        solve_upper(factor.transpose(), solved.as_mut());
        let mut places: Vec<usize> = (0..kept).collect();
        places.sort_by_key(|&i| self.order[i]);
        let outputs = solved.ncols();
        let weight: Vec<f32> = (0..outputs)
            .flat_map(|o| places.iter().map(move |&i| (o, i)))
            .map(|(o, i)| match self.dead.get(&self.order[i]) {
                Some(dense) => dense[o],
                None => match &self.gains {
                    Some(gains) => (solved[(i, o)] / gains[o]) as f32,
                    None => solved[(i, o)] as f32,
                },
            })
            .collect();
        let columns = places.into_iter().map(|i| self.order[i]).collect();
        let weight = Tensor::from_vec(weight, (outputs, kept), &Device::Cpu)?;
        Ok((columns, weight))
    }
}

/// Squared output error when the first k columns of `order` are kept, for k = 0 ..= columns, under
/// a compensation: `mean` and `tokens` are those of the projection's input, which the bias reads.
///
/// With a bias the input's mean is accounted for, so that only its variation counts.
///
/// # Errors
/// [`Error::Singular`] for a least-squares refit where H is not positive definite.
pub fn error_curve(
    problem: &Problem,
    order: &[usize],
    compensation: Compensation,
    (mean, tokens): (&[f64], u64),
) -> Result<Vec<f64>> {
    if compensation.refits() {
        return Ok(Nested::new(problem, order)?.errors());
    }
    let bias = match compensation.adds_bias() {
        true => tokens as f64,
        false => 0.0,
    };
    // ‖Σ_{i ≥ k} x_i b_i‖² grows by its i = k terms as k falls.
    let n = order.len();
    let products = product(problem.weight.transpose(), problem.weight.as_ref());
    let term = |i: usize, j: usize| {
        let (i, j) = (order[i], order[j]);
        (problem.gram[(i, j)] - bias * mean[i] * mean[j]) * products[(i, j)]
    };
    let grown = (0..n)
        .map(|k| term(k, k) + 2.0 * (k + 1..n).map(|j| term(k, j)).sum::<f64>())
        .collect();
    Ok(suffix_sums(grown))
}

/// Σ_{i ≥ k} of the values, for k = 0 ..= their number.
fn suffix_sums(mut values: Vec<f64>) -> Vec<f64> {
    values.push(0.0);
    for k in (0..values.len() - 1).rev() {
        values[k] += values[k + 1];
    }
    values
}
