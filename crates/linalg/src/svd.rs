//! Singular values, and the left singular vectors.

use faer::diag::Diag;
use faer::linalg::svd::{ComputeSvdVectors, svd, svd_scratch};
use faer::{Mat, MatMut, MatRef};

use crate::parallel::{pieces, with_memory};
use crate::{Error, Result, check_finite};

/// How many left singular vectors are wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Vectors {
    /// As many as there are singular values.
    Thin,
    /// A whole orthonormal basis: as many as the matrix has rows.
    Full,
}

/// The left half of A = U diag(σ) Vᵀ.
#[derive(Clone, Debug)]
pub struct LeftSingular {
    /// σ, descending; `min(m, n)` values.
    pub values: Vec<f64>,
    /// U, `m × min(m, n)` or `m × m`.
    pub vectors: Mat<f64>,
}

/// Singular values and left singular vectors of an `m × n` matrix.
///
/// # Errors
/// [`Error::NotFinite`], [`Error::NoConvergence`].
pub fn left_singular(matrix: MatRef<'_, f64>, vectors: Vectors) -> Result<LeftSingular> {
    let (m, n) = matrix.shape();
    let (columns, compute) = match vectors {
        Vectors::Full => (m, ComputeSvdVectors::Full),
        Vectors::Thin => (m.min(n), ComputeSvdVectors::Thin),
    };
    let mut vectors = Mat::zeros(m, columns);
    let values = singular(matrix, Some((vectors.as_mut(), compute)))?;
    Ok(LeftSingular { values, vectors })
}

/// Singular values, descending.
///
/// # Errors
/// [`Error::NotFinite`], [`Error::NoConvergence`].
pub fn singular_values(matrix: MatRef<'_, f64>) -> Result<Vec<f64>> {
    singular(matrix, None)
}

fn singular(
    matrix: MatRef<'_, f64>,
    left: Option<(MatMut<'_, f64>, ComputeSvdVectors)>,
) -> Result<Vec<f64>> {
    check_finite(matrix)?;
    let (m, n) = matrix.shape();
    let (par, params) = (pieces(m.min(n)), Default::default());
    let mut values = Diag::zeros(m.min(n));
    let (left, compute) = left.unzip();
    let none = ComputeSvdVectors::No;
    let compute = compute.unwrap_or(none);
    let needed = svd_scratch::<f64>(m, n, compute, none, par, params);
    with_memory(needed, |memory| {
        svd(matrix, values.as_mut(), left, None, par, memory, params)
    })
    .map_err(|_| Error::NoConvergence {
        values: "singular values",
        rows: m,
        columns: n,
    })?;
    Ok(values.column_vector().iter().copied().collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::product;
    use crate::testing::{assert_orthonormal, random, same_for_all_thread_counts};

    #[test]
    fn singular_vectors_turn_their_matrix_into_rows_as_long_as_the_singular_values() {
        for (m, n) in [(5, 9), (300, 350), (350, 300)] {
            let x = random(m, n, 3);
            let found = left_singular(x.as_ref(), Vectors::Thin).unwrap();
            assert_eq!(found.vectors.shape(), (m, m.min(n)));
            assert!(found.values.is_sorted_by(|a, b| a >= b));
            assert_orthonormal(found.vectors.as_ref(), 1e-11);
            let rows = product(found.vectors.transpose(), x.as_ref());
            for (i, value) in found.values.iter().enumerate() {
                assert!((rows.row(i).norm_l2() / value - 1.0).abs() < 1e-9);
            }
            let alone = singular_values(x.as_ref()).unwrap();
            let mut pairs = alone.iter().zip(&found.values);
            assert!(pairs.all(|(a, b)| (a / b - 1.0).abs() < 1e-9));
            same_for_all_thread_counts(|| {
                left_singular(x.as_ref(), Vectors::Thin).unwrap().vectors
            });
        }
    }

    #[test]
    fn a_full_basis_has_as_many_vectors_as_rows() {
        let x = random(300, 4, 4);
        let found = left_singular(x.as_ref(), Vectors::Full).unwrap();
        assert_eq!((found.values.len(), found.vectors.shape()), (4, (300, 300)));
        assert_orthonormal(found.vectors.as_ref(), 1e-11);
        let nan = Mat::from_fn(2, 2, |_, _| f64::NAN);
        let error = singular_values(nan.as_ref());
        assert!(matches!(error, Err(Error::NotFinite { .. })));
    }
}
