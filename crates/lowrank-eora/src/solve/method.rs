//! The methods that the literature compares, by name.

use super::{Options, Solution, Weighting, solve};
use crate::matrix::expect_shape;
use crate::stats::{Collect, Diagonal, InputStats};
use crate::{Error, Result};
use faer::linalg::solvers::Solve;
use faer::{Mat, MatRef, Side};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// Which norm a correction is best in.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
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
    /// layer and X what the dense model does; see [`drift_residual`].
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
pub fn drift_residual(
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
    let llt = damped
        .llt(Side::Lower)
        .map_err(|error| Error::Factorization {
            what: "the Cholesky factorisation of the student's H",
            reason: format!("{error:?}; a larger damping makes it positive definite"),
        })?;
    // (W (K − Ĥ) (Ĥ + λI)⁻¹)ᵀ = (Ĥ + λI)⁻¹ (K − Ĥ)ᵀ Wᵀ.
    let drift = (cross - gram).transpose() * weight.transpose();
    Ok(d + llt.solve(drift).transpose())
}
