//! Matrix products that do not depend on the number of threads.
//!
//! The result is cut into tiles by its shape alone, and each tile is made by one thread. faer's own
//! parallel products are cut by the number of threads.

use faer::traits::ComplexField;
use faer::{Accum, Mat, MatMut, MatRef, Par};
use rayon::prelude::*;

/// Which entries of a product are wanted.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Entries {
    /// The lower triangle, down to whole tiles.
    Lower,
    /// All.
    All,
}

/// Rows and columns of a tile: multiples of what the kernels take at once, small enough for a
/// core's cache. Narrow results, which have one tile to a row, get more rows of them.
const fn tile(cols: usize) -> (usize, usize) {
    if cols <= 256 { (96, 256) } else { (288, 256) }
}

/// a b.
pub(crate) fn product<T: ComplexField + From<f32>>(a: MatRef<'_, T>, b: MatRef<'_, T>) -> Mat<T> {
    let mut out = Mat::zeros(a.nrows(), b.ncols());
    tiles(out.as_mut(), Entries::All, |(top, left), tile| {
        let (a, b) = (a.subrows(top, tile.nrows()), b.subcols(left, tile.ncols()));
        faer::linalg::matmul::matmul(tile, Accum::Replace, a, b, T::from(1.0), Par::Seq);
    });
    out
}

/// acc += scale · a b.
pub(crate) fn add_product(
    acc: &mut Mat<f64>,
    a: MatRef<'_, f64>,
    b: MatRef<'_, f64>,
    scale: f64,
    entries: Entries,
) {
    tiles(acc.as_mut(), entries, |(top, left), tile| {
        let (a, b) = (a.subrows(top, tile.nrows()), b.subcols(left, tile.ncols()));
        faer::linalg::matmul::matmul(tile, Accum::Add, a, b, scale, Par::Seq);
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

/// Columns of a panel and rows of a part of it: products of a part stay in a core's cache, and
/// small matrices still make enough panels for all cores.
const fn panel(cols: usize) -> usize {
    if cols >= 2048 { 256 } else { 64 }
}
const PART: usize = 512;

/// acc += scale · a bᵀ with f32 products and f64 sums; a and b hold one token per column.
pub(crate) fn add_products(
    acc: &mut Mat<f64>,
    a: MatRef<'_, f32>,
    b: MatRef<'_, f32>,
    scale: f64,
    entries: Entries,
) {
    let rows = acc.nrows();
    let width = panel(acc.ncols());
    acc.as_mut()
        .par_col_chunks_mut(width)
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
                    let sums = acc.as_mut().col_mut(j).subrows_mut(top, height);
                    let products = part.as_ref().col(j).try_as_col_major();
                    let (Some(sums), Some(products)) = (sums.try_as_col_major_mut(), products)
                    else {
                        unreachable!("matrices that own their entries are column-major");
                    };
                    for (sum, &product) in sums.as_slice_mut().iter_mut().zip(products.as_slice()) {
                        *sum += scale * f64::from(product);
                    }
                }
                top += height;
            }
        });
}

/// Copies the lower triangle over the upper one, in squares that fit a cache.
pub(crate) fn mirror_lower(matrix: &mut Mat<f64>) {
    const SIDE: usize = 64;
    let n = matrix.ncols();
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Lcg, assert_matrix_close, with_threads};

    #[test]
    fn products_of_any_shape_are_right_and_the_same_for_all_thread_counts() {
        let mut lcg = Lcg(31);
        for (m, k, n) in [
            (0, 3, 4),
            (3, 0, 4),
            (1, 700, 1),
            (300, 40, 520),
            (700, 300, 90),
        ] {
            let (a, b) = (lcg.matrix(m, k), lcg.matrix(k, n));
            let one = with_threads(1, || product(a.as_ref(), b.as_ref()));
            assert_matrix_close(one.as_ref(), (&a * &b).as_ref(), 1e-12);
            let left = lcg.matrix(m, n);
            let sum = |entries| {
                let mut sum = left.clone();
                add_product(&mut sum, a.as_ref(), b.as_ref(), -0.5, entries);
                sum
            };
            let all = with_threads(1, || sum(Entries::All));
            let expected = &left - faer::Scale(0.5) * (&a * &b);
            assert_matrix_close(all.as_ref(), expected.as_ref(), 1e-12);
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
}
