//! Weights under a mask, solved again by least squares on recorded inputs.
//!
//! For a row `w` with support `S`, and `C` the second moments of the matrix's input with a constant component, the new row is
//! `(C_SS + λ I)⁻¹ (C_S: w + λ w_S)`: the products with the recorded inputs come as close to the dense ones as the support
//! allows, with a pull towards the old weights. The constant goes into the bias. Rows with the same support share one
//! factorisation.

use super::{by_support, check_ridge, solve};
use crate::{
    calibration::{Calibration, Moments},
    cell::Cell,
    error::{Error, Result},
    mask::MaskSet,
    names::with,
    order::bits::BitMatrix,
    rnn::{Rnn, Role},
};
use linalg::faer::{Mat, MatRef};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

/// How weights are solved again.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct RefitConfig {
    /// λ as a share of the mean diagonal of `C`: finite and not negative.
    pub ridge: f64,
    /// Whether a constant is added to the bias.
    pub constant: bool,
}

with!(RefitConfig);

impl Default for RefitConfig {
    fn default() -> Self {
        Self {
            ridge: 1e-4,
            constant: true,
        }
    }
}

/// A matrix that was solved again.
#[derive(Debug, Clone, PartialEq)]
pub struct Refit {
    /// `[rows, cols]`; zero outside the mask.
    pub weights: Vec<f32>,
    /// What is added to each row's bias; zero without a constant.
    pub constant: Vec<f32>,
    /// Mean squared error of all products with the mask alone, and after solving; as shares of the mean square of the dense
    /// products.
    pub errors: (f64, f64),
}

/// One matrix of a network.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MatrixRefit {
    /// Its name.
    pub name: String,
    /// Squared error of its products on the recorded inputs, as a share of the dense products' square: under the mask alone.
    pub error_masked: f64,
    /// And solved again.
    pub error: f64,
}

/// What refitting did.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RefitReport {
    /// The matrices that have a mask.
    pub matrices: Vec<MatrixRefit>,
    /// Wall-clock time.
    pub seconds: f64,
}

/// `C` with a last component for the constant, and its mean diagonal over the true components.
fn second_moments(inputs: &Moments) -> (Mat<f64>, f64) {
    let (n, mean) = (inputs.dim(), inputs.mean());
    let c = Mat::from_fn(n + 1, n + 1, |i, j| match (i == n, j == n) {
        (false, false) => inputs.second(i, j),
        (false, true) => mean[i],
        (true, false) => mean[j],
        (true, true) => 1.0,
    });
    let diagonal = (0..n).map(|i| c[(i, i)]).sum::<f64>() / n.max(1) as f64;
    (c, diagonal)
}

/// Rows of `w` with the same support.
struct Group {
    support: Vec<usize>,
    rows: Vec<usize>,
}

fn groups(keep: &BitMatrix) -> Vec<Group> {
    let all: Vec<usize> = (0..keep.rows()).collect();
    by_support(Some(keep), &all)
        .into_iter()
        .map(|rows| Group {
            support: keep.row_ones(rows[0]).collect(),
            rows,
        })
        .collect()
}

/// Solves a matrix `w` `[keep.rows, keep.cols]` again under a mask.
///
/// # Errors
/// Sizes that do not fit, a ridge that is negative or not finite, or moments that are not those of any inputs (not positive
/// semidefinite).
pub fn refit_matrix(
    name: &str,
    w: &[f32],
    keep: &BitMatrix,
    inputs: &Moments,
    config: &RefitConfig,
) -> Result<Refit> {
    check_ridge(config.ridge)?;
    let (rows, cols) = (keep.rows(), keep.cols());
    if w.len() != rows * cols || inputs.dim() != cols || inputs.count() == 0 {
        return Err(Error::Shape {
            tensor: name.into(),
            expected: format!("[{rows}, {cols}] with moments of {cols} components"),
            found: vec![w.len(), inputs.dim(), inputs.count() as usize],
        });
    }
    let (c, diagonal) = second_moments(inputs);
    // A matrix whose inputs are all zero keeps its weights.
    let lambda = (config.ridge * diagonal).max(f64::MIN_POSITIVE);
    let dense = Mat::from_fn(rows, cols, |i, j| f64::from(w[i * cols + j]));
    // Row i: C w_i.
    let targets = linalg::product(dense.as_ref(), c.as_ref().submatrix(0, 0, cols, cols + 1));
    let problem = Problem {
        name,
        dense: &dense,
        targets: &targets,
        c: c.as_ref(),
        lambda,
        constant: config.constant,
    };
    let groups = groups(keep);
    let solved: Vec<Mat<f64>> = groups
        .par_iter()
        .map(|group| problem.solve(group))
        .collect::<Result<_>>()?;
    let mut out = Refit {
        weights: vec![0.0; w.len()],
        constant: vec![0.0; rows],
        errors: (0.0, 0.0),
    };
    for (group, solution) in groups.iter().zip(solved) {
        for (k, &row) in group.rows.iter().enumerate() {
            for (s, &j) in group.support.iter().enumerate() {
                out.weights[row * cols + j] = solution[(s, k)] as f32;
            }
            if config.constant {
                out.constant[row] = solution[(group.support.len(), k)] as f32;
            }
        }
    }
    out.errors = errors(&dense, keep, &out, &c);
    Ok(out)
}

/// What all groups of rows of a matrix share.
struct Problem<'a> {
    name: &'a str,
    /// The old weights.
    dense: &'a Mat<f64>,
    /// Row i: C w_i.
    targets: &'a Mat<f64>,
    c: MatRef<'a, f64>,
    lambda: f64,
    constant: bool,
}

impl Problem<'_> {
    /// The new weights of a group, `[support and constant, rows]`.
    fn solve(&self, group: &Group) -> Result<Mat<f64>> {
        let Self { dense, lambda, .. } = self;
        let mut at = group.support.clone();
        if self.constant {
            at.push(dense.ncols());
        }
        if at.is_empty() {
            return Ok(Mat::zeros(0, group.rows.len()));
        }
        let a = Mat::from_fn(at.len(), at.len(), |i, j| {
            self.c[(at[i], at[j])] + if i == j { *lambda } else { 0.0 }
        });
        let b = Mat::from_fn(at.len(), group.rows.len(), |i, k| {
            let row = group.rows[k];
            // The constant starts from 0.
            let old = if at[i] < dense.ncols() {
                dense[(row, at[i])]
            } else {
                0.0
            };
            self.targets[(row, at[i])] + lambda * old
        });
        solve(a, b, self.name)
    }
}

/// Relative squared errors under the mask alone and with the solution.
fn errors(dense: &Mat<f64>, keep: &BitMatrix, refit: &Refit, c: &Mat<f64>) -> (f64, f64) {
    let (rows, cols) = dense.shape();
    let square = |d: Mat<f64>| {
        let cd = linalg::product(d.as_ref(), c.as_ref());
        (0..rows)
            .map(|i| (0..=cols).map(|j| cd[(i, j)] * d[(i, j)]).sum::<f64>())
            .sum::<f64>()
    };
    let total = square(Mat::from_fn(rows, cols + 1, |i, j| {
        if j < cols { dense[(i, j)] } else { 0.0 }
    }));
    if total <= 0.0 {
        return (0.0, 0.0);
    }
    let masked = square(Mat::from_fn(rows, cols + 1, |i, j| {
        if j < cols && !keep.get(i, j) {
            dense[(i, j)]
        } else {
            0.0
        }
    }));
    let solved = square(Mat::from_fn(rows, cols + 1, |i, j| {
        if j < cols {
            dense[(i, j)] - f64::from(refit.weights[i * cols + j])
        } else {
            -f64::from(refit.constant[i])
        }
    }));
    (masked.max(0.0) / total, solved.max(0.0) / total)
}

/// Solves all masked `W_hh` and `W_ih` of a network again; its weights must be the dense ones. Masks of other parameters are
/// applied as they are. The result is masked.
///
/// # Errors
/// Masks or a calibration that do not fit the network, or a ridge that is negative or not finite.
pub fn refit(
    rnn: &mut Rnn,
    masks: &MaskSet,
    calibration: &Calibration,
    config: &RefitConfig,
) -> Result<RefitReport> {
    let start = std::time::Instant::now();
    check_ridge(config.ridge)?;
    let shape = rnn.config().clone();
    calibration.check(shape.input.width(), &shape.hidden)?;
    let mut masked = rnn.clone();
    masks.apply(masked.params_mut())?;
    let mut report = Vec::new();
    for (role, p) in rnn.roles().into_iter().zip(rnn.params().iter()) {
        let (layer, inputs) = match role {
            Role::InputWeight(l) => (l, calibration.input_of(l)),
            Role::RecurrentWeight(l) => (l, &calibration.layers[l].before),
            _ => continue,
        };
        let Some(mask) = masks.get(&p.name) else {
            continue;
        };
        let solved = refit_matrix(&p.name, &p.data, mask.keep(), inputs, config)?;
        report.push(MatrixRefit {
            name: p.name.clone(),
            error_masked: solved.errors.0,
            error: solved.errors.1,
        });
        masked.set(role, solved.weights);
        let recurrent = matches!(role, Role::RecurrentWeight(_));
        add_constants(&mut masked, layer, recurrent, &solved.constant);
    }
    // Biases under a mask of their own stay masked.
    masks.apply(masked.params_mut())?;
    *rnn = masked;
    Ok(RefitReport {
        matrices: report,
        seconds: start.elapsed().as_secs_f64(),
    })
}

/// Adds constants `[gates * H]` to a layer's biases; the recurrent part of a GRU's candidate has its own.
pub(super) fn add_constants(rnn: &mut Rnn, layer: usize, recurrent: bool, constants: &[f32]) {
    let h = rnn.config().hidden[layer];
    let joined = match rnn.config().cell {
        Cell::Gru if recurrent => 2 * h,
        _ => constants.len(),
    };
    let (bias, candidate) = constants.split_at(joined);
    rnn.add_to(Role::Bias(layer), bias);
    if !candidate.is_empty() {
        rnn.add_to(Role::CandidateBias(layer), candidate);
    }
}
