//! What the tests share.

use faer::{Mat, MatRef};

use crate::product;

/// Entries in [−1, 1) from a linear congruential generator.
pub(crate) fn random(rows: usize, cols: usize, seed: u64) -> Mat<f64> {
    let mut state = seed;
    Mat::from_fn(rows, cols, |_, _| {
        state = state
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        2.0 * ((state >> 11) as f64 / (1u64 << 53) as f64) - 1.0
    })
}

pub(crate) fn with_threads<T: Send>(threads: usize, run: impl FnOnce() -> T + Send) -> T {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
    pool.expect("a pool").install(run)
}

#[track_caller]
pub(crate) fn same_for_all_thread_counts(run: impl Fn() -> Mat<f64> + Sync) {
    let one = with_threads(1, &run);
    for threads in [2, 3, 5] {
        assert!(with_threads(threads, &run) == one, "{threads} threads");
    }
}

#[track_caller]
pub(crate) fn assert_close(found: MatRef<'_, f64>, expected: MatRef<'_, f64>, tolerance: f64) {
    assert_eq!(found.shape(), expected.shape());
    let difference = (found - expected).norm_max();
    let scale = expected.norm_max();
    assert!(
        difference <= tolerance * scale,
        "differ by {difference}, largest entry {scale}"
    );
}

#[track_caller]
pub(crate) fn assert_orthonormal(columns: MatRef<'_, f64>, tolerance: f64) {
    let n = columns.ncols();
    let squares = product(columns.transpose(), columns);
    assert_close(
        squares.as_ref(),
        Mat::<f64>::identity(n, n).as_ref(),
        tolerance,
    );
}
