//! Matrix products on flat row-major buffers: a checked door to the `gemm` crate that candle computes with.

use gemm::Parallelism;

/// A strided view of a matrix.
#[derive(Debug, Clone, Copy)]
pub(crate) struct View<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a> View<'a> {
    /// Rows of `cols` values that start `stride` apart.
    pub(crate) fn strided(data: &'a [f32], rows: usize, cols: usize, stride: usize) -> Self {
        Self {
            data,
            rows,
            cols,
            row_stride: stride,
            col_stride: 1,
        }
    }

    /// Dense rows.
    pub(crate) fn new(data: &'a [f32], rows: usize, cols: usize) -> Self {
        Self::strided(data, rows, cols, cols)
    }

    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    pub(crate) fn cols(&self) -> usize {
        self.cols
    }

    /// Row `i` of a view that is not transposed.
    pub(crate) fn row(&self, i: usize) -> &'a [f32] {
        debug_assert_eq!(self.col_stride, 1);
        &self.data[i * self.row_stride..][..self.cols]
    }

    pub(crate) fn t(self) -> Self {
        Self {
            data: self.data,
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
        }
    }
}

/// Whether the product is added to what is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Store {
    Replace,
    Add,
}

/// `dst = a b` or `dst += a b`; rows of `dst` start `stride` apart. Single-threaded, so that results do not depend on the
/// number of threads.
///
/// # Panics
/// The views do not fit each other or their buffers.
pub(crate) fn gemm(dst: &mut [f32], stride: usize, into: Store, a: View<'_>, b: View<'_>) {
    let (m, n, k) = (a.rows, b.cols, a.cols);
    assert_eq!(a.cols, b.rows, "inner sizes");
    if m == 0 || n == 0 {
        return;
    }
    assert!(
        stride >= n && (m - 1) * stride + n <= dst.len(),
        "destination too small"
    );
    for v in [&a, &b] {
        let last =
            v.rows.saturating_sub(1) * v.row_stride + v.cols.saturating_sub(1) * v.col_stride;
        assert!(
            v.rows == 0 || v.cols == 0 || last < v.data.len(),
            "operand too small"
        );
    }
    // SAFETY: every element that gemm reads or writes is at row * row_stride + col * col_stride with row and col below the
    // sizes given, and the assertions above place the last of them inside its slice; `dst` is borrowed mutably and so does
    // not overlap the operands; distinct (row, col) of `dst` are distinct elements because stride >= n.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            dst.as_mut_ptr(),
            1,
            stride as isize,
            into == Store::Add,
            a.data.as_ptr(),
            a.col_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.col_stride as isize,
            b.row_stride as isize,
            1.0,
            1.0,
            false,
            false,
            false,
            Parallelism::None,
        );
    }
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
        gemm(
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
