//! First and second moments of vectors, accumulated in f64.

use crate::error::Error;
use serde::{Deserialize, Serialize};

/// Sums over vectors of one width: how many there were, their sum, and the sum of their outer products.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Unchecked")]
pub struct Moments {
    dim: usize,
    count: u64,
    sum: Vec<f64>,
    /// `dim * dim`, symmetric.
    second: Vec<f64>,
}

/// Moments as they are stored.
#[derive(Deserialize)]
struct Unchecked {
    dim: usize,
    count: u64,
    sum: Vec<f64>,
    second: Vec<f64>,
}

impl TryFrom<Unchecked> for Moments {
    type Error = Error;

    fn try_from(stored: Unchecked) -> Result<Self, Error> {
        let Unchecked {
            dim,
            count,
            sum,
            second,
        } = stored;
        if sum.len() != dim || Some(second.len()) != dim.checked_mul(dim) {
            return Err(Error::Shape {
                tensor: "moments".into(),
                expected: format!("sums of [{dim}] and [{dim}, {dim}]"),
                found: vec![sum.len(), second.len()],
            });
        }
        Ok(Self {
            dim,
            count,
            sum,
            second,
        })
    }
}

impl Moments {
    /// Number of components.
    pub fn dim(&self) -> usize {
        self.dim
    }

    /// Number of vectors.
    pub fn count(&self) -> u64 {
        self.count
    }

    fn scale(&self) -> f64 {
        1.0 / self.count.max(1) as f64
    }

    /// Mean vector.
    pub fn mean(&self) -> Vec<f64> {
        self.sum.iter().map(|s| s * self.scale()).collect()
    }

    /// Mean of the product of components `i` and `j`, not centred.
    pub fn second(&self, i: usize, j: usize) -> f64 {
        self.second[i * self.dim + j] * self.scale()
    }

    /// Whether the variance of component `i` is no larger than what rounding of the sums can leave of a constant.
    #[cfg(feature = "train")]
    pub(crate) fn is_constant(&self, i: usize) -> bool {
        let group = GROUP as f64;
        let rounding = (group + self.count as f64 / group) * f64::EPSILON;
        let (square, mean) = (self.second(i, i), self.sum[i] * self.scale());
        square - mean * mean <= rounding * square
    }

    /// Covariance matrix (divided by the count), `dim * dim`, symmetric, row-major.
    pub fn covariance(&self) -> Vec<f64> {
        let mean = self.mean();
        let mut out = Vec::with_capacity(self.second.len());
        for (row, mi) in self.second.chunks_exact(self.dim.max(1)).zip(&mean) {
            out.extend(
                row.iter()
                    .zip(&mean)
                    .map(|(s, mj)| s * self.scale() - mi * mj),
            );
        }
        out
    }

    /// Standard deviation of every component.
    pub fn deviations(&self) -> Vec<f64> {
        let mean = self.mean();
        (0..self.dim)
            .map(|i| (self.second(i, i) - mean[i] * mean[i]).max(0.0).sqrt())
            .collect()
    }

    /// Eigenvalues of the covariance, descending: how many directions the vectors span, and how much each of them varies.
    ///
    /// # Errors
    /// Moments that are not those of any vectors (not finite).
    #[cfg(feature = "train")]
    pub fn spectrum(&self) -> Result<Vec<f64>, Error> {
        use linalg::faer::MatRef;
        let covariance = self.covariance();
        let matrix = MatRef::from_row_major_slice(&covariance, self.dim, self.dim);
        let found = linalg::eigen(matrix).map_err(|e| Error::LeastSquares {
            what: "covariance of states".into(),
            reason: e.to_string(),
        })?;
        Ok(found.values.into_iter().map(|v| v.max(0.0)).collect())
    }

    /// Correlation matrix, `dim * dim`; zero off the diagonal for components that do not vary.
    pub fn correlations(&self) -> Vec<f64> {
        let (c, std) = (self.covariance(), self.deviations());
        let n = self.dim;
        (0..n * n)
            .map(|e| {
                let (i, j) = (e / n, e % n);
                let scale = std[i] * std[j];
                match i == j {
                    true => 1.0,
                    false if scale > 0.0 => c[e] / scale,
                    false => 0.0,
                }
            })
            .collect()
    }
}

/// Moments that are still being summed. Vectors are taken in groups of a fixed size, so that the sums do not depend on how
/// the vectors come in.
#[cfg(feature = "train")]
#[derive(Debug, Clone)]
pub struct MomentsSum {
    moments: Moments,
    pending: Vec<f64>,
}

/// Vectors whose products are added at once.
#[cfg(feature = "train")]
const GROUP: usize = 256;

#[cfg(feature = "train")]
impl MomentsSum {
    /// Nothing summed yet.
    pub fn new(dim: usize) -> Self {
        Self {
            moments: Moments {
                dim,
                count: 0,
                sum: vec![0.0; dim],
                second: vec![0.0; dim * dim],
            },
            pending: Vec::with_capacity(GROUP * dim),
        }
    }

    /// Adds one vector, given in one part or in several that are put together.
    ///
    /// # Panics
    /// The parts do not have `dim` components together.
    pub fn push(&mut self, parts: &[&[f32]]) {
        let given: usize = parts.iter().map(|p| p.len()).sum();
        assert_eq!(given, self.moments.dim, "components");
        for part in parts {
            self.pending.extend(part.iter().map(|&v| f64::from(v)));
        }
        self.moments.count += 1;
        if self.pending.len() >= GROUP * self.moments.dim.max(1) {
            self.flush();
        }
    }

    fn flush(&mut self) {
        use linalg::{Entries, faer::MatMut, faer::MatRef};
        let n = self.moments.dim;
        if n == 0 || self.pending.is_empty() {
            return;
        }
        for row in self.pending.chunks_exact(n) {
            self.moments
                .sum
                .iter_mut()
                .zip(row)
                .for_each(|(s, v)| *s += v);
        }
        let rows = self.pending.len() / n;
        // Columns are vectors.
        let x = MatRef::from_column_major_slice(&self.pending, n, rows);
        let second = MatMut::from_column_major_slice_mut(&mut self.moments.second, n, n);
        linalg::add_product(second, x, x.transpose(), 1.0, Entries::Lower);
        self.pending.clear();
    }

    /// The sums.
    pub fn finish(mut self) -> Moments {
        use linalg::faer::MatMut;
        self.flush();
        let n = self.moments.dim;
        if n > 0 {
            linalg::mirror_lower(MatMut::from_column_major_slice_mut(
                &mut self.moments.second,
                n,
                n,
            ));
        }
        self.moments
    }
}

#[cfg(all(test, feature = "train"))]
mod tests {
    use super::*;

    fn vectors(count: usize, dim: usize) -> Vec<Vec<f32>> {
        (0..count)
            .map(|t| {
                (0..dim)
                    .map(|i| ((t * 31 + i * 17) as f32 * 0.37).sin() + i as f32 * 0.1)
                    .collect()
            })
            .collect()
    }

    #[test]
    fn moments_agree_with_their_definitions_and_do_not_depend_on_the_parts_of_a_vector() {
        let (count, dim) = (700, 5);
        let rows = vectors(count, dim);
        let (mut whole, mut parts) = (MomentsSum::new(dim), MomentsSum::new(dim));
        for row in &rows {
            whole.push(&[row]);
            parts.push(&[&row[..2], &row[2..]]);
        }
        let whole = whole.finish();
        assert_eq!(whole, parts.finish());
        assert_eq!((whole.dim(), whole.count()), (dim, 700));
        let mean: Vec<f64> = (0..dim)
            .map(|i| rows.iter().map(|r| f64::from(r[i])).sum::<f64>() / count as f64)
            .collect();
        let (covariance, correlations) = (whole.covariance(), whole.correlations());
        // The sum of the eigenvalues is the sum of the variances.
        let spectrum = whole.spectrum().unwrap();
        let variances: f64 = (0..dim).map(|i| covariance[i * dim + i]).sum();
        assert!((spectrum.iter().sum::<f64>() - variances).abs() < 1e-9);
        assert!(spectrum.is_sorted_by(|a, b| a >= b));
        for i in 0..dim {
            assert!((whole.mean()[i] - mean[i]).abs() < 1e-12);
            for j in 0..dim {
                let direct = rows
                    .iter()
                    .map(|r| (f64::from(r[i]) - mean[i]) * (f64::from(r[j]) - mean[j]))
                    .sum::<f64>()
                    / count as f64;
                assert!((covariance[i * dim + j] - direct).abs() < 1e-12);
                let std = whole.deviations();
                assert!((correlations[i * dim + j] * std[i] * std[j] - direct).abs() < 1e-12);
            }
        }
    }
}
