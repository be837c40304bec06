//! Mean and variance of each column of a stream of rows, exact to rounding.
//!
//! Each batch is reduced in two passes in f64 and merged by Chan's update, so nothing is lost to
//! cancellation however long the stream or large the mean.

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

/// Columns reduced together: one row of them is a cache line or more, and enough to vectorise.
const COLUMNS: usize = 64;

/// Count, mean and centred sum of squares of each column.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Moments {
    /// Rows seen.
    pub count: u64,
    /// Mean of each column.
    pub mean: Vec<f64>,
    /// Σ (x − mean)² of each column.
    pub centred: Vec<f64>,
}

impl Moments {
    /// No rows yet.
    pub fn new(width: usize) -> Self {
        Self {
            count: 0,
            mean: vec![0.0; width],
            centred: vec![0.0; width],
        }
    }

    /// Takes in `rows`, `[n, width]` row-major.
    pub fn update(&mut self, rows: &[f32]) {
        let width = self.mean.len();
        let count = (rows.len() / width) as u64;
        if count == 0 {
            return;
        }
        let mut batch = Self {
            count,
            ..Self::new(width)
        };
        batch
            .mean
            .par_chunks_mut(COLUMNS)
            .zip(batch.centred.par_chunks_mut(COLUMNS))
            .enumerate()
            .for_each(|(block, (mean, centred))| {
                let columns = || {
                    rows.chunks_exact(width)
                        .map(|row| &row[block * COLUMNS..][..mean.len()])
                };
                let mut sum = [0f64; COLUMNS];
                for row in columns() {
                    for (sum, &x) in sum.iter_mut().zip(row) {
                        *sum += f64::from(x);
                    }
                }
                for row in columns() {
                    for ((centred, &x), sum) in centred.iter_mut().zip(row).zip(sum) {
                        let deviation = f64::from(x) - sum / count as f64;
                        *centred += deviation * deviation;
                    }
                }
                for (mean, sum) in mean.iter_mut().zip(sum) {
                    *mean = sum / count as f64;
                }
            });
        self.merge(&batch);
    }

    /// Adds the rows that `other` has seen.
    pub fn merge(&mut self, other: &Self) {
        let count = self.count + other.count;
        if count == 0 {
            return;
        }
        let share = other.count as f64 / count as f64;
        for (c, (mean, centred)) in self.mean.iter_mut().zip(&mut self.centred).enumerate() {
            let gap = other.mean[c] - *mean;
            *mean += gap * share;
            *centred += other.centred[c] + gap * gap * share * self.count as f64;
        }
        self.count = count;
    }

    /// Population variance of each column.
    pub fn variance(&self) -> impl Iterator<Item = f64> {
        self.centred.iter().map(|c| c / self.count as f64)
    }

    /// Σ x² of each column.
    pub fn square_sum(&self) -> impl Iterator<Item = f64> {
        self.centred
            .iter()
            .zip(&self.mean)
            .map(|(c, m)| c + self.count as f64 * m * m)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Textbook definition in f64 over all rows at once.
    fn naive(rows: &[f32], width: usize) -> (Vec<f64>, Vec<f64>) {
        let n = (rows.len() / width) as f64;
        let column = |c: usize| rows.iter().skip(c).step_by(width).map(|&x| f64::from(x));
        let mean: Vec<f64> = (0..width).map(|c| column(c).sum::<f64>() / n).collect();
        let variance = (0..width)
            .map(|c| column(c).map(|x| (x - mean[c]).powi(2)).sum::<f64>() / n)
            .collect();
        (mean, variance)
    }

    proptest! {
        #[test]
        fn batches_of_any_size_give_the_moments_of_the_whole(
            values in prop::collection::vec(-1e3f32..1e3, 70 * 3..70 * 12),
            cut in 1usize..3,
            offset in -1e4f32..1e4,
        ) {
            let width = 70;
            let rows: Vec<f32> = values[..values.len() / width * width].iter().map(|x| x + offset).collect();
            let (first, second) = rows.split_at(cut * width);
            let mut moments = Moments::new(width);
            moments.update(first);
            let mut rest = Moments::new(width);
            rest.update(second);
            moments.merge(&rest);
            let (mean, variance) = naive(&rows, width);
            for (ours, exact) in moments.mean.iter().zip(mean) {
                prop_assert!((ours - exact).abs() <= 1e-9 * (1.0 + exact.abs()));
            }
            for (ours, exact) in moments.variance().zip(variance) {
                prop_assert!((ours - exact).abs() <= 1e-9 * (1.0 + exact));
            }
        }
    }

    #[test]
    fn a_constant_column_has_no_variance_whatever_its_size() {
        let mut moments = Moments::new(1);
        for _ in 0..10 {
            moments.update(&[1e6; 33]);
        }
        assert_eq!(moments.variance().collect::<Vec<_>>(), [0.0]);
    }
}
