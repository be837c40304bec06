//! Eigenvalues and eigenvectors of symmetric matrices.

use faer::diag::Diag;
use faer::linalg::evd::{ComputeEigenvectors, self_adjoint_evd, self_adjoint_evd_scratch};
use faer::{Mat, MatRef};

use crate::check::{check_lower, check_square};
use crate::parallel::{pieces, with_memory};
use crate::{Error, Result};

/// A = V diag(λ) Vᵀ.
#[derive(Clone, Debug)]
pub struct Eigen {
    /// λ, descending.
    pub values: Vec<f64>,
    /// V, `n × n`: column j belongs to value j.
    pub vectors: Mat<f64>,
}

/// Eigenvalues and eigenvectors of the symmetric matrix with this lower triangle; the upper one is not read.
///
/// About 9 n³ operations.
///
/// # Errors
/// [`Error::NotSquare`], [`Error::NotFinite`], [`Error::NoConvergence`].
pub fn eigen(matrix: MatRef<'_, f64>) -> Result<Eigen> {
    check_square(matrix)?;
    check_lower(matrix)?;
    let n = matrix.nrows();
    if n == 0 {
        return Ok(Eigen {
            values: Vec::new(),
            vectors: Mat::zeros(0, 0),
        });
    }
    let (mut values, mut vectors) = (Diag::zeros(n), Mat::zeros(n, n));
    let (par, params) = (pieces(n), Default::default());
    let needed = self_adjoint_evd_scratch::<f64>(n, ComputeEigenvectors::Yes, par, params);
    with_memory(needed, |memory| {
        let vectors = Some(vectors.as_mut());
        self_adjoint_evd(matrix, values.as_mut(), vectors, par, memory, params)
    })
    .map_err(|_| Error::NoConvergence {
        values: "eigenvalues",
        rows: n,
        columns: n,
    })?;
    Ok(Eigen {
        values: values.column_vector().iter().rev().copied().collect(),
        vectors: vectors.reverse_cols().to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::product;
    use crate::testing::{assert_close, assert_orthonormal, random, same_for_all_thread_counts};

    #[test]
    fn eigenvectors_rebuild_their_matrix_and_do_not_depend_on_threads() {
        for n in [1, 5, 127, 300] {
            let x = random(n, n + 50, 1);
            let h = product(x.as_ref(), x.transpose());
            let found = eigen(h.as_ref()).unwrap();
            assert!(found.values.is_sorted_by(|a, b| a >= b));
            assert_orthonormal(found.vectors.as_ref(), 1e-11);
            let scaled = Mat::from_fn(n, n, |i, j| found.vectors[(i, j)] * found.values[j]);
            let rebuilt = product(scaled.as_ref(), found.vectors.transpose());
            assert_close(rebuilt.as_ref(), h.as_ref(), 1e-11);
            same_for_all_thread_counts(|| eigen(h.as_ref()).unwrap().vectors);
        }
    }

    #[test]
    fn the_upper_triangle_is_not_read() {
        let x = random(6, 9, 2);
        let h = product(x.as_ref(), x.transpose());
        let lower = Mat::from_fn(6, 6, |i, j| if i < j { f64::NAN } else { h[(i, j)] });
        assert_eq!(
            eigen(lower.as_ref()).unwrap().values,
            eigen(h.as_ref()).unwrap().values
        );
    }

    #[test]
    fn an_empty_matrix_has_no_eigenvalues_and_others_are_refused() {
        let found = eigen(Mat::zeros(0, 0).as_ref()).unwrap();
        assert!(found.values.is_empty() && found.vectors.shape() == (0, 0));
        assert_eq!(
            eigen(Mat::zeros(2, 3).as_ref()).unwrap_err(),
            Error::NotSquare {
                rows: 2,
                columns: 3
            }
        );
        let nan = Mat::from_fn(2, 2, |_, _| f64::NAN);
        assert!(matches!(eigen(nan.as_ref()), Err(Error::NotFinite { .. })));
    }
}
