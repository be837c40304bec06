//! H = Σ w x xᵀ.
//!
//! Products of blocks of tokens are f32, sums over blocks f64: entries are right to a few 1e-6 of
//! √(H_ii H_jj), whatever the channels' scales. Blocks are filled across calls, so that a sum does
//! not depend on how its tokens were batched.

use super::Rows;
use crate::{Error, Result};
use faer::{Mat, MatRef};
use linalg::{Entries, add_product, add_product_f32, mirror_lower};
use serde::{Deserialize, Serialize};

/// Tokens of one f32 product: long enough for the GEMM's rate, short enough for its rounding.
pub(crate) const BLOCK_TOKENS: usize = 512;

/// How the products of one call join the sum.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Accumulation {
    /// H = Σ w x xᵀ over all tokens.
    #[default]
    Sum,
    /// Of EoRA's published program: a call is a batch of `batch` samples, and
    /// H ← H · N/(N + batch) + X Xᵀ/N with the total N. Weights fall exponentially from the last
    /// sample to the first (to about 0.37 of it for batches of one); only there to reproduce
    /// published numbers.
    EoraCompat {
        /// N, samples of the whole run.
        samples: usize,
        /// Samples of one call.
        batch: usize,
    },
}

/// A finished H.
#[derive(Clone, Debug)]
pub struct Gram {
    matrix: Mat<f64>,
    tokens: u64,
    weight: f64,
}

impl Gram {
    /// H = X Xᵀ in f64 of an X that is at hand, `n × t`, one token per column.
    ///
    /// # Errors
    /// When an entry is not finite.
    pub fn of(x: MatRef<'_, f64>) -> Result<Self> {
        crate::matrix::check_finite(x, "activations")?;
        let mut matrix = Mat::zeros(x.nrows(), x.nrows());
        add_product(matrix.as_mut(), x, x.transpose(), 1.0, Entries::Lower);
        mirror_lower(matrix.as_mut());
        Ok(Self {
            matrix,
            tokens: x.ncols() as u64,
            weight: x.ncols() as f64,
        })
    }

    pub(crate) fn from_parts(matrix: Mat<f64>, tokens: u64, weight: f64) -> Self {
        Self {
            matrix,
            tokens,
            weight,
        }
    }

    /// H, `n × n`, symmetric.
    pub fn matrix(&self) -> MatRef<'_, f64> {
        self.matrix.as_ref()
    }

    /// Channels n.
    pub fn width(&self) -> usize {
        self.matrix.nrows()
    }

    /// Tokens in the sum.
    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    /// Σ of the tokens' weights.
    pub fn weight(&self) -> f64 {
        self.weight
    }

    /// Adds the sum over other tokens. Exponentially weighted sums do not add up to one of a longer
    /// run.
    ///
    /// # Errors
    /// When the widths differ.
    pub fn merge(&mut self, other: &Self) -> Result<()> {
        crate::matrix::expect_shape("Gram matrix", other.matrix(), self.matrix.shape())?;
        self.matrix += &other.matrix;
        self.tokens += other.tokens;
        self.weight += other.weight;
        Ok(())
    }
}

/// Collects [`Gram`].
#[derive(Clone, Debug)]
pub struct GramCollector {
    /// Lower triangle.
    sum: Mat<f64>,
    tokens: u64,
    weight: f64,
    accumulation: Accumulation,
    /// √w x of tokens that do not fill a block yet.
    pending: Vec<f32>,
}

impl GramCollector {
    /// An empty sum over tokens of `width` channels.
    ///
    /// # Errors
    /// When the accumulation counts no samples.
    pub fn new(width: usize, accumulation: Accumulation) -> Result<Self> {
        if let Accumulation::EoraCompat { samples, batch } = accumulation
            && (samples == 0 || batch == 0)
        {
            return Err(Error::Setting {
                name: "samples of the EoRA accumulation",
                value: format!("{samples} in batches of {batch}"),
                expected: "numbers ≥ 1",
            });
        }
        Ok(Self {
            sum: Mat::zeros(width, width),
            tokens: 0,
            weight: 0.0,
            accumulation,
            pending: Vec::new(),
        })
    }

    /// Goes on from a finished sum.
    ///
    /// # Errors
    /// When the accumulation counts no samples.
    pub fn resume(gram: Gram, accumulation: Accumulation) -> Result<Self> {
        let empty = Self::new(0, accumulation)?;
        Ok(Self {
            sum: gram.matrix,
            tokens: gram.tokens,
            weight: gram.weight,
            ..empty
        })
    }

    /// Channels.
    pub fn width(&self) -> usize {
        self.sum.nrows()
    }

    /// Adds a batch.
    ///
    /// # Errors
    /// When its width is another one.
    pub fn update(&mut self, rows: &Rows) -> Result<()> {
        rows.expect_width(self.width())?;
        self.tokens += rows.tokens() as u64;
        self.weight += rows.total_weight();
        let scale = match self.accumulation {
            Accumulation::Sum => 1.0,
            Accumulation::EoraCompat { samples, batch } => {
                let n = samples as f64;
                self.sum *= faer::Scale(n / (n + batch as f64));
                1.0 / n
            }
        };
        let mut start = 0;
        while start < rows.tokens() {
            let room = BLOCK_TOKENS - self.pending.len() / self.width();
            let end = rows.tokens().min(start + room);
            rows.scaled_into(start..end, &mut self.pending);
            if end - start == room {
                self.flush(scale);
            }
            start = end;
        }
        if self.accumulation != Accumulation::Sum {
            self.flush(scale);
        }
        Ok(())
    }

    /// Bytes held.
    pub fn bytes(&self) -> u64 {
        let n = self.width();
        (size_of::<f64>() * n * n + size_of::<f32>() * self.pending.capacity()) as u64
    }

    fn flush(&mut self, scale: f64) {
        let width = self.width();
        let tokens = self.pending.len() / width.max(1);
        let x = MatRef::from_column_major_slice(&self.pending, width, tokens);
        add_product_f32(self.sum.as_mut(), x, x, scale, Entries::Lower);
        self.pending.clear();
    }

    /// The sum.
    pub fn finish(mut self) -> Gram {
        self.flush(1.0);
        mirror_lower(self.sum.as_mut());
        Gram {
            matrix: self.sum,
            tokens: self.tokens,
            weight: self.weight,
        }
    }
}
