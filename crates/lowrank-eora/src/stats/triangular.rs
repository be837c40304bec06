//! T with T Tᵀ = H, without H: R of the QR factorisation of Xᵀ.
//!
//! R ← qr([R; X_bᵀ]) batch by batch, in f64: twice the operations of H and none of its squared
//! condition. For layers whose inputs are so badly scaled that squares lose them; the solver takes
//! T as [`Weighting::Factor`](crate::solve::Weighting::Factor).

use super::Rows;
use super::gram::BLOCK_TOKENS;
use crate::Result;
use faer::Mat;
use linalg::Qr;

/// Collects T, `n × n`, lower triangular.
#[derive(Clone, Debug)]
pub struct FactorCollector {
    width: usize,
    /// R, at most n rows.
    r: Mat<f64>,
    pending: Vec<f32>,
}

impl FactorCollector {
    /// The factor of no tokens of `width` channels.
    pub fn new(width: usize) -> Self {
        Self {
            width,
            r: Mat::zeros(0, width),
            pending: Vec::new(),
        }
    }

    /// Tokens of one factorisation: as many as R has rows, or its own rows cost the most.
    fn block(&self) -> usize {
        BLOCK_TOKENS.max(self.width)
    }

    /// Adds a batch.
    ///
    /// # Errors
    /// When its width is another one.
    pub fn update(&mut self, rows: &Rows) -> Result<()> {
        rows.expect_width(self.width)?;
        let mut start = 0;
        while start < rows.tokens() {
            let room = self.block() - self.pending.len() / self.width;
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
        let (known, width) = (self.r.nrows(), self.width);
        let tokens = self.pending.len() / width.max(1);
        let stacked = Mat::from_fn(known + tokens, width, |i, j| {
            if i < known {
                self.r[(i, j)]
            } else {
                f64::from(self.pending[(i - known) * width + j])
            }
        });
        if tokens > 0 {
            self.r = Qr::new(stacked).r();
        }
        self.pending.clear();
    }

    /// T = Rᵀ, `n × min(n, t)`.
    pub fn finish(mut self) -> Mat<f64> {
        self.flush();
        self.r.transpose().to_owned()
    }
}
