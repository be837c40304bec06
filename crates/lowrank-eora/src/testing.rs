//! Inputs for tests.

use faer::{Mat, MatRef};

/// A linear congruential generator of numbers in [−1, 1).
pub(crate) struct Lcg(pub(crate) u64);

impl Lcg {
    pub(crate) fn next(&mut self) -> f64 {
        self.0 = (self.0)
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        2.0 * ((self.0 >> 11) as f64 / (1u64 << 53) as f64) - 1.0
    }

    /// Entries are drawn row by row.
    pub(crate) fn matrix(&mut self, rows: usize, cols: usize) -> Mat<f64> {
        let entries: Vec<f64> = (0..rows * cols).map(|_| self.next()).collect();
        MatRef::from_row_major_slice(&entries, rows, cols).to_owned()
    }

    /// `n × t`: mixed channels whose scales fall.
    pub(crate) fn activations(&mut self, n: usize, t: usize) -> Mat<f64> {
        let z = self.matrix(n, t);
        let p = self.matrix(n, n);
        let mixed = &z + faer::Scale(0.3) * (&p * &z);
        Mat::from_fn(n, t, |i, j| mixed[(i, j)] * 0.5f64.powi((i % 5) as i32))
    }
}

/// Runs in a pool of so many threads.
pub(crate) fn with_threads<T: Send>(threads: usize, run: impl FnOnce() -> T + Send) -> T {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
    pool.expect("a pool").install(run)
}

/// Asymmetric round-to-nearest in groups along a row.
pub(crate) fn round_to_nearest(w: MatRef<'_, f64>, bits: u32, group: usize) -> Mat<f64> {
    let top = f64::from((1u32 << bits) - 1);
    let mut out = w.to_owned();
    for i in 0..w.nrows() {
        for start in (0..w.ncols()).step_by(group) {
            let columns = start..w.ncols().min(start + group);
            let lo = columns.clone().fold(0.0f64, |lo, j| lo.min(w[(i, j)]));
            let hi = columns.clone().fold(0.0f64, |hi, j| hi.max(w[(i, j)]));
            let scale = if hi > lo { (hi - lo) / top } else { 1.0 };
            let zero = (-lo / scale).round_ties_even();
            for j in columns {
                let code = ((w[(i, j)] / scale).round_ties_even() + zero).clamp(0.0, top);
                out[(i, j)] = scale * (code - zero);
            }
        }
    }
    out
}

/// W, W_c and X of the golden case: 12 × 16, int3 in groups of 8, 64 tokens.
pub(crate) struct Golden {
    pub(crate) w: Mat<f64>,
    pub(crate) compressed: Mat<f64>,
    pub(crate) x: Mat<f64>,
}

impl Golden {
    pub(crate) fn new() -> Self {
        let mut lcg = Lcg(1);
        let w = lcg.matrix(12, 16);
        let x = lcg.activations(16, 64);
        let compressed = round_to_nearest(w.as_ref(), 3, 8);
        Self { w, compressed, x }
    }

    pub(crate) fn d(&self) -> Mat<f64> {
        &self.w - &self.compressed
    }

    pub(crate) fn h(&self) -> Mat<f64> {
        &self.x * self.x.transpose()
    }
}

#[track_caller]
pub(crate) fn assert_close(found: f64, expected: f64, tolerance: f64) {
    assert!(
        (found - expected).abs() <= tolerance * expected.abs().max(1.0),
        "found {found}, expected {expected}"
    );
}

#[track_caller]
pub(crate) fn assert_matrix_close(found: MatRef<'_, f64>, expected: MatRef<'_, f64>, tol: f64) {
    assert_eq!(found.shape(), expected.shape());
    let scale = expected.norm_max().max(1e-300);
    let difference = (found - expected).norm_max();
    assert!(
        difference <= tol * scale,
        "differ by {difference}, scale {scale}"
    );
}
