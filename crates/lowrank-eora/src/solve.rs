//! The best correction of rank r of a layer.
//!
//! Wanted is the B A of rank r with the least ‖(D − B A) X‖_F. With U_r the leading left singular
//! vectors of D X, which are the leading eigenvectors of G = D H Dᵀ, it is U_r U_rᵀ D: the
//! truncation [D T]_r T⁻¹ of EoRA (arXiv 2410.21271, algorithm 1) for any T with T Tᵀ = H, written
//! without the inverse. So no H is too singular, nothing is damped, and ‖A‖ ≤ ‖D‖.
//!
//! [`solve`] takes D and H in one of the forms of [`Weighting`]; [`Method`] names the weightings
//! that the literature compares. Routes to U_r are in [`Route`]. What follows from a solution is
//! beside it: truncation, ranks under a budget, quantised factors.

mod allocate;
mod alternate;
mod exact;
mod factors;
mod krylov;
mod method;
mod quantise;
mod refit;
mod spectrum;
#[cfg(test)]
mod tests;
mod weighting;

pub(crate) use allocate::{Candidate, allocate};
pub use alternate::{Alternated, alternate};
pub use factors::{LowRank, Split};
pub(crate) use method::drift_residual;
pub use method::{DRIFT_DAMPING, Method};
pub(crate) use quantise::quantise_factors;
pub(crate) use refit::{RefitCollector, refit};
pub use spectrum::{Criterion, Spectrum};
pub use weighting::Weighting;

use crate::matrix::check_finite;
use crate::{Error, Result};
use faer::{Mat, MatRef};
use linalg::Eigen;
use serde::{Deserialize, Serialize};

/// How the leading left singular vectors of D T are found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Route {
    /// By shape and rank: the Gram route where it is cheap or costs at most twice the Krylov route.
    #[default]
    Auto,
    /// All eigenvectors of G = D H Dᵀ in f64, on the smaller side of D.
    Gram,
    /// Singular vectors of D T with a whitening factor T.
    Factor(Whitening),
    /// Block Krylov subspace, until further steps are estimated to gain too little; Gram where that
    /// does not happen.
    Krylov,
}

/// Which T with T Tᵀ = H.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Whitening {
    /// Q √Λ of the eigenvectors of H, as EoRA computes it; any H.
    Eigen,
    /// Cholesky factor; only for positive definite H.
    Cholesky,
}

/// How to solve.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct Options {
    /// Route.
    pub route: Route,
    /// How B and A share the singular values.
    pub split: Split,
    /// Krylov route: stops when the squared loss is estimated to be within this share of the best.
    pub tolerance: f64,
    /// Krylov route: seed of the random start.
    pub seed: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            route: Route::Auto,
            split: Split::Balanced,
            tolerance: 1e-3,
            seed: 0,
        }
    }
}

impl Options {
    /// How the leading singular vectors are found.
    pub fn with_route(self, route: Route) -> Self {
        Self { route, ..self }
    }

    /// How B and A share the singular values.
    pub fn with_split(self, split: Split) -> Self {
        Self { split, ..self }
    }

    /// Krylov route: the share of the best squared loss within which it stops.
    pub fn with_tolerance(self, tolerance: f64) -> Self {
        Self { tolerance, ..self }
    }

    /// Krylov route: seed of the random start.
    pub fn with_seed(self, seed: u64) -> Self {
        Self { seed, ..self }
    }
}

/// The best correction of a layer.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Solution {
    /// B and A.
    pub factors: LowRank,
    /// Squared singular values of D X: what each rank gains, and what is left.
    pub spectrum: Spectrum,
    /// The route taken: never [`Route::Auto`].
    pub route: Route,
}

impl Solution {
    /// ‖(D − B A) X‖_F, from the spectrum.
    pub fn loss(&self) -> f64 {
        self.spectrum.loss(self.factors.rank())
    }

    /// The best correction of a smaller rank, which is a part of this one.
    ///
    /// # Errors
    /// When the rank is zero or larger than this one.
    pub fn truncated(&self, rank: usize) -> Result<Self> {
        Ok(Self {
            factors: self.factors.truncated(rank)?,
            spectrum: self.spectrum.clone(),
            route: self.route,
        })
    }
}

/// Orthonormal vectors `m × r` by falling singular value, and the spectrum they belong to.
struct Leading {
    vectors: Mat<f64>,
    spectrum: Spectrum,
    route: Route,
}

/// The correction of rank `rank` of the residual D (`m × n`) that is best under a weighting.
///
/// Where the weighting sees nothing of D (H = 0), it is the best one in the plain Frobenius norm.
/// The number of threads changes nothing.
///
/// # Errors
/// When the rank is not in 1..=min(m, n), shapes do not fit, an entry is not finite, or an
/// explicit Cholesky route meets an H that is not positive definite.
pub fn solve(
    d: MatRef<'_, f64>,
    weighting: &Weighting<'_>,
    rank: usize,
    options: &Options,
) -> Result<Solution> {
    let (m, n) = d.shape();
    if rank == 0 || rank > m.min(n) {
        return Err(Error::Rank {
            rank,
            rows: m,
            cols: n,
        });
    }
    if !(options.tolerance.is_finite() && options.tolerance > 0.0) {
        return Err(Error::Setting {
            name: "tolerance",
            value: options.tolerance.to_string(),
            expected: "a number > 0",
        });
    }
    check_finite(d, "residual")?;
    weighting.check(m, n)?;
    let mut leading = leading(d, weighting, rank, options)?;
    if leading.spectrum.total() == 0.0 {
        // The vectors are arbitrary where D X is zero: let them at least reduce D.
        leading.vectors = self::leading(d, &Weighting::Identity, rank, options)?.vectors;
    }
    Ok(Solution {
        factors: LowRank::project(d, leading.vectors, &leading.spectrum, options.split),
        spectrum: leading.spectrum,
        route: leading.route,
    })
}

fn leading(
    d: MatRef<'_, f64>,
    weighting: &Weighting<'_>,
    rank: usize,
    options: &Options,
) -> Result<Leading> {
    match options.route {
        Route::Factor(whitening) => exact::by_factor(d, weighting, whitening, rank),
        Route::Gram => exact::by_gram(d, weighting, rank),
        Route::Auto if krylov::exact_is_better(d.shape(), rank, weighting) => {
            exact::by_gram(d, weighting, rank)
        }
        Route::Auto | Route::Krylov => match krylov::by_krylov(d, weighting, rank, options)? {
            Some(found) => Ok(found),
            None => exact::by_gram(d, weighting, rank),
        },
    }
}

/// Eigenvectors of a symmetric matrix; `what` names it in errors.
fn eigenvectors(matrix: MatRef<'_, f64>, what: &'static str) -> Result<Eigen> {
    linalg::eigen(matrix).map_err(|source| Error::Factorization { what, source })
}
