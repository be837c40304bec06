//! Sums per input channel.

use super::Rows;
use crate::{Error, Result};

/// Sums over tokens for each input channel, f64.
#[derive(Clone, Debug, PartialEq)]
pub struct Diagonal {
    /// Σ w x².
    pub square: Vec<f64>,
    /// Σ w |x|.
    pub abs: Vec<f64>,
    /// The largest mean of |x| over the tokens of one batch; it depends on the batches.
    pub max_mean_abs: Vec<f64>,
    /// Σ w.
    pub weight: f64,
    /// Tokens.
    pub tokens: u64,
}

impl Diagonal {
    /// Empty sums.
    pub fn new(width: usize) -> Self {
        Self {
            square: vec![0.0; width],
            abs: vec![0.0; width],
            max_mean_abs: vec![0.0; width],
            weight: 0.0,
            tokens: 0,
        }
    }

    /// Channels.
    pub fn width(&self) -> usize {
        self.square.len()
    }

    /// Adds a batch.
    ///
    /// # Errors
    /// When its width is another one.
    pub fn update(&mut self, rows: &Rows) -> Result<()> {
        rows.expect_width(self.width())?;
        let mut abs = vec![0.0; self.width()];
        for token in 0..rows.tokens() {
            let weight = rows.weight(token);
            for (j, &x) in rows.row(token).iter().enumerate() {
                let x = f64::from(x);
                self.square[j] += weight * x * x;
                abs[j] += weight * x.abs();
            }
        }
        let total = rows.total_weight();
        self.weight += total;
        self.tokens += rows.tokens() as u64;
        for (j, abs) in abs.into_iter().enumerate() {
            self.abs[j] += abs;
            if total > 0.0 {
                self.max_mean_abs[j] = self.max_mean_abs[j].max(abs / total);
            }
        }
        Ok(())
    }

    /// Adds sums over other tokens.
    ///
    /// # Errors
    /// When the widths differ.
    pub fn merge(&mut self, other: &Self) -> Result<()> {
        if other.width() != self.width() {
            return Err(Error::Shape {
                what: "channel sums",
                found: vec![other.width()],
                expected: vec![self.width()],
            });
        }
        let add = |to: &mut [f64], from: &[f64]| to.iter_mut().zip(from).for_each(|(a, b)| *a += b);
        add(&mut self.square, &other.square);
        add(&mut self.abs, &other.abs);
        for (a, &b) in self.max_mean_abs.iter_mut().zip(&other.max_mean_abs) {
            *a = a.max(b);
        }
        self.weight += other.weight;
        self.tokens += other.tokens;
        Ok(())
    }

    /// The mean of x² of each channel.
    pub fn mean_square(&self) -> Vec<f64> {
        self.square
            .iter()
            .map(|s| s / self.weight.max(f64::MIN_POSITIVE))
            .collect()
    }

    /// The mean of |x| of each channel.
    pub fn mean_abs(&self) -> Vec<f64> {
        self.abs
            .iter()
            .map(|s| s / self.weight.max(f64::MIN_POSITIVE))
            .collect()
    }
}
