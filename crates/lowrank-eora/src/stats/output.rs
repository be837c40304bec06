//! G = Σ w (D x)(D x)ᵀ of one residual D, without H.
//!
//! For an input wider than the output: 2mnt + m²t operations and m² numbers where H takes n²t and
//! n². D has to be known before the tokens pass. D x is f32, like the layer itself; its products
//! are f64, as G holds the squares of whatever dominates D x.

use super::Rows;
use super::gram::{BLOCK_TOKENS, Gram};
use crate::Result;
use crate::matrix::check_finite;
use faer::{Mat, MatRef};
use linalg::{Entries, add_product, mirror_lower, product};

/// Collects G, which finishes as a [`Gram`] of the outputs.
#[derive(Clone, Debug)]
pub struct OutputCollector {
    d: Mat<f32>,
    /// Lower triangle.
    sum: Mat<f64>,
    tokens: u64,
    weight: f64,
    pending: Vec<f32>,
}

impl OutputCollector {
    /// An empty sum for the residual `d`, `m × n`.
    ///
    /// # Errors
    /// When an entry is not finite.
    pub fn new(d: MatRef<'_, f64>) -> Result<Self> {
        check_finite(d, "residual")?;
        Ok(Self {
            d: Mat::from_fn(d.nrows(), d.ncols(), |i, j| d[(i, j)] as f32),
            sum: Mat::zeros(d.nrows(), d.nrows()),
            tokens: 0,
            weight: 0.0,
            pending: Vec::new(),
        })
    }

    /// Adds a batch.
    ///
    /// # Errors
    /// When its width is not D's.
    pub fn update(&mut self, rows: &Rows) -> Result<()> {
        let width = self.d.ncols();
        rows.expect_width(width)?;
        self.tokens += rows.tokens() as u64;
        self.weight += rows.total_weight();
        let mut start = 0;
        while start < rows.tokens() {
            let room = BLOCK_TOKENS - self.pending.len() / width;
            let end = rows.tokens().min(start + room);
            rows.scaled_into(start..end, &mut self.pending);
            if end - start == room {
                self.flush();
            }
            start = end;
        }
        Ok(())
    }

    fn flush(&mut self) {
        let (m, n) = self.d.shape();
        let tokens = self.pending.len() / n.max(1);
        let x = MatRef::from_column_major_slice(&self.pending, n, tokens);
        let dx = product(self.d.as_ref(), x);
        let dx = Mat::from_fn(m, tokens, |i, j| f64::from(dx[(i, j)]));
        let (dx, lower) = (dx.as_ref(), Entries::Lower);
        add_product(self.sum.as_mut(), dx, dx.transpose(), 1.0, lower);
        self.pending.clear();
    }

    /// Bytes held.
    pub fn bytes(&self) -> u64 {
        let (m, n) = self.d.shape();
        let single = m * n + self.pending.capacity();
        (size_of::<f64>() * m * m + size_of::<f32>() * single) as u64
    }

    /// G, `m × m`.
    pub fn finish(mut self) -> Gram {
        self.flush();
        mirror_lower(self.sum.as_mut());
        Gram::from_parts(self.sum, self.tokens, self.weight)
    }
}
