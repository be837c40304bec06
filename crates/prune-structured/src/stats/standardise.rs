//! Standard scores, which make different sublayers comparable.

/// (s − mean) / std with the unbiased standard deviation; all zero when the scores are equal.
pub fn standardise(scores: &mut [f64]) {
    let n = scores.len() as f64;
    let mean = scores.iter().sum::<f64>() / n;
    let variance = scores.iter().map(|s| (s - mean).powi(2)).sum::<f64>() / (n - 1.0);
    let std = variance.sqrt();
    for score in scores {
        *score = if std > 0.0 {
            (*score - mean) / std
        } else {
            0.0
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn standard_scores_have_mean_0_and_unbiased_variance_1() {
        let mut scores = [1.0, 2.0, 4.0, 9.0];
        standardise(&mut scores);
        assert!(scores.iter().sum::<f64>().abs() < 1e-12);
        assert!((scores.iter().map(|s| s * s).sum::<f64>() / 3.0 - 1.0).abs() < 1e-12);
        let mut equal = [5.0; 3];
        standardise(&mut equal);
        assert_eq!(equal, [0.0; 3]);
    }
}
