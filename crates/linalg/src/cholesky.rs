//! Cholesky factorisation, and what follows from the factor.

use faer::linalg::cholesky::llt::factor::{self, LltError};
use faer::{Mat, MatMut, MatRef};

use crate::check::{check_lower, check_square};
use crate::parallel::{pieces, with_memory};
use crate::product::{inverse_of_squares, mirror_lower};
use crate::triangular::{invert_lower, solve_lower, solve_upper};
use crate::{Error, Result};

/// L with L Lᵀ = A, for a symmetric positive definite A.
#[derive(Clone, Debug)]
pub struct Cholesky(Mat<f64>);

impl Cholesky {
    /// Factorises the matrix with this lower triangle; the upper one is not read. n³/3 operations, in place.
    ///
    /// # Errors
    /// [`Error::NotSquare`], [`Error::NotFinite`], [`Error::NotPositiveDefinite`].
    pub fn new(mut matrix: Mat<f64>) -> Result<Self> {
        cholesky_in_place(matrix.as_mut())?;
        for j in 1..matrix.ncols() {
            matrix.col_mut(j).subrows_mut(0, j).fill(0.0);
        }
        Ok(Self(matrix))
    }

    /// L, lower triangular with zeros above the diagonal.
    pub fn l(&self) -> MatRef<'_, f64> {
        self.0.as_ref()
    }

    /// L.
    pub fn into_l(self) -> Mat<f64> {
        self.0
    }

    /// A⁻¹ x, for all columns of x.
    ///
    /// # Panics
    /// When x has another number of rows than A.
    pub fn solve(&self, mut x: Mat<f64>) -> Mat<f64> {
        solve_lower(self.l(), x.as_mut());
        solve_upper(self.l().transpose(), x.as_mut());
        x
    }

    /// A⁻¹, both triangles. Holds two matrices of A's size, this one among them.
    pub fn into_inverse(self) -> Mat<f64> {
        let n = self.0.nrows();
        let mut inverse = Mat::zeros(n, n);
        invert_lower(inverse.as_mut(), self.l());
        let mut out = self.0;
        inverse_of_squares(out.as_mut(), inverse.as_ref());
        mirror_lower(out.as_mut());
        out
    }
}

/// Replaces the lower triangle by that of the Cholesky factor; the upper one is neither read nor written. Where it fails,
/// the lower triangle holds an unfinished factor.
///
/// # Errors
/// [`Error::NotSquare`], [`Error::NotFinite`], [`Error::NotPositiveDefinite`].
pub fn cholesky_in_place(matrix: MatMut<'_, f64>) -> Result<()> {
    check_square(matrix.as_ref())?;
    check_lower(matrix.as_ref())?;
    let (par, params) = (pieces(matrix.nrows()), Default::default());
    let needed = factor::cholesky_in_place_scratch::<f64>(matrix.nrows(), par, params);
    with_memory(needed, |memory| {
        factor::cholesky_in_place(matrix, Default::default(), par, memory, params)
    })
    .map(drop)
    .map_err(|LltError::NonPositivePivot { index }| Error::NotPositiveDefinite { pivot: index })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::product;
    use crate::testing::{assert_close, random, same_for_all_thread_counts};

    #[test]
    fn the_factor_its_solutions_and_its_inverse_fit_the_matrix_whatever_the_threads() {
        for n in [1, 6, 127, 128, 300, 600] {
            let x = random(n, 2 * n, 6);
            let h = product(x.as_ref(), x.transpose());
            let cholesky = Cholesky::new(h.clone()).unwrap();
            let l = cholesky.l();
            assert!((0..n).all(|j| (0..j).all(|i| l[(i, j)] == 0.0)));
            assert_close(product(l, l.transpose()).as_ref(), h.as_ref(), 1e-12);

            let solved = cholesky.solve(x.clone());
            assert_close(
                product(h.as_ref(), solved.as_ref()).as_ref(),
                x.as_ref(),
                1e-9,
            );

            let inverse = cholesky.clone().into_inverse();
            assert_eq!(inverse, inverse.transpose());
            let one = product(h.as_ref(), inverse.as_ref());
            assert_close(one.as_ref(), Mat::<f64>::identity(n, n).as_ref(), 1e-9);

            same_for_all_thread_counts(|| Cholesky::new(h.clone()).unwrap().into_l());
            same_for_all_thread_counts(|| Cholesky::new(h.clone()).unwrap().solve(x.clone()));
            same_for_all_thread_counts(|| Cholesky::new(h.clone()).unwrap().into_inverse());
        }
    }

    #[test]
    fn matrices_without_a_factor_are_refused_with_the_reason() {
        let mut h = Mat::<f64>::identity(200, 200);
        h[(150, 150)] = -1.0;
        let error = Cholesky::new(h.clone()).unwrap_err();
        assert!(
            matches!(error, Error::NotPositiveDefinite { .. }),
            "{error}"
        );
        h[(150, 149)] = f64::NAN;
        let error = Cholesky::new(h).unwrap_err();
        let Error::NotFinite { row, column, value } = error else {
            panic!("{error}");
        };
        assert!((row, column) == (150, 149) && value.is_nan());
        let error = Cholesky::new(Mat::zeros(2, 3)).unwrap_err();
        let (rows, columns) = (2, 3);
        assert_eq!(error, Error::NotSquare { rows, columns });
    }
}
