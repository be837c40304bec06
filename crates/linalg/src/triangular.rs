//! Triangular systems, and inverses of triangular matrices.

use faer::linalg::triangular_inverse::invert_lower_triangular;
use faer::linalg::triangular_solve::{
    solve_lower_triangular_in_place, solve_upper_triangular_in_place,
};
use faer::{MatMut, MatRef, Par};
use rayon::prelude::*;

use crate::parallel::pieces;

/// Right-hand sides that one thread solves together.
const COLUMNS: usize = 64;

/// Replaces x by L⁻¹ x, for a lower triangular L; entries above its diagonal are not read.
///
/// A zero on the diagonal gives entries that are not finite.
///
/// # Panics
/// When L is not square, or x has another number of rows.
pub fn solve_lower(l: MatRef<'_, f64>, x: MatMut<'_, f64>) {
    assert_fits(l, x.as_ref());
    x.par_col_chunks_mut(COLUMNS)
        .for_each(|x| solve_lower_triangular_in_place(l, x, Par::Seq));
}

/// Replaces x by U⁻¹ x, for an upper triangular U; entries below its diagonal are not read.
///
/// A zero on the diagonal gives entries that are not finite.
///
/// # Panics
/// When U is not square, or x has another number of rows.
pub fn solve_upper(u: MatRef<'_, f64>, x: MatMut<'_, f64>) {
    assert_fits(u, x.as_ref());
    x.par_col_chunks_mut(COLUMNS)
        .for_each(|x| solve_upper_triangular_in_place(u, x, Par::Seq));
}

/// Writes L⁻¹ into the lower triangle of `out`; entries of L above its diagonal are not read, those of `out` not written.
///
/// # Panics
/// When a matrix is not square, or they differ in size.
pub fn invert_lower(out: MatMut<'_, f64>, l: MatRef<'_, f64>) {
    assert_fits(l, out.as_ref());
    assert_eq!(out.nrows(), out.ncols(), "the inverse is square");
    let par = pieces(l.nrows());
    invert_lower_triangular(out, l, par);
}

#[track_caller]
fn assert_fits(triangle: MatRef<'_, f64>, x: MatRef<'_, f64>) {
    assert_eq!(triangle.nrows(), triangle.ncols(), "a triangle is square");
    assert_eq!(triangle.nrows(), x.nrows(), "sizes of a triangular system");
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::product;
    use crate::testing::{assert_close, random, same_for_all_thread_counts};
    use faer::Mat;

    /// Well conditioned, with NaN where nothing may be read.
    fn triangles(n: usize) -> (Mat<f64>, Mat<f64>) {
        let x = random(n, n, 7);
        let entry = |i: usize, j: usize| match i.cmp(&j) {
            std::cmp::Ordering::Equal => 2.0 + x[(i, j)],
            _ => x[(i, j)] / n as f64,
        };
        let lower = |above: f64| Mat::from_fn(n, n, |i, j| if i < j { above } else { entry(i, j) });
        (lower(f64::NAN), lower(0.0))
    }

    #[test]
    fn solutions_and_inverses_fit_their_triangles_whatever_the_threads() {
        for n in [1, 5, 130, 400] {
            let (read, lower) = triangles(n);
            let x = random(n, 150, 8);
            let solved = || {
                let mut solved = x.clone();
                solve_lower(read.as_ref(), solved.as_mut());
                solved
            };
            assert_close(
                product(lower.as_ref(), solved().as_ref()).as_ref(),
                x.as_ref(),
                1e-12,
            );
            same_for_all_thread_counts(solved);

            let solved = || {
                let mut solved = x.clone();
                solve_upper(read.transpose(), solved.as_mut());
                solved
            };
            let back = product(lower.transpose(), solved().as_ref());
            assert_close(back.as_ref(), x.as_ref(), 1e-12);
            same_for_all_thread_counts(solved);

            let inverse = || {
                let mut inverse = Mat::zeros(n, n);
                invert_lower(inverse.as_mut(), read.as_ref());
                inverse
            };
            let one = product(lower.as_ref(), inverse().as_ref());
            assert_close(one.as_ref(), Mat::<f64>::identity(n, n).as_ref(), 1e-12);
            same_for_all_thread_counts(inverse);
        }
    }
}
