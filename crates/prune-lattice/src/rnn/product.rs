//! Matrix products on flat row-major buffers, by faer on one thread, so that results do not depend on the number of threads.
//!
//! At the sizes of a training step (32 rows, 32 to 512 columns) faer is as fast as the `gemm` crate or up to four times
//! faster; `cargo bench -p prune-lattice --bench rnn` measures the steps themselves.

use faer::{Accum, MatMut, MatRef, Par, linalg::matmul::matmul};

/// A strided view of a matrix.
#[derive(Debug, Clone, Copy)]
pub(crate) struct View<'a> {
    matrix: MatRef<'a, f32>,
    data: &'a [f32],
    stride: usize,
}

impl<'a> View<'a> {
    /// Rows of `cols` values that start `stride` apart.
    ///
    /// # Panics
    /// The buffer is too small, or `cols` above `stride`.
    pub(crate) fn strided(data: &'a [f32], rows: usize, cols: usize, stride: usize) -> Self {
        Self {
            matrix: MatRef::from_row_major_slice_with_stride(data, rows, cols, stride),
            data,
            stride,
        }
    }

    /// Dense rows.
    pub(crate) fn new(data: &'a [f32], rows: usize, cols: usize) -> Self {
        Self::strided(&data[..rows * cols], rows, cols, cols)
    }

    pub(crate) fn rows(&self) -> usize {
        self.matrix.nrows()
    }

    pub(crate) fn cols(&self) -> usize {
        self.matrix.ncols()
    }

    /// Row `i` of a view that is not transposed.
    pub(crate) fn row(&self, i: usize) -> &'a [f32] {
        &self.data[i * self.stride..][..self.cols()]
    }

    /// The transposed matrix.
    pub(crate) fn t(self) -> MatRef<'a, f32> {
        self.matrix.transpose()
    }
}

impl<'a> From<View<'a>> for MatRef<'a, f32> {
    fn from(view: View<'a>) -> Self {
        view.matrix
    }
}

/// Whether the product is added to what is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Store {
    Replace,
    Add,
}

/// `dst = a b` or `dst += a b`; rows of `dst` start `stride` apart.
///
/// # Panics
/// The matrices do not fit each other, or `dst` is too small.
pub(crate) fn product<'a>(
    dst: &mut [f32],
    stride: usize,
    into: Store,
    a: impl Into<MatRef<'a, f32>>,
    b: impl Into<MatRef<'a, f32>>,
) {
    let (a, b) = (a.into(), b.into());
    let (m, n) = (a.nrows(), b.ncols());
    if m == 0 || n == 0 {
        return;
    }
    let accum = match into {
        Store::Replace => Accum::Replace,
        Store::Add => Accum::Add,
    };
    let dst = MatMut::from_column_major_slice_with_stride_mut(dst, n, m, stride).transpose_mut();
    matmul(dst, accum, a, b, 1.0, Par::Seq);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_of_strided_and_transposed_views_agree_with_the_triple_loop() {
        let a: Vec<f32> = (0..60).map(|v| (v as f32 * 0.37).sin()).collect();
        let b: Vec<f32> = (0..60).map(|v| (v as f32 * 0.71).cos()).collect();
        // a: 3x4 inside rows of 7; b: 5x4 inside rows of 6, used transposed; dst: 3x5 inside rows of 8.
        let mut dst = vec![1f32; 24];
        product(
            &mut dst,
            8,
            Store::Add,
            View::strided(&a, 3, 4, 7),
            View::strided(&b, 5, 4, 6).t(),
        );
        for i in 0..3 {
            for j in 0..8 {
                let product: f32 = (0..4).map(|k| a[i * 7 + k] * b[j.min(4) * 6 + k]).sum();
                let expected = if j < 5 { 1.0 + product } else { 1.0 };
                assert!((dst[i * 8 + j] - expected).abs() < 1e-5);
            }
        }
    }
}
