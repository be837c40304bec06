//! U with H⁻¹ = Uᵀ U, upper triangular: what SparseGPT and GPTQ need of H.
//!
//! With J the reversal of order, J H J = L Lᵀ gives U = J L⁻¹ J: one Cholesky factorisation and one triangular inverse,
//! `2n³/3` multiply-adds, where the definition (factorise, invert, factorise the inverse) takes `4n³/3` and rounds more.

use faer::{MatMut, MatRef};
use rayon::prelude::*;

use super::rows::transpose;
use super::sweep::ColumnOrder;
use crate::{Error, Result};
use linalg::{cholesky_in_place, invert_lower};

/// By how much damping grows when H + damping is not positive definite.
const GROWTH: f64 = 10.0;
/// The first damping to try after none at all.
const LEAST_DAMPING: f64 = 1e-8;

/// U, in the order of the sweep, and what was done to H to have it.
pub(crate) struct Factor {
    /// Row-major `[n, n]`: row i holds U_i,i.. from its diagonal on, zeros before it.
    rows: Vec<f64>,
    n: usize,
    /// Column of W at each step of the sweep.
    pub(crate) order: Vec<usize>,
    /// Inputs that are always zero.
    pub(crate) dead: Vec<usize>,
    /// Damping used, as a share of the mean diagonal.
    pub(crate) damping: f64,
    /// How often damping had to grow.
    pub(crate) retries: usize,
}

impl Factor {
    /// Factorises H + damping · mean(diag H) · I. A dead input gets the diagonal entry 1, as in the reference codes.
    pub(crate) fn new(gram: MatRef<'_, f64>, damping: f64, order: ColumnOrder) -> Result<Self> {
        let n = gram.nrows();
        check_finite(gram)?;
        let mut diagonal: Vec<f64> = (0..n).map(|j| gram[(j, j)]).collect();
        check_diagonal(&diagonal)?;
        let dead: Vec<usize> = (0..n).filter(|&j| diagonal[j] == 0.0).collect();
        for &j in &dead {
            diagonal[j] = 1.0;
        }
        let mut columns: Vec<usize> = (0..n).collect();
        if order == ColumnOrder::Activation {
            columns.sort_by(|&a, &b| diagonal[b].total_cmp(&diagonal[a]));
        }
        let mean = diagonal.iter().sum::<f64>() / n.max(1) as f64;
        // No Gram matrix has an eigenvalue below −n² · mean, whatever its rounding.
        let most = GROWTH * (n * n) as f64;

        let mut work = vec![0.0; n * n];
        let (mut damping, mut retries) = (damping, 0);
        loop {
            let entry = |i: usize, j: usize| {
                let (i, j) = (columns[n - 1 - i], columns[n - 1 - j]);
                if i == j {
                    diagonal[i] + damping * mean
                } else if diagonal[i] == 0.0 || diagonal[j] == 0.0 {
                    0.0
                } else {
                    gram[(i.max(j), i.min(j))]
                }
            };
            work.par_chunks_mut(n.max(1))
                .enumerate()
                .for_each(|(j, column)| {
                    for (i, target) in column.iter_mut().enumerate().skip(j) {
                        *target = entry(i, j);
                    }
                });
            match cholesky_in_place(MatMut::from_column_major_slice_mut(&mut work, n, n)) {
                Ok(()) => break,
                Err(linalg::Error::NotPositiveDefinite { .. }) => {}
                Err(source) => {
                    return Err(Error::Factorization {
                        what: "Cholesky factorisation of the damped Gram matrix",
                        source,
                    });
                }
            }
            damping = (damping * GROWTH).max(LEAST_DAMPING);
            retries += 1;
            if damping > most {
                return Err(Error::NotGram {
                    reason: format!(
                        "damping by {most:e} times its mean diagonal leaves it indefinite"
                    ),
                });
            }
        }

        let mut inverse = vec![0.0; n * n];
        invert_lower(
            MatMut::from_column_major_slice_mut(&mut inverse, n, n),
            MatRef::from_column_major_slice(&work, n, n),
        );
        // U_ij = (L⁻¹)_{n−1−i, n−1−j}.
        transpose(&mut work, n, |i, j| {
            if j < i {
                0.0
            } else {
                inverse[(n - 1 - j) * n + (n - 1 - i)]
            }
        });
        Ok(Self {
            rows: work,
            n,
            order: columns,
            dead,
            damping,
            retries,
        })
    }

    /// Row i of U, zeros before its diagonal.
    pub(crate) fn row(&self, i: usize) -> &[f64] {
        &self.rows[i * self.n..][..self.n]
    }

    /// Uᵀ.
    pub(crate) fn transposed(&self) -> MatRef<'_, f64> {
        MatRef::from_column_major_slice(&self.rows, self.n, self.n)
    }
}

fn check_finite(gram: MatRef<'_, f64>) -> Result<()> {
    let n = gram.nrows();
    let bad = (0..n).into_par_iter().find_map_first(|j| {
        let column = gram.col(j);
        (j..n).find(|&i| !column[i].is_finite()).map(|i| (i, j))
    });
    match bad {
        None => Ok(()),
        Some((row, column)) => Err(Error::NotFinite {
            what: "Gram matrix of the inputs",
            row,
            column,
            value: gram[(row, column)],
        }),
    }
}

/// A sum of squares is finite and not negative.
pub(crate) fn check_diagonal(diagonal: &[f64]) -> Result<()> {
    match diagonal.iter().position(|d| !(d.is_finite() && *d >= 0.0)) {
        None => Ok(()),
        Some(at) if diagonal[at].is_finite() => Err(Error::NotGram {
            reason: format!("entry {at} of its diagonal is {}", diagonal[at]),
        }),
        Some(at) => Err(Error::NotFinite {
            what: "diagonal of the Gram matrix",
            row: at,
            column: at,
            value: diagonal[at],
        }),
    }
}
