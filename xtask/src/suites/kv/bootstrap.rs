//! Confidence by resampling sequences.

use eval_report::Row;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::json;

/// Resamples.
const RESAMPLES: usize = 10_000;

/// The 95 % percentile interval of a statistic of `count` sequences; `statistic` is given the indices of a resample. None of fewer than two sequences, which say nothing of
/// how much they differ.
pub(crate) fn interval(
    count: usize,
    seed: u64,
    statistic: impl Fn(&[usize]) -> f64,
) -> Option<(f64, f64)> {
    if count < 2 {
        return None;
    }
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
    Some((at(0.025), at(0.975)))
}

/// Notes an interval in a row under `name` with `_low` and `_high`.
pub(crate) fn note(row: &mut Row, name: &str, interval: Option<(f64, f64)>) {
    if let Some((low, high)) = interval {
        row.extra.insert(format!("{name}_low"), json!(low));
        row.extra.insert(format!("{name}_high"), json!(high));
    }
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
        let (low, high) = interval(scores.len(), 0, |drawn| mean(&scores, drawn)).unwrap();
        let wide = 1.96 * (0.25f64 * 0.75 / 400.0).sqrt();
        assert!((low - (0.25 - wide)).abs() < 0.01 && (high - (0.25 + wide)).abs() < 0.01);
        let same = interval(10, 0, |drawn| mean(&[1.0; 10], drawn));
        assert_eq!(same, Some((1.0, 1.0)));
    }

    #[test]
    fn a_single_sequence_has_no_interval() {
        assert_eq!(interval(1, 0, |drawn| mean(&[1.0], drawn)), None);
        assert!(interval(2, 0, |drawn| mean(&[0.0, 1.0], drawn)).is_some());
        let mut row = Row::new("kv", "lazy");
        note(&mut row, "exact", None);
        assert!(row.extra.is_empty());
    }

    #[test]
    fn the_area_under_a_line_is_its_middle() {
        assert!((area(&[0.1, 0.2, 0.5], &[0.1, 0.2, 0.5]) - 0.3).abs() < 1e-12);
    }
}
