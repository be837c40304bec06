//! Σ w ‖E x‖² of one error E, without H: what a weight, or what is wrong with it, makes of tokens.
//!
//! 2pnt operations, and E in f32, where H takes n²t and n² numbers in f64. Products are f32, sums
//! f64.

use super::Rows;
use crate::Result;
use crate::matrix::check_finite;
use faer::{Mat, MatRef};
use linalg::product;

/// Collects Σ w ‖E x‖².
#[derive(Clone, Debug)]
pub(crate) struct EnergyCollector {
    e: Mat<f32>,
    sum: f64,
}

impl EnergyCollector {
    /// No tokens yet of the error `e`, `p × n`.
    ///
    /// # Errors
    /// When an entry is not finite.
    pub(crate) fn new(e: MatRef<'_, f64>) -> Result<Self> {
        check_finite(e, "error of a weight")?;
        Ok(Self {
            e: Mat::from_fn(e.nrows(), e.ncols(), |i, j| e[(i, j)] as f32),
            sum: 0.0,
        })
    }

    /// Adds a batch.
    ///
    /// # Errors
    /// When its width is not E's.
    pub(crate) fn update(&mut self, rows: &Rows) -> Result<()> {
        rows.expect_width(self.e.ncols())?;
        let outputs = product(self.e.as_ref(), rows.matrix());
        for (token, output) in outputs.col_iter().enumerate() {
            let square: f64 = output.iter().map(|&y| f64::from(y).powi(2)).sum();
            self.sum += rows.weight(token) * square;
        }
        Ok(())
    }

    /// Bytes held.
    pub(crate) fn bytes(&self) -> u64 {
        (size_of::<f32>() * self.e.nrows() * self.e.ncols()) as u64
    }

    /// Σ w ‖E x‖².
    pub(crate) fn finish(self) -> f64 {
        self.sum
    }
}
