//! Factors in few bits.
//!
//! Groups run along the rows of A and of Bᵀ, so that every rank has scales of its own and the
//! result does not depend on how B and A share the singular values. Rounding A turns its row
//! space a little; refitting B to the rounded A, B = D H Aᵀ (A H Aᵀ)⁺, takes most of that back.

use super::{LowRank, Weighting};
use crate::matrix::{Entries, add_product, eigen, expect_shape, product};
use crate::stats::Rows;
use crate::{Error, Result};
use faer::{Mat, MatRef};
use half::f16;
use serde::{Deserialize, Serialize};

/// Symmetric integers with one f16 scale for each group of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupQuantizer {
    /// Bits of a value, 2 to 8.
    pub bits: u32,
    /// Values of a group.
    pub group: usize,
}

/// A quantised matrix.
#[derive(Clone, Debug)]
pub struct Quantized {
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
    /// How.
    pub quantizer: GroupQuantizer,
    /// `rows × cols`, row-major, from −(2^(bits−1) − 1) to 2^(bits−1) − 1.
    pub codes: Vec<i8>,
    /// `rows × ⌈cols / group⌉`, row-major.
    pub scales: Vec<f16>,
}

impl GroupQuantizer {
    /// Rounds to the nearest multiple of the group's largest magnitude / (2^(bits−1) − 1).
    ///
    /// # Errors
    /// When bits or group are out of range or a value exceeds f16.
    pub fn quantize(self, matrix: MatRef<'_, f64>) -> Result<Quantized> {
        if !(2..=8).contains(&self.bits) || self.group == 0 {
            return Err(Error::Setting {
                name: "quantiser of factors",
                value: format!("{} bits in groups of {}", self.bits, self.group),
                expected: "2 to 8 bits in groups of at least 1",
            });
        }
        let top = f64::from((1i32 << (self.bits - 1)) - 1);
        let (rows, cols) = matrix.shape();
        let mut codes = Vec::with_capacity(rows * cols);
        let mut scales = Vec::with_capacity(rows * cols.div_ceil(self.group));
        for i in 0..rows {
            for start in (0..cols).step_by(self.group) {
                let group = matrix.row(i).subcols(start, self.group.min(cols - start));
                let scale = f16::from_f64(group.norm_max() / top);
                if !scale.is_finite() {
                    return Err(Error::Setting {
                        name: "scale of a quantised factor",
                        value: (group.norm_max() / top).to_string(),
                        expected: "a number within f16",
                    });
                }
                let step = scale.to_f64();
                codes.extend(group.iter().map(|&x| {
                    if step > 0.0 {
                        (x / step).round_ties_even().clamp(-top, top) as i8
                    } else {
                        0
                    }
                }));
                scales.push(scale);
            }
        }
        Ok(Quantized {
            rows,
            cols,
            quantizer: self,
            codes,
            scales,
        })
    }
}

impl Quantized {
    /// The values.
    pub fn dequantize(&self) -> Mat<f64> {
        let group = self.quantizer.group;
        let groups = self.cols.div_ceil(group);
        Mat::from_fn(self.rows, self.cols, |i, j| {
            let scale = self.scales[i * groups + j / group].to_f64();
            f64::from(self.codes[i * self.cols + j]) * scale
        })
    }

    /// Bytes when codes are packed.
    pub fn bytes(&self) -> u64 {
        let bits = self.codes.len() as u64 * u64::from(self.quantizer.bits);
        bits.div_ceil(8) + 2 * self.scales.len() as u64
    }
}

/// Quantised B and A.
#[derive(Clone, Debug)]
pub struct QuantizedFactors {
    /// Bᵀ, `r × m`.
    pub b_transposed: Quantized,
    /// A, `r × n`.
    pub a: Quantized,
}

impl QuantizedFactors {
    /// What a runtime computes with.
    pub fn dequantize(&self) -> LowRank {
        LowRank {
            b: self.b_transposed.dequantize().transpose().to_owned(),
            a: self.a.dequantize(),
        }
    }

    /// Bytes of both.
    pub fn bytes(&self) -> u64 {
        self.b_transposed.bytes() + self.a.bytes()
    }
}

/// Quantises A, refits B to it where `refit` knows how, and quantises B.
///
/// 4 bits for A and 8 for B lose next to nothing with a refit.
///
/// # Errors
/// When a quantiser is out of range or the refit fails.
pub fn quantize_factors(
    factors: &LowRank,
    (a, b): (GroupQuantizer, GroupQuantizer),
    refit: impl FnOnce(MatRef<'_, f64>) -> Result<Mat<f64>>,
) -> Result<QuantizedFactors> {
    let a = a.quantize(factors.a.as_ref())?;
    let refitted = refit(a.dequantize().as_ref())?;
    expect_shape("refitted B", refitted.as_ref(), factors.b.shape())?;
    Ok(QuantizedFactors {
        b_transposed: b.quantize(refitted.transpose())?,
        a,
    })
}

/// The B that is best with a given A (`r × n`): D H Aᵀ (A H Aᵀ)⁺.
///
/// # Errors
/// When shapes do not fit or only G is known; [`RefitCollector`] needs no H.
pub fn refit(
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
    let (values, mut vectors) = eigen(moments.as_ref(), "the eigenvectors of A H Aᵀ")?;
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
pub struct RefitCollector {
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
    pub fn new(d: MatRef<'_, f64>, a: MatRef<'_, f64>) -> Result<Self> {
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
    pub fn update(&mut self, rows: &Rows) -> Result<()> {
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
            add_product(sum, outputs, weighted, 1.0, Entries::All);
        }
        Ok(())
    }

    /// Bytes held.
    pub fn bytes(&self) -> u64 {
        let entries = |(rows, cols): (usize, usize)| rows * cols;
        let single = entries(self.d.shape()) + entries(self.a.shape());
        let double = entries(self.right.shape()) + entries(self.moments.shape());
        (size_of::<f32>() * single + size_of::<f64>() * double) as u64
    }

    /// The best B, `m × r`.
    ///
    /// # Errors
    /// When the eigenvectors of the moments are not found.
    pub fn finish(self) -> Result<Mat<f64>> {
        normal_equations(self.right, self.moments)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::solve::tests::{decaying, eora, loss, square};
    use crate::solve::{Options, Split, solve};
    use crate::testing::{Golden, Lcg, assert_matrix_close};
    use faer::linalg::solvers::Solve;

    #[test]
    fn refitting_b_makes_four_bits_for_a_nearly_free() {
        let mut lcg = Lcg(17);
        let (w, x) = (lcg.matrix(96, 128), decaying(&mut Lcg(18), 128, 600, 5.0));
        let d = &w - crate::testing::round_to_nearest(w.as_ref(), 3, 64);
        let (h, size) = (square(&x), (&d * &x).norm_l2());
        let weighting = Weighting::Gram(h.as_ref());
        let factors = eora(&d, &h, 12).factors;
        let bits = |a, b| {
            (
                GroupQuantizer { bits: a, group: 64 },
                GroupQuantizer { bits: b, group: 64 },
            )
        };
        let loss = |factors: &LowRank| (factors.error(d.as_ref()) * &x).norm_l2() / size;
        let plain = loss(&factors);
        let kept = quantize_factors(&factors, bits(4, 8), |_| Ok(factors.b.clone())).expect("fits");
        let refitted = quantize_factors(&factors, bits(4, 8), |a| refit(d.as_ref(), &weighting, a))
            .expect("fits");
        let (kept, refitted_loss) = (loss(&kept.dequantize()), loss(&refitted.dequantize()));
        assert!(
            plain <= refitted_loss && refitted_loss < kept,
            "{plain} {refitted_loss} {kept}"
        );
        assert!(
            refitted_loss - plain < 0.4 * (kept - plain),
            "{plain} {refitted_loss} {kept}"
        );
        assert_eq!(
            refitted.bytes(),
            (12 * 128 / 2 + 12 * 2 * 2) + (12 * 96 + 12 * 2 * 2)
        );

        // The same from tokens, without H.
        let a = refitted.a.dequantize();
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
    fn quantised_factors_do_not_depend_on_the_split() {
        let golden = Golden::new();
        let (d, h) = (golden.d(), golden.h());
        let weighting = Weighting::Gram(h.as_ref());
        let quantizer = GroupQuantizer { bits: 8, group: 8 };
        let product = |split| {
            let options = Options {
                split,
                ..Options::default()
            };
            let factors = solve(d.as_ref(), &weighting, 3, &options)
                .expect("solves")
                .factors;
            let quantised =
                quantize_factors(&factors, (quantizer, quantizer), |_| Ok(factors.b.clone()));
            quantised.expect("fits").dequantize().product()
        };
        assert_matrix_close(
            product(Split::Balanced).as_ref(),
            product(Split::Orthonormal).as_ref(),
            0.02, // The f16 scales round differently.
        );
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
