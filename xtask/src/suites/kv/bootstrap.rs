//! Confidence by resampling sequences.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Resamples.
const RESAMPLES: usize = 1000;

/// The 95 % percentile interval of a statistic of `count` sequences; `statistic` is given the indices of a resample.
pub(crate) fn interval(count: usize, seed: u64, statistic: impl Fn(&[usize]) -> f64) -> (f64, f64) {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut drawn = vec![0; count];
    let mut values: Vec<f64> = (0..RESAMPLES)
        .map(|_| {
            drawn.fill_with(|| rng.random_range(0..count));
            statistic(&drawn)
        })
        .collect();
    values.sort_by(f64::total_cmp);
    let at = |p: f64| values[(p * (RESAMPLES - 1) as f64).round() as usize];
    (at(0.025), at(0.975))
}

/// The mean of `scores` at `indices`.
pub(crate) fn mean(scores: &[f64], indices: &[usize]) -> f64 {
    indices.iter().map(|&i| scores[i]).sum::<f64>() / indices.len().max(1) as f64
}

/// Height of a curve's mean, by trapezoids, over the range of its ascending x.
pub(crate) fn area(x: &[f64], y: &[f64]) -> f64 {
    let pieces = x.windows(2).zip(y.windows(2));
    let area: f64 = pieces
        .map(|(x, y)| (x[1] - x[0]) * (y[0] + y[1]) / 2.0)
        .sum();
    area / (x[x.len() - 1] - x[0])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_interval_of_a_share_is_that_of_its_standard_error() {
        let scores: Vec<f64> = (0..400).map(|i| f64::from(i % 4 == 0)).collect();
        let (low, high) = interval(scores.len(), 0, |drawn| mean(&scores, drawn));
        let wide = 1.96 * (0.25f64 * 0.75 / 400.0).sqrt();
        assert!((low - (0.25 - wide)).abs() < 0.01 && (high - (0.25 + wide)).abs() < 0.01);
        assert_eq!(interval(10, 0, |drawn| mean(&[1.0; 10], drawn)), (1.0, 1.0));
    }

    #[test]
    fn the_area_under_a_line_is_its_middle() {
        assert!((area(&[0.1, 0.2, 0.5], &[0.1, 0.2, 0.5]) - 0.3).abs() < 1e-12);
    }
}
