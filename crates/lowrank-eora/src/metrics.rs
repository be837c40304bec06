//! Nuclear norm, its L1,2 surrogate and entropy of hidden states.
//!
//! How many directions the hidden states of one text use (Matrix Nuclear-Norm, arXiv 2410.10672):
//! states R `[tokens L, channels d]` are centred over tokens and every row scaled to length one;
//! all three numbers are of the matrix Z that results. A text of one token, or with a token equal
//! to the mean, has no such Z: its numbers are NaN, as published, and [`mean`] leaves it out.

use crate::matrix::{check_finite, from_tensor};
use crate::{Error, Result};
use candle_core::Tensor;
use faer::{Mat, MatRef};
use linalg::singular_values;

/// Numbers of one text.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SpectralMetrics {
    /// Σ of the min(L, d) largest column norms of Z, over L: the published Matrix Nuclear-Norm. It
    /// is no bound of the nuclear norm in either direction (the sum over all columns is an upper
    /// one).
    pub mnn: f64,
    /// ‖Z‖_* over L, exact.
    pub nuclear: f64,
    /// Entropy of the eigenvalues of ZᵀZ / tr ZᵀZ over ln d; NaN for d = 1.
    pub entropy: f64,
}

impl SpectralMetrics {
    /// Of hidden states `[tokens, channels]` of any float dtype.
    ///
    /// # Errors
    /// As [`SpectralMetrics::of`], and for a tensor that is no matrix.
    pub fn of_tensor(states: &Tensor) -> Result<Self> {
        Self::of(from_tensor(states, "hidden states")?.as_ref())
    }

    /// Of hidden states, one token per row.
    ///
    /// # Errors
    /// When there is no token, a value is not finite, or the decomposition does not converge.
    pub fn of(states: MatRef<'_, f64>) -> Result<Self> {
        let z = normalized(states)?;
        let singular = if check_finite(z.as_ref(), "normalised states").is_ok() {
            singular_values(z.as_ref()).map_err(|source| Error::Factorization {
                what: "singular values of hidden states",
                source,
            })?
        } else {
            vec![f64::NAN]
        };
        let tokens = z.nrows() as f64;
        Ok(Self {
            mnn: surrogate(z.as_ref()) / tokens,
            nuclear: singular.iter().sum::<f64>() / tokens,
            entropy: entropy(&singular, z.ncols()),
        })
    }
}

/// The published Matrix Nuclear-Norm alone: O(L d) operations.
///
/// # Errors
/// When there is no token or a value is not finite.
pub fn matrix_nuclear_norm(states: MatRef<'_, f64>) -> Result<f64> {
    let z = normalized(states)?;
    Ok(surrogate(z.as_ref()) / z.nrows() as f64)
}

/// The mean over texts that leaves NaN out; NaN when nothing is left.
pub fn mean(values: impl IntoIterator<Item = f64>) -> f64 {
    let (sum, count) = (values.into_iter().filter(|value| !value.is_nan()))
        .fold((0.0, 0.0), |(sum, count), value| (sum + value, count + 1.0));
    sum / count
}

fn normalized(states: MatRef<'_, f64>) -> Result<Mat<f64>> {
    if states.nrows() == 0 || states.ncols() == 0 {
        return Err(Error::Shape {
            what: "hidden states",
            found: vec![states.nrows(), states.ncols()],
            expected: vec![states.nrows().max(1), states.ncols().max(1)],
        });
    }
    check_finite(states, "hidden states")?;
    let mut z = states.to_owned();
    for column in z.col_iter_mut() {
        let mean = column.as_ref().sum() / column.nrows() as f64;
        column.iter_mut().for_each(|x| *x -= mean);
    }
    for row in z.row_iter_mut() {
        let norm = row.as_ref().norm_l2();
        row.iter_mut().for_each(|x| *x /= norm);
    }
    Ok(z)
}

fn surrogate(z: MatRef<'_, f64>) -> f64 {
    let mut norms: Vec<f64> = z.col_iter().map(|column| column.norm_l2()).collect();
    norms.sort_by(|a, b| b.total_cmp(a));
    norms.iter().take(z.nrows()).sum()
}

fn entropy(singular: &[f64], channels: usize) -> f64 {
    let total: f64 = singular.iter().map(|s| s * s).sum();
    let shares = singular.iter().map(|s| s * s / total);
    let terms = shares.map(|p| if p == 0.0 { 0.0 } else { -p * p.ln() });
    terms.sum::<f64>() / (channels as f64).ln()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Lcg, assert_close};

    #[test]
    fn golden_values_of_the_published_metric() {
        let mut lcg = Lcg(7);
        let tall = lcg.matrix(6, 4);
        let metrics = SpectralMetrics::of(tall.as_ref()).expect("finite");
        assert_close(metrics.mnn, 0.8048709432813377, 1e-12);
        assert_close(metrics.nuclear * 6.0, 4.6221327724193575, 1e-12);
        assert_close(metrics.entropy, 0.8524843576200026, 1e-12);
        let wide = Lcg(7).matrix(3, 5);
        let mnn = matrix_nuclear_norm(wide.as_ref()).expect("finite");
        assert_close(mnn, 0.8736939966481275, 1e-12);
    }

    #[test]
    fn a_text_without_variation_is_nan_and_left_out_of_the_mean() {
        let one = SpectralMetrics::of(Mat::<f64>::ones(1, 4).as_ref()).expect("finite");
        assert!(one.mnn.is_nan() && one.nuclear.is_nan() && one.entropy.is_nan());
        assert_close(mean([1.0, f64::NAN, 3.0]), 2.0, 0.0);
        assert!(mean([f64::NAN]).is_nan());
    }

    #[test]
    fn entropy_is_one_for_equal_directions_and_zero_for_one() {
        let cross = Mat::from_fn(8, 4, |i, j| {
            if i / 2 == j {
                1.0 - 2.0 * (i % 2) as f64
            } else {
                0.0
            }
        });
        assert_close(
            SpectralMetrics::of(cross.as_ref()).expect("finite").entropy,
            1.0,
            1e-12,
        );
        let line = Mat::from_fn(8, 4, |i, j| (i as f64 - 3.5) * (j + 1) as f64);
        assert_close(
            SpectralMetrics::of(line.as_ref()).expect("finite").entropy,
            0.0,
            1e-9,
        );
    }
}
