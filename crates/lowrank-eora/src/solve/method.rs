//! The methods that the literature compares, by name.

use super::{Options, Solution, Weighting, solve};
use crate::matrix::{expect_shape, from_tensor};
use crate::stats::{Collect, Diagonal, InputStats};
use crate::{Error, Result};
use candle_core::Tensor;
use faer::{Mat, MatRef};
use linalg::{Cholesky, product};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// Which norm a correction is best in.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Method {
    /// H = I: the singular value decomposition of D (ZeroQuant-V2, arXiv 2303.08302; LoftQ).
    Svd,
    /// H = diag(s²), s = mean |x|: "Act-S" of EoRA's program.
    ActScale,
    /// H = diag(s²), s = √(mean |x|): "Act-S" of EoRA's paper, and ASVD (arXiv 2312.05821) with
    /// exponent 0.5.
    ActScaleSqrt,
    /// H = diag(mean x²): QERA-approx (arXiv 2410.06040).
    Diag,
    /// H = diag(s²), s the largest mean |x| of a batch: L²QER (arXiv 2402.02446).
    Lqer,
    /// H = X Xᵀ: EoRA (arXiv 2410.21271), QERA-exact, SVD-LLM on the residual.
    Eora,
    /// The best correction of W X ≈ (W_c + B A) X̂, with X̂ what the compressed model feeds the
    /// layer and X what the dense model does.
    EoraDrift {
        /// Damping relative to the mean diagonal of X̂ X̂ᵀ.
        damping: f64,
    },
}

/// Damping of drift-aware EoRA, that of GPTQ's Hessian.
pub const DRIFT_DAMPING: f64 = 0.01;

/// Below it L²QER clamps its scales.
const LQER_FLOOR: f64 = 1e-4;

impl Method {
    /// All names, those of the command line.
    pub const NAMES: &'static [&'static str] = &[
        "svd",
        "act-scale",
        "act-scale-sqrt",
        "diag",
        "lqer",
        "eora",
        "eora-drift",
    ];

    /// The name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Svd => "svd",
            Self::ActScale => "act-scale",
            Self::ActScaleSqrt => "act-scale-sqrt",
            Self::Diag => "diag",
            Self::Lqer => "lqer",
            Self::Eora => "eora",
            Self::EoraDrift { .. } => "eora-drift",
        }
    }

    /// What has to be collected beside channel sums.
    pub fn needs(self) -> Collect {
        let drift = matches!(self, Self::EoraDrift { .. });
        Collect {
            gram: drift || self == Self::Eora,
            cross: drift,
        }
    }

    /// The best correction of rank `rank` of W_c towards W (both `m × n`) by this method.
    ///
    /// The spectrum is that of the method's own norm.
    ///
    /// # Errors
    /// When a statistic is missing, and as [`solve`].
    pub fn solve(
        self,
        weight: MatRef<'_, f64>,
        compressed: MatRef<'_, f64>,
        stats: &InputStats,
        rank: usize,
        options: &Options,
    ) -> Result<Solution> {
        expect_shape("compressed weight", compressed, weight.shape())?;
        let d = weight - compressed;
        let missing = |statistic| Error::MissingStatistic {
            method: self.name(),
            statistic,
        };
        if let Some(diagonal) = self.diagonal(&stats.diagonal) {
            return solve(d.as_ref(), &Weighting::Diagonal(&diagonal), rank, options);
        }
        if self == Self::Svd {
            return solve(d.as_ref(), &Weighting::Identity, rank, options);
        }
        let gram = stats.gram.as_ref().ok_or_else(|| missing("H"))?.matrix();
        let target = match self {
            Self::EoraDrift { damping } => {
                let cross = stats.cross.as_ref().ok_or_else(|| missing("K"))?;
                drift_residual(weight, d.as_ref(), gram, cross.as_ref(), damping)?
            }
            _ => d,
        };
        solve(target.as_ref(), &Weighting::Gram(gram), rank, options)
    }

    /// As [`Method::solve`], for tensors `[m, n]` of any float dtype.
    ///
    /// # Errors
    /// As [`Method::solve`], and for tensors that are no matrices or not finite.
    pub fn solve_tensors(
        self,
        weight: &Tensor,
        compressed: &Tensor,
        stats: &InputStats,
        rank: usize,
        options: &Options,
    ) -> Result<Solution> {
        let weight = from_tensor(weight, "weight")?;
        let compressed = from_tensor(compressed, "compressed weight")?;
        self.solve(weight.as_ref(), compressed.as_ref(), stats, rank, options)
    }

    /// The diagonal H of the methods that have one.
    pub fn diagonal(self, sums: &Diagonal) -> Option<Vec<f64>> {
        let square = |scale: &f64| scale * scale;
        match self {
            Self::ActScale => Some(sums.mean_abs().iter().map(square).collect()),
            Self::ActScaleSqrt => Some(sums.mean_abs()),
            Self::Diag => Some(sums.mean_square()),
            Self::Lqer => {
                let scales = sums.max_mean_abs.iter().map(|s| s.max(LQER_FLOOR));
                Some(scales.map(|s| s * s).collect())
            }
            Self::Svd | Self::Eora | Self::EoraDrift { .. } => None,
        }
    }
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Method {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        Ok(match name {
            "svd" => Self::Svd,
            "act-scale" => Self::ActScale,
            "act-scale-sqrt" => Self::ActScaleSqrt,
            "diag" => Self::Diag,
            "lqer" => Self::Lqer,
            "eora" => Self::Eora,
            "eora-drift" => Self::EoraDrift {
                damping: DRIFT_DAMPING,
            },
            _ => {
                return Err(Error::UnknownMethod {
                    name: name.to_owned(),
                    expected: Self::NAMES,
                });
            }
        })
    }
}

/// The residual M that repairs drift too: ‖W X − (W_c + B A) X̂‖_F is least where B A is the best
/// correction of M = D + W (K − Ĥ) (Ĥ + λI)⁻¹ under Ĥ = X̂ X̂ᵀ, with K = X X̂ᵀ and
/// λ = damping · mean(diag Ĥ).
///
/// Without damping M is W K Ĥ⁻¹ − W_c. Written as a correction of D, damping only shrinks what is
/// added for the drift W (X − X̂), and without drift M is D whatever the damping.
///
/// # Errors
/// When shapes do not fit, the damping is negative, or Ĥ + λI is not positive definite.
pub(crate) fn drift_residual(
    weight: MatRef<'_, f64>,
    d: MatRef<'_, f64>,
    gram: MatRef<'_, f64>,
    cross: MatRef<'_, f64>,
    damping: f64,
) -> Result<Mat<f64>> {
    let (m, n) = weight.shape();
    expect_shape("residual", d, (m, n))?;
    expect_shape("Gram matrix", gram, (n, n))?;
    expect_shape("cross statistic", cross, (n, n))?;
    if !(damping.is_finite() && damping >= 0.0) {
        return Err(Error::Setting {
            name: "damping",
            value: damping.to_string(),
            expected: "a number ≥ 0",
        });
    }
    let trace: f64 = (0..n).map(|i| gram[(i, i)]).sum();
    if trace == 0.0 {
        // No input, no drift.
        return Ok(d.to_owned());
    }
    let ridge = damping * trace / n as f64;
    let damped = Mat::from_fn(n, n, |i, j| gram[(i, j)] + if i == j { ridge } else { 0.0 });
    let cholesky = Cholesky::new(damped).map_err(|source| Error::Factorization {
        what: "Cholesky factorisation of the student's H, to which a larger damping can be added",
        source,
    })?;
    // (W (K − Ĥ) (Ĥ + λI)⁻¹)ᵀ = (Ĥ + λI)⁻¹ (K − Ĥ)ᵀ Wᵀ.
    let drift = product((cross - gram).transpose(), weight.transpose());
    Ok(d + cholesky.solve(drift).transpose())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::solve::LowRank;
    use crate::solve::tests::{eora, loss, square};
    use crate::stats::{InputCollector, Rows};
    use crate::testing::{Golden, Lcg, assert_close, assert_matrix_close};

    #[test]
    fn methods_solve_in_their_norms_and_read_back_their_names() {
        let golden = Golden::new();
        let values = (0..64)
            .flat_map(|t| (0..16).map(move |j| (j, t)))
            .map(|(j, t)| golden.x[(j, t)] as f32);
        let rows = Rows::new(values.collect(), 16).expect("finite");
        let collect = Collect {
            gram: true,
            cross: true,
        };
        let mut collector = InputCollector::new(16, collect, Default::default()).expect("valid");
        collector.update(&rows, Some(&rows)).expect("fits");
        let stats = collector.finish();
        let (d, h) = (golden.d(), golden.h());
        for (name, expected) in [
            ("svd", 1.7033139565910513),
            ("act-scale", 1.4214612439321288),
            ("diag", 1.394408824578968),
            ("eora", 1.2343038187955053),
            ("eora-drift", 1.2343038187955053),
        ] {
            let method: Method = name.parse().expect("a name");
            assert_eq!(method.name(), name);
            let solution = method
                .solve(
                    golden.w.as_ref(),
                    golden.compressed.as_ref(),
                    &stats,
                    3,
                    &Options::default(),
                )
                .expect("solves");
            assert_close(loss(&d, &solution.factors, &h), expected, 1e-5);
        }
        for name in Method::NAMES {
            assert_eq!(name.parse::<Method>().expect("a name").to_string(), *name);
        }
        assert!(matches!(
            "aora".parse::<Method>(),
            Err(Error::UnknownMethod { .. })
        ));
        let without = InputStats {
            gram: None,
            ..stats
        };
        let error = Method::Eora.solve(
            golden.w.as_ref(),
            golden.compressed.as_ref(),
            &without,
            3,
            &Options::default(),
        );
        assert!(matches!(
            error,
            Err(Error::MissingStatistic { method: "eora", .. })
        ));
    }

    #[test]
    fn drift_aware_correction_beats_the_local_one_on_drifting_inputs() {
        let mut lcg = Lcg(15);
        let w = lcg.matrix(24, 16);
        let compressed = crate::testing::round_to_nearest(w.as_ref(), 3, 8);
        let teacher = lcg.activations(16, 200);
        let turn = Mat::<f64>::identity(16, 16) + faer::Scale(0.05) * lcg.matrix(16, 16);
        let student = &turn * &teacher;
        let (h, k) = (square(&student), &teacher * student.transpose());
        let d = &w - &compressed;
        let total = |factors: &LowRank| {
            (&w * &teacher - (&compressed + factors.product()) * &student).norm_l2()
        };
        let local = total(&eora(&d, &h, 6).factors);
        let solve = |damping| {
            let m = drift_residual(w.as_ref(), d.as_ref(), h.as_ref(), k.as_ref(), damping)
                .expect("fits");
            eora(&m, &h, 6).factors
        };
        assert!(total(&solve(DRIFT_DAMPING)) < 0.9 * local);
        // Undamped it is the least squares optimum of rank 6.
        let best = total(&solve(0.0));
        for _ in 0..20 {
            let mut step = solve(0.0);
            step.b += faer::Scale(1e-2) * lcg.matrix(24, 6);
            assert!(total(&step) >= best);
        }
        let none =
            drift_residual(w.as_ref(), d.as_ref(), h.as_ref(), h.as_ref(), 0.1).expect("fits");
        assert_matrix_close(none.as_ref(), d.as_ref(), 1e-12);
    }
}
