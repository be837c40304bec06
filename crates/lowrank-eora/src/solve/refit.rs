//! The best B for a given A, from H or from tokens.

use super::{Weighting, eigenvectors};
use crate::matrix::expect_shape;
use crate::stats::Rows;
use crate::{Error, Result};
use faer::{Mat, MatRef};
use linalg::{Eigen, Entries, add_product, product};

/// The B that is best with a given A (`r × n`): D H Aᵀ (A H Aᵀ)⁺.
///
/// # Errors
/// When shapes do not fit or only G is known; [`RefitCollector`] needs no H.
pub(crate) fn refit(
    d: MatRef<'_, f64>,
    weighting: &Weighting<'_>,
    a: MatRef<'_, f64>,
) -> Result<Mat<f64>> {
    expect_shape("factor A", a, (a.nrows(), d.ncols()))?;
    weighting.check(d.nrows(), d.ncols())?;
    let ah = weighting.times(a).ok_or(Error::MissingStatistic {
        method: "a refit",
        statistic: "H",
    })?;
    normal_equations(
        product(d, ah.transpose()),
        product(ah.as_ref(), a.transpose()),
    )
}

/// N M⁺ for a symmetric positive semidefinite M.
fn normal_equations(right: Mat<f64>, mut moments: Mat<f64>) -> Result<Mat<f64>> {
    // Rows of A differ in scale; with a unit diagonal the cut-off means the same for all.
    let scales: Vec<f64> = (0..moments.nrows())
        .map(|i| moments[(i, i)].max(0.0).sqrt())
        .map(|s| if s > 0.0 { 1.0 / s } else { 0.0 })
        .collect();
    for j in 0..moments.ncols() {
        for i in 0..moments.nrows() {
            moments[(i, j)] *= scales[i] * scales[j];
        }
    }
    let Eigen {
        values,
        mut vectors,
    } = eigenvectors(moments.as_ref(), "eigenvectors of A H Aᵀ")?;
    let cut = values.first().copied().unwrap_or(0.0) * f64::EPSILON * values.len() as f64;
    for i in 0..vectors.nrows() {
        for j in 0..vectors.ncols() {
            vectors[(i, j)] *= scales[i];
        }
    }
    let divided = Mat::from_fn(vectors.nrows(), vectors.ncols(), |i, j| {
        if values[j] > cut {
            vectors[(i, j)] / values[j]
        } else {
            0.0
        }
    });
    let right = product(right.as_ref(), divided.as_ref());
    Ok(product(right.as_ref(), vectors.transpose()))
}

/// Collects what a refit needs from tokens, where H is too large: Σ (D x)(A x)ᵀ and Σ (A x)(A x)ᵀ.
#[derive(Clone, Debug)]
pub(crate) struct RefitCollector {
    d: Mat<f32>,
    a: Mat<f32>,
    right: Mat<f64>,
    moments: Mat<f64>,
}

impl RefitCollector {
    /// Empty sums for a residual (`m × n`) and a factor A (`r × n`).
    ///
    /// # Errors
    /// When the widths differ.
    pub(crate) fn new(d: MatRef<'_, f64>, a: MatRef<'_, f64>) -> Result<Self> {
        expect_shape("factor A", a, (a.nrows(), d.ncols()))?;
        let single =
            |x: MatRef<'_, f64>| Mat::<f32>::from_fn(x.nrows(), x.ncols(), |i, j| x[(i, j)] as f32);
        Ok(Self {
            d: single(d),
            a: single(a),
            right: Mat::zeros(d.nrows(), a.nrows()),
            moments: Mat::zeros(a.nrows(), a.nrows()),
        })
    }

    /// Adds a batch.
    ///
    /// # Errors
    /// When its width is not D's.
    pub(crate) fn update(&mut self, rows: &Rows) -> Result<()> {
        rows.expect_width(self.d.ncols())?;
        let double = |x: Mat<f32>, weighted: bool| {
            Mat::from_fn(x.nrows(), x.ncols(), |i, t| {
                f64::from(x[(i, t)]) * if weighted { rows.weight(t) } else { 1.0 }
            })
        };
        let x = rows.matrix();
        let (ax, dx) = (product(self.a.as_ref(), x), product(self.d.as_ref(), x));
        let weighted = double(ax.clone(), true);
        for (sum, outputs) in [(&mut self.right, dx), (&mut self.moments, ax)] {
            let outputs = double(outputs, false);
            let (outputs, weighted) = (outputs.as_ref(), weighted.transpose());
            add_product(sum.as_mut(), outputs, weighted, 1.0, Entries::All);
        }
        Ok(())
    }

    /// Bytes held.
    pub(crate) fn bytes(&self) -> u64 {
        let entries = |(rows, cols): (usize, usize)| rows * cols;
        let single = entries(self.d.shape()) + entries(self.a.shape());
        let double = entries(self.right.shape()) + entries(self.moments.shape());
        (size_of::<f32>() * single + size_of::<f64>() * double) as u64
    }

    /// The best B, `m × r`.
    ///
    /// # Errors
    /// When the eigenvectors of the moments are not found.
    pub(crate) fn finish(self) -> Result<Mat<f64>> {
        normal_equations(self.right, self.moments)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::solve::LowRank;
    use crate::solve::tests::{decaying, loss, square};
    use crate::testing::{Golden, Lcg, assert_matrix_close};
    use faer::linalg::solvers::Solve;

    #[test]
    fn a_refit_from_tokens_is_that_from_their_h() {
        let (mut lcg, x) = (Lcg(17), decaying(&mut Lcg(18), 128, 600, 5.0));
        let (d, a) = (lcg.matrix(96, 128), lcg.matrix(12, 128));
        let h = square(&x);
        let weighting = Weighting::Gram(h.as_ref());
        let mut collector = RefitCollector::new(d.as_ref(), a.as_ref()).expect("fits");
        let values = (0..600)
            .flat_map(|t| (0..128).map(move |j| (j, t)))
            .map(|(j, t)| x[(j, t)] as f32);
        collector
            .update(&Rows::new(values.collect(), 128).expect("finite"))
            .expect("fits");
        let streamed = collector.finish().expect("solves");
        let direct = refit(d.as_ref(), &weighting, a.as_ref()).expect("fits");
        assert_matrix_close(streamed.as_ref(), direct.as_ref(), 1e-3);
    }

    #[test]
    fn least_squares_in_turns_does_not_beat_the_closed_form() {
        let golden = Golden::new();
        let (d, h) = (golden.d(), golden.h());
        let mut lcg = Lcg(99);
        let weighting = Weighting::Gram(h.as_ref());
        let (mut a, mut b) = (lcg.matrix(3, 16), Mat::zeros(12, 3));
        for _ in 0..3000 {
            b = refit(d.as_ref(), &weighting, a.as_ref()).expect("fits");
            // With B given the best A is (BᵀB)⁻¹ Bᵀ D.
            a = (b.transpose() * &b)
                .partial_piv_lu()
                .solve(b.transpose() * &d);
        }
        let oracle = loss(&d, &LowRank { b, a }, &h);
        let closed = 1.2343038187955053;
        assert!(
            oracle >= closed * (1.0 - 1e-9) && oracle <= closed * (1.0 + 1e-6),
            "{oracle}"
        );
    }
}
