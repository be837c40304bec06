//! FLAP's fluctuation as its published implementation computes it (arXiv 2312.11983, eq. 4).
//!
//! The implementation updates its mean in place before it is used, so that both factors of the running product hold the
//! new mean, the first sample never counts and later ones are weighted.

use serde::{Deserialize, Serialize};

/// F₁ = 0, Fₙ = Fₙ₋₁ (n−2)/(n−1) + Σₜ (xₙₜ − mₙ)² / n, with mₙ the mean of the samples' means.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Fluctuation {
    samples: u64,
    mean: Vec<f64>,
    /// F of each column.
    pub value: Vec<f64>,
}

impl Fluctuation {
    /// No samples yet.
    pub fn new(width: usize) -> Self {
        Self {
            samples: 0,
            mean: vec![0.0; width],
            value: vec![0.0; width],
        }
    }

    /// Adds one sample (a window), `[tokens, width]` row-major.
    pub fn update(&mut self, sample: &[f32]) {
        let width = self.mean.len();
        let tokens = (sample.len() / width) as f64;
        self.samples += 1;
        let n = self.samples as f64;
        let mut sum = vec![0f64; width];
        for row in sample.chunks_exact(width) {
            for (sum, &x) in sum.iter_mut().zip(row) {
                *sum += f64::from(x);
            }
        }
        for (mean, sum) in self.mean.iter_mut().zip(sum) {
            *mean = *mean * (n - 1.0) / n + sum / tokens / n;
        }
        if self.samples == 1 {
            return;
        }
        for value in &mut self.value {
            *value *= (n - 2.0) / (n - 1.0);
        }
        for row in sample.chunks_exact(width) {
            for ((value, &x), mean) in self.value.iter_mut().zip(row).zip(&self.mean) {
                *value += (f64::from(x) - mean).powi(2) / n;
            }
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Samples of the golden statistics: 4 of 3 tokens with 4 features.
    pub(crate) fn samples() -> Vec<Vec<f32>> {
        let x = |n: usize, t: usize, c: usize| {
            ((7 * n + 3 * t + 5 * c + (n * t * c) % 4) % 11) as f32 - 5.0
        };
        (0..4)
            .map(|n| (0..12).map(|i| x(n, i / 4, i % 4) / 4.0).collect())
            .collect()
    }

    #[test]
    fn the_fluctuation_is_that_of_the_published_implementation() {
        let mut fluctuation = Fluctuation::new(4);
        for sample in samples() {
            fluctuation.update(&sample);
        }
        for (ours, golden) in fluctuation
            .value
            .iter()
            .zip([1.2285599, 1.2873586, 0.9198858, 1.2650826])
        {
            assert!((ours - golden).abs() < 1e-6, "{ours} is not {golden}");
        }
        for (ours, golden) in fluctuation
            .mean
            .iter()
            .zip([0.0625, -0.0833333, -0.1041667, -0.1041667])
        {
            assert!((ours - golden).abs() < 1e-6, "{ours} is not {golden}");
        }
    }
}
