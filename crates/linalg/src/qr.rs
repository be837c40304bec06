//! QR factorisation without pivoting.

use faer::linalg::householder;
use faer::linalg::qr::no_pivoting::factor as qr_factor;
use faer::{Conj, Mat, Par};

use crate::parallel::{pieces, with_memory};

/// A = Q R, with as many columns of Q as the smaller side of A.
#[derive(Clone, Debug)]
pub struct Qr {
    /// R on and above the diagonal, Householder vectors below.
    packed: Mat<f64>,
    coefficients: Mat<f64>,
}

impl Qr {
    /// Factorises a matrix of any shape. An entry that is not finite makes Q and R not finite.
    pub fn new(mut matrix: Mat<f64>) -> Self {
        let (m, n) = matrix.shape();
        let block = qr_factor::recommended_block_size::<f64>(m, n);
        let mut coefficients = Mat::zeros(block, m.min(n));
        let (par, params) = (pieces(m.min(n)), Default::default());
        let needed = qr_factor::qr_in_place_scratch::<f64>(m, n, block, par, params);
        with_memory(needed, |memory| {
            let (matrix, coefficients) = (matrix.as_mut(), coefficients.as_mut());
            qr_factor::qr_in_place(matrix, coefficients, par, memory, params);
        });
        Self {
            packed: matrix,
            coefficients,
        }
    }

    fn par(&self) -> Par {
        pieces(self.coefficients.ncols())
    }

    /// R, `min(m, n) × n`, upper triangular.
    pub fn r(&self) -> Mat<f64> {
        let packed = &self.packed;
        let entry = |i, j| if i <= j { packed[(i, j)] } else { 0.0 };
        Mat::from_fn(packed.nrows().min(packed.ncols()), packed.ncols(), entry)
    }

    /// Q, `m × min(m, n)`, with orthonormal columns.
    pub fn q(&self) -> Mat<f64> {
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
                self.par(),
                memory,
            );
        });
        q
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::product;
    use crate::testing::{assert_close, assert_orthonormal, random, same_for_all_thread_counts};

    #[test]
    fn q_is_orthonormal_and_q_r_is_the_matrix_whatever_the_threads() {
        for (m, n) in [(1, 1), (7, 3), (3, 7), (300, 350), (350, 300)] {
            let x = random(m, n, 5);
            let qr = Qr::new(x.clone());
            let (q, r) = (qr.q(), qr.r());
            assert_orthonormal(q.as_ref(), 1e-12);
            assert!((0..r.ncols()).all(|j| (j + 1..r.nrows()).all(|i| r[(i, j)] == 0.0)));
            assert_close(product(q.as_ref(), r.as_ref()).as_ref(), x.as_ref(), 1e-12);
            same_for_all_thread_counts(|| Qr::new(x.clone()).q());
            same_for_all_thread_counts(|| Qr::new(x.clone()).r());
        }
    }
}
