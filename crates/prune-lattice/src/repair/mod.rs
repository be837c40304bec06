//! Least squares after pruning, without training: what was removed is expressed by what is kept.
//!
//! [`refit`] solves the weights under a mask again, so that each product is as close as it can be to the dense one on the
//! recorded states. [`merge`] removes neurons and folds a linear prediction of their states into the weights that read them.
//! Prior art: spectral pruning of recurrent networks
//! (arXiv 2105.10832), interpolative decompositions of layers (arXiv 2108.00065), neuron merging (arXiv 2010.13160).

mod merge;
mod refit;

pub(crate) use merge::numbers;
pub use merge::{MergeConfig, Prediction, merge, merge_in, merge_passes, predict};
pub use refit::{MatrixRefit, Refit, RefitConfig, RefitReport, refit, refit_matrix};

use crate::{
    error::{Error, Result},
    order::bits::BitMatrix,
};
use linalg::{Cholesky, faer::Mat};
use std::collections::BTreeMap;

/// Checks that a ridge is a share: finite and not negative.
fn check_ridge(ridge: f64) -> Result<()> {
    match ridge.is_finite() && ridge >= 0.0 {
        true => Ok(()),
        false => Err(Error::Setting {
            setting: "ridge",
            reason: format!("{ridge} is no finite number of at least 0"),
        }),
    }
}

/// Groups of the given rows of `keep` with the same entries, as places in `rows`; without `keep`, all rows are one group.
fn by_support(keep: Option<&BitMatrix>, rows: &[usize]) -> Vec<Vec<usize>> {
    let mut groups: BTreeMap<&[u64], Vec<usize>> = BTreeMap::new();
    for (place, &row) in rows.iter().enumerate() {
        let support = keep.map_or(&[][..], |keep| keep.row(row));
        groups.entry(support).or_default().push(place);
    }
    groups.into_values().collect()
}

/// Solves `a x = b` for a symmetric positive definite `a`.
fn solve(a: Mat<f64>, b: Mat<f64>, what: &str) -> Result<Mat<f64>> {
    let factor = Cholesky::new(a).map_err(|e| Error::LeastSquares {
        what: what.into(),
        reason: e.to_string(),
    })?;
    Ok(factor.solve(b))
}
