//! Matrix products that do not depend on the number of threads.
//!
//! The result is divided into tiles by its shape alone, and each tile is computed by one thread. faer's own parallel
//! products are divided by the number of threads.

use faer::traits::ComplexField;
use faer::traits::math_utils::one;
use faer::{Accum, Mat, MatMut, MatRef, Par};
use rayon::prelude::*;

/// Which entries of a product are wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entries {
    /// The lower triangle. Entries above it are left unspecified: tiles that the diagonal crosses are computed whole.
    Lower,
    /// All.
    All,
}

/// Rows and columns of a tile: multiples of what the kernels take at once, small enough for a core's cache. Narrow
/// results, which have one tile to a row, get more rows of them.
const fn tile(cols: usize) -> (usize, usize) {
    if cols <= 256 { (96, 256) } else { (288, 256) }
}

/// a b.
///
/// # Panics
/// When a has another number of columns than b has rows.
pub fn product<T: ComplexField>(a: MatRef<'_, T>, b: MatRef<'_, T>) -> Mat<T> {
    assert_inner(a.ncols(), b.nrows());
    let mut out = Mat::zeros(a.nrows(), b.ncols());
    tiles(out.as_mut(), Entries::All, |(top, left), tile| {
        let (a, b) = (a.subrows(top, tile.nrows()), b.subcols(left, tile.ncols()));
        faer::linalg::matmul::matmul(tile, Accum::Replace, a, b, one::<T>(), Par::Seq);
    });
    out
}

/// acc += scale · a b.
///
/// # Panics
/// When the shapes do not fit.
pub fn add_product<T: ComplexField>(
    acc: MatMut<'_, T>,
    a: MatRef<'_, T>,
    b: MatRef<'_, T>,
    scale: T,
    entries: Entries,
) {
    assert_inner(a.ncols(), b.nrows());
    assert_outer(acc.as_ref(), (a.nrows(), b.ncols()));
    tiles(acc, entries, |(top, left), tile| {
        let (a, b) = (a.subrows(top, tile.nrows()), b.subcols(left, tile.ncols()));
        faer::linalg::matmul::matmul(tile, Accum::Add, a, b, scale.clone(), Par::Seq);
    });
}

/// The lower triangle of `out` = Lᵀ L for a lower triangular L with zeros above the diagonal.
pub(crate) fn inverse_of_squares(out: MatMut<'_, f64>, l: MatRef<'_, f64>) {
    let n = l.nrows();
    tiles(out, Entries::Lower, |(top, left), tile| {
        // Rows of L above the later of both ranges of columns are zero in one of them.
        let from = top.max(left);
        let l = l.subrows(from, n - from);
        let (a, b) = (l.subcols(top, tile.nrows()), l.subcols(left, tile.ncols()));
        faer::linalg::matmul::matmul(tile, Accum::Replace, a.transpose(), b, 1.0, Par::Seq);
    });
}

fn tiles<T: Send + Sync>(
    out: MatMut<'_, T>,
    entries: Entries,
    fill: impl Fn((usize, usize), MatMut<'_, T>) + Sync,
) {
    let (height, width) = tile(out.ncols());
    let panels = out.par_col_chunks_mut(width).enumerate();
    panels.for_each(|(column, panel)| {
        let left = column * width;
        let tiles = panel.par_row_chunks_mut(height).enumerate();
        tiles.for_each(|(row, tile)| {
            let top = row * height;
            if entries == Entries::All || top + tile.nrows() > left {
                fill((top, left), tile);
            }
        });
    });
}

/// Columns of a panel and rows of a part of it: products of a part stay in a core's cache, and small matrices still make
/// enough panels for all cores.
const fn panel(cols: usize) -> usize {
    if cols >= 2048 { 256 } else { 64 }
}
const PART: usize = 512;

/// acc += scale · a bᵀ, with products in f32 that are added to f64 sums. With tokens as columns of a and b, blocks of a
/// few hundred of them are right to about 1e-6 of the entries' scale.
///
/// # Panics
/// When the shapes do not fit.
pub fn add_product_f32(
    acc: MatMut<'_, f64>,
    a: MatRef<'_, f32>,
    b: MatRef<'_, f32>,
    scale: f64,
    entries: Entries,
) {
    assert_inner(a.ncols(), b.ncols());
    assert_outer(acc.as_ref(), (a.nrows(), b.nrows()));
    let rows = acc.nrows();
    let width = panel(acc.ncols());
    acc.par_col_chunks_mut(width)
        .enumerate()
        .for_each(|(panel, mut acc)| {
            let (first, cols) = (panel * width, acc.ncols());
            let b = b.subrows(first, cols).transpose();
            let mut part = Mat::<f32>::zeros(PART.min(rows), cols);
            let mut top = if entries == Entries::Lower { first } else { 0 };
            while top < rows {
                let height = PART.min(rows - top);
                let mut part = part.as_mut().subrows_mut(0, height);
                faer::linalg::matmul::matmul(
                    part.as_mut(),
                    Accum::Replace,
                    a.subrows(top, height),
                    b,
                    1.0,
                    Par::Seq,
                );
                for j in 0..cols {
                    let mut sums = acc.as_mut().col_mut(j).subrows_mut(top, height);
                    let products = part.as_ref().col(j);
                    let slices = (
                        sums.as_mut().try_as_col_major_mut(),
                        products.try_as_col_major(),
                    );
                    if let (Some(sums), Some(products)) = slices {
                        let pairs = sums.as_slice_mut().iter_mut().zip(products.as_slice());
                        pairs.for_each(|(sum, &product)| *sum += scale * f64::from(product));
                    } else {
                        let pairs = sums.iter_mut().zip(products.iter());
                        pairs.for_each(|(sum, &product)| *sum += scale * f64::from(product));
                    }
                }
                top += height;
            }
        });
}

/// Copies the lower triangle over the upper one, in squares that fit a cache.
///
/// # Panics
/// When the matrix is not square.
pub fn mirror_lower<T: Copy>(mut matrix: MatMut<'_, T>) {
    const SIDE: usize = 64;
    let n = matrix.ncols();
    assert_eq!(matrix.nrows(), n, "a symmetric matrix is square");
    for left in (0..n).step_by(SIDE) {
        for top in (left..n).step_by(SIDE) {
            for j in left..n.min(left + SIDE) {
                for i in top.max(j + 1)..n.min(top + SIDE) {
                    matrix[(j, i)] = matrix[(i, j)];
                }
            }
        }
    }
}

/// Σ a ∘ b, column by column.
///
/// # Panics
/// When the shapes differ.
pub fn dot(a: MatRef<'_, f64>, b: MatRef<'_, f64>) -> f64 {
    assert_outer(a, b.shape());
    let columns = a.col_iter().zip(b.col_iter());
    columns
        .map(|(a, b)| a.iter().zip(b.iter()).map(|(x, y)| x * y).sum::<f64>())
        .sum()
}

#[track_caller]
fn assert_inner(a: usize, b: usize) {
    assert_eq!(a, b, "inner sizes of a product");
}

#[track_caller]
fn assert_outer<T>(out: MatRef<'_, T>, shape: (usize, usize)) {
    assert_eq!(out.shape(), shape, "shape of a result");
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, random, with_threads};

    #[test]
    fn products_of_any_shape_are_right_and_the_same_for_all_thread_counts() {
        for (m, k, n) in [
            (0, 3, 4),
            (3, 0, 4),
            (1, 700, 1),
            (300, 40, 520),
            (700, 300, 90),
        ] {
            let (a, b) = (random(m, k, 31), random(k, n, 32));
            let one = with_threads(1, || product(a.as_ref(), b.as_ref()));
            assert_close(one.as_ref(), (&a * &b).as_ref(), 1e-12);
            let left = random(m, n, 33);
            let sum = |entries| {
                let mut sum = left.clone();
                add_product(sum.as_mut(), a.as_ref(), b.as_ref(), -0.5, entries);
                sum
            };
            let all = with_threads(1, || sum(Entries::All));
            let expected = &left - faer::Scale(0.5) * (&a * &b);
            assert_close(all.as_ref(), expected.as_ref(), 1e-12);
            for threads in [2, 3] {
                with_threads(threads, || {
                    assert_eq!(product(a.as_ref(), b.as_ref()), one);
                    assert_eq!(sum(Entries::All), all);
                });
            }
            let lower = sum(Entries::Lower);
            for j in 0..n {
                for i in j..m {
                    assert_eq!(lower[(i, j)], all[(i, j)]);
                }
            }
        }
    }

    #[test]
    fn f32_products_add_up_in_f64_and_the_same_for_all_thread_counts() {
        let single = |x: Mat<f64>| Mat::from_fn(x.nrows(), x.ncols(), |i, j| x[(i, j)] as f32);
        let double = |x: &Mat<f32>| Mat::from_fn(x.nrows(), x.ncols(), |i, j| f64::from(x[(i, j)]));
        for (m, n, tokens) in [(3, 5, 0), (200, 70, 90), (700, 2100, 40)] {
            let (a, b) = (single(random(m, tokens, 34)), single(random(n, tokens, 35)));
            let left = random(m, n, 36);
            let sum = |entries| {
                let mut sum = left.clone();
                add_product_f32(sum.as_mut(), a.as_ref(), b.as_ref(), 2.0, entries);
                sum
            };
            let all = with_threads(1, || sum(Entries::All));
            let expected = &left + faer::Scale(2.0) * (double(&a) * double(&b).transpose());
            assert_close(all.as_ref(), expected.as_ref(), 1e-6);
            for threads in [2, 3] {
                with_threads(threads, || assert_eq!(sum(Entries::All), all));
            }
            let lower = sum(Entries::Lower);
            let mut pairs = (0..n).flat_map(|j| (j..m).map(move |i| (i, j)));
            assert!(pairs.all(|at| lower[at] == all[at]));
        }
    }

    #[test]
    fn a_sum_into_a_row_major_view_is_that_into_a_matrix() {
        let a = Mat::from_fn(90, 30, |i, j| (i * 31 + j * 7) as f32 % 11.0);
        let mut columns = Mat::zeros(90, 90);
        add_product_f32(columns.as_mut(), a.as_ref(), a.as_ref(), 1.0, Entries::All);
        let mut rows = Mat::zeros(90, 90);
        let view = rows.as_mut().transpose_mut();
        add_product_f32(view, a.as_ref(), a.as_ref(), 1.0, Entries::All);
        assert_eq!(rows.transpose(), columns);
    }

    #[test]
    fn the_mirrored_triangle_is_symmetric_and_the_dot_is_the_sum_of_products() {
        let mut x = random(130, 130, 37);
        let before = x.clone();
        mirror_lower(x.as_mut());
        assert_eq!(x, x.transpose());
        assert!((0..130).all(|j| (j..130).all(|i| x[(i, j)] == before[(i, j)])));
        let ones = Mat::from_fn(2, 3, |i, j| (i + 2 * j) as f64);
        assert_eq!(
            dot(ones.as_ref(), ones.as_ref()),
            (0..6).map(|v| v * v).sum::<i32>() as f64
        );
    }
}
