//! Factorisations that do not depend on the number of threads.
//!
//! faer adds up what its threads find, so that rounding depends on how many there are. Here the work
//! is always cut into the same pieces, whoever does them.

use crate::{Error, Result};
use faer::diag::Diag;
use faer::dyn_stack::{MemBuffer, MemStack, StackReq};
use faer::linalg::cholesky::llt;
use faer::linalg::evd::{ComputeEigenvectors, self_adjoint_evd, self_adjoint_evd_scratch};
use faer::linalg::householder;
use faer::linalg::qr::no_pivoting::factor as qr_factor;
use faer::linalg::svd::{ComputeSvdVectors, svd, svd_scratch};
use faer::{Conj, Mat, MatMut, MatRef, Par};

/// Pieces of every factorisation. More threads than that are of little use to what is bound by
/// memory, and a few more pieces than threads cost little.
const PIECES: usize = 8;

/// faer's parallelism with a fixed number of pieces.
pub(crate) fn pieces() -> Par {
    Par::rayon(PIECES)
}

fn with_memory<T>(needed: StackReq, run: impl FnOnce(&mut MemStack) -> T) -> T {
    run(MemStack::new(&mut MemBuffer::new(needed)))
}

fn failed(what: &'static str, reason: &dyn std::fmt::Debug) -> Error {
    Error::Factorization {
        what,
        reason: format!("{reason:?}"),
    }
}

/// Eigenvalues, falling, and eigenvectors of the symmetric matrix with this lower triangle.
pub(crate) fn eigen(matrix: MatRef<'_, f64>, what: &'static str) -> Result<(Vec<f64>, Mat<f64>)> {
    let n = matrix.nrows();
    if n == 0 {
        return Ok((Vec::new(), Mat::zeros(0, 0)));
    }
    let (mut values, mut vectors) = (Diag::zeros(n), Mat::zeros(n, n));
    let params = Default::default();
    let needed = self_adjoint_evd_scratch::<f64>(n, ComputeEigenvectors::Yes, pieces(), params);
    with_memory(needed, |memory| {
        let vectors = Some(vectors.as_mut());
        self_adjoint_evd(matrix, values.as_mut(), vectors, pieces(), memory, params)
    })
    .map_err(|error| failed(what, &error))?;
    let values = values.column_vector().iter().rev().copied().collect();
    Ok((values, vectors.reverse_cols().to_owned()))
}

/// Singular values, falling, and left singular vectors: as many as the matrix has rows, or columns
/// where there are fewer and `full` does not ask for all.
pub(crate) fn left_singular(
    matrix: MatRef<'_, f64>,
    full: bool,
    what: &'static str,
) -> Result<(Vec<f64>, Mat<f64>)> {
    let (m, n) = matrix.shape();
    let (columns, compute) = match full {
        true => (m, ComputeSvdVectors::Full),
        false => (m.min(n), ComputeSvdVectors::Thin),
    };
    let mut vectors = Mat::zeros(m, columns);
    let values = singular(matrix, Some((vectors.as_mut(), compute)), what)?;
    Ok((values, vectors))
}

/// Singular values, falling.
pub(crate) fn singular_values(matrix: MatRef<'_, f64>, what: &'static str) -> Result<Vec<f64>> {
    singular(matrix, None, what)
}

fn singular(
    matrix: MatRef<'_, f64>,
    left: Option<(MatMut<'_, f64>, ComputeSvdVectors)>,
    what: &'static str,
) -> Result<Vec<f64>> {
    let (m, n) = matrix.shape();
    let mut values = Diag::zeros(m.min(n));
    let (left, compute) = left.unzip();
    let (compute, none) = (
        compute.unwrap_or(ComputeSvdVectors::No),
        ComputeSvdVectors::No,
    );
    let params = Default::default();
    let needed = svd_scratch::<f64>(m, n, compute, none, pieces(), params);
    with_memory(needed, |memory| {
        svd(
            matrix,
            values.as_mut(),
            left,
            None,
            pieces(),
            memory,
            params,
        )
    })
    .map_err(|error| failed(what, &error))?;
    Ok(values.column_vector().iter().copied().collect())
}

/// Q R with as many columns of Q as the smaller side.
pub(crate) struct Qr {
    /// R above the diagonal, Householder vectors below.
    packed: Mat<f64>,
    coefficients: Mat<f64>,
}

impl Qr {
    pub(crate) fn new(mut matrix: Mat<f64>) -> Self {
        let (m, n) = matrix.shape();
        let block = qr_factor::recommended_block_size::<f64>(m, n);
        let mut coefficients = Mat::zeros(block, m.min(n));
        let params = Default::default();
        let needed = qr_factor::qr_in_place_scratch::<f64>(m, n, block, pieces(), params);
        with_memory(needed, |memory| {
            let (matrix, coefficients) = (matrix.as_mut(), coefficients.as_mut());
            qr_factor::qr_in_place(matrix, coefficients, pieces(), memory, params);
        });
        Self {
            packed: matrix,
            coefficients,
        }
    }

    /// R, `min(m, n) × n`.
    pub(crate) fn r(&self) -> Mat<f64> {
        let packed = &self.packed;
        let entry = |i, j| if i <= j { packed[(i, j)] } else { 0.0 };
        Mat::from_fn(packed.nrows().min(packed.ncols()), packed.ncols(), entry)
    }

    /// Q, `m × min(m, n)`.
    pub(crate) fn q(&self) -> Mat<f64> {
        let m = self.packed.nrows();
        let (block, size) = self.coefficients.shape();
        let mut q = Mat::identity(m, size);
        let needed = householder::apply_block_householder_sequence_on_the_left_in_place_scratch::<
            f64,
        >(m, block, size);
        with_memory(needed, |memory| {
            householder::apply_block_householder_sequence_on_the_left_in_place_with_conj(
                self.packed.as_ref().subcols(0, size),
                self.coefficients.as_ref(),
                Conj::No,
                q.as_mut(),
                pieces(),
                memory,
            );
        });
        q
    }
}

/// L with L Lᵀ the symmetric positive definite matrix with this lower triangle.
#[derive(Clone, Debug)]
pub(crate) struct Cholesky(Mat<f64>);

impl Cholesky {
    /// `None` where it is not positive definite.
    pub(crate) fn new(mut matrix: Mat<f64>) -> Option<Self> {
        if !cholesky_in_place(matrix.as_mut()) {
            return None;
        }
        for j in 1..matrix.ncols() {
            matrix.col_mut(j).subrows_mut(0, j).fill(0.0);
        }
        Some(Self(matrix))
    }

    pub(crate) fn into_l(self) -> Mat<f64> {
        self.0
    }

    /// (L Lᵀ)⁻¹ x.
    pub(crate) fn solve(&self, mut x: Mat<f64>) -> Mat<f64> {
        let needed = llt::solve::solve_in_place_scratch::<f64>(self.0.nrows(), x.ncols(), pieces());
        with_memory(needed, |memory| {
            llt::solve::solve_in_place(self.0.as_ref(), x.as_mut(), pieces(), memory);
        });
        x
    }
}

/// Replaces the lower triangle by that of its Cholesky factor; false if it is not positive definite.
pub(crate) fn cholesky_in_place(matrix: MatMut<'_, f64>) -> bool {
    let params = Default::default();
    let needed = llt::factor::cholesky_in_place_scratch::<f64>(matrix.nrows(), pieces(), params);
    with_memory(needed, |memory| {
        llt::factor::cholesky_in_place(matrix, Default::default(), pieces(), memory, params).is_ok()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::matrix::product;
    use crate::testing::{Lcg, assert_matrix_close, with_threads};

    /// Large enough for faer to share the work out.
    const N: usize = 300;

    #[track_caller]
    fn same_for_all_thread_counts(run: impl Fn() -> Mat<f64> + Sync) {
        let one = with_threads(1, &run);
        for threads in [2, 3, 5] {
            assert!(with_threads(threads, &run) == one, "{threads} threads");
        }
    }

    #[test]
    fn factors_multiply_to_their_matrix_and_are_the_same_for_all_thread_counts() {
        let mut lcg = Lcg(32);
        let x = lcg.matrix(N, N + 50);
        let h = product(x.as_ref(), x.transpose());

        let (values, vectors) = eigen(h.as_ref(), "H").expect("converges");
        assert!(values.is_sorted_by(|a, b| a >= b));
        let scaled = Mat::from_fn(N, N, |i, j| vectors[(i, j)] * values[j]);
        assert_matrix_close(
            product(scaled.as_ref(), vectors.transpose()).as_ref(),
            h.as_ref(),
            1e-10,
        );
        same_for_all_thread_counts(|| eigen(h.as_ref(), "H").expect("converges").1);

        let cholesky = Cholesky::new(h.clone()).expect("positive definite");
        let ones = Mat::<f64>::identity(N, N);
        let inverse = cholesky.solve(ones.clone());
        assert_matrix_close(
            product(h.as_ref(), inverse.as_ref()).as_ref(),
            ones.as_ref(),
            1e-6,
        );
        let l = cholesky.into_l();
        assert_matrix_close(
            product(l.as_ref(), l.transpose()).as_ref(),
            h.as_ref(),
            1e-10,
        );
        same_for_all_thread_counts(|| {
            let cholesky = Cholesky::new(h.clone()).expect("positive definite");
            cholesky.solve(x.clone())
        });
        assert!(Cholesky::new(faer::Scale(-1.0) * &h).is_none());

        for x in [x.clone(), x.transpose().to_owned()] {
            let qr = Qr::new(x.clone());
            let (q, r) = (qr.q(), qr.r());
            assert_matrix_close(product(q.as_ref(), r.as_ref()).as_ref(), x.as_ref(), 1e-10);
            same_for_all_thread_counts(|| Qr::new(x.clone()).q());
            same_for_all_thread_counts(|| Qr::new(x.clone()).r());

            let (values, vectors) = left_singular(x.as_ref(), false, "X").expect("converges");
            assert_eq!(vectors.shape(), (x.nrows(), N));
            // Uᵀ X has rows of the singular values' lengths.
            let rows = product(vectors.transpose(), x.as_ref());
            for (i, value) in values.iter().enumerate() {
                assert!((rows.row(i).norm_l2() / value - 1.0).abs() < 1e-9);
            }
            let alone = singular_values(x.as_ref(), "X").expect("converges");
            assert!(
                alone
                    .iter()
                    .zip(&values)
                    .all(|(a, b)| (a / b - 1.0).abs() < 1e-9)
            );
            same_for_all_thread_counts(|| {
                left_singular(x.as_ref(), false, "X").expect("converges").1
            });
        }
        let tall = x.subcols(0, 4);
        let (_, all) = left_singular(tall, true, "X").expect("converges");
        assert_matrix_close(
            product(all.transpose(), all.as_ref()).as_ref(),
            ones.as_ref(),
            1e-10,
        );
    }

    #[test]
    fn nothing_has_no_eigenvalues() {
        let (values, vectors) = eigen(Mat::zeros(0, 0).as_ref(), "nothing").expect("converges");
        assert!(values.is_empty() && vectors.shape() == (0, 0));
    }
}
