//! Routes through a full factorisation.

use super::{Leading, Route, Spectrum, Weighting, Whitening};
use crate::{Error, Result};
use faer::{Mat, MatRef, Side};

/// Eigenvectors of G = D H Dᵀ; where D has more rows than columns, of R H Rᵀ with D = Q R.
pub(super) fn by_gram(
    d: MatRef<'_, f64>,
    weighting: &Weighting<'_>,
    rank: usize,
) -> Result<Leading> {
    let (m, n) = d.shape();
    if m > n && !matches!(weighting, Weighting::Output(_)) {
        let qr = d.qr();
        let inner = by_gram(qr.thin_R(), weighting, rank)?;
        return Ok(Leading {
            vectors: qr.compute_thin_Q() * inner.vectors,
            ..inner
        });
    }
    let (values, vectors) = eigen(weighting.output_gram(d), "the eigenvectors of D H Dᵀ")?;
    Ok(Leading {
        vectors: vectors.subcols(0, rank).to_owned(),
        spectrum: Spectrum::new(values, 0.0),
        route: Route::Gram,
    })
}

/// Left singular vectors of D T.
pub(super) fn by_factor(
    d: MatRef<'_, f64>,
    weighting: &Weighting<'_>,
    whitening: Whitening,
    rank: usize,
) -> Result<Leading> {
    let whitened = match *weighting {
        Weighting::Identity => d.to_owned(),
        Weighting::Diagonal(h) => {
            Mat::from_fn(d.nrows(), d.ncols(), |i, j| d[(i, j)] * h[j].sqrt())
        }
        Weighting::Factor(t) => d * t,
        Weighting::Gram(h) => d * factor(h, whitening)?,
        // The whitening factor of G is D T up to a rotation of its columns.
        Weighting::Output(g) => factor(g, whitening)?,
    };
    let full = whitened.ncols().min(whitened.nrows()) < rank;
    let failed = |_| Error::Factorization {
        what: "the singular value decomposition of D T",
        reason: "no convergence".into(),
    };
    let svd = if full {
        whitened.svd().map_err(failed)?
    } else {
        whitened.thin_svd().map_err(failed)?
    };
    let mut squares: Vec<f64> = svd.S().column_vector().iter().map(|s| s * s).collect();
    squares.resize(squares.len().max(rank), 0.0);
    Ok(Leading {
        vectors: svd.U().subcols(0, rank).to_owned(),
        spectrum: Spectrum::new(squares, 0.0),
        route: Route::Factor(whitening),
    })
}

/// T with T Tᵀ = H.
pub(super) fn factor(h: MatRef<'_, f64>, whitening: Whitening) -> Result<Mat<f64>> {
    match whitening {
        Whitening::Cholesky => match h.llt(Side::Lower) {
            Ok(llt) => Ok(llt.L().to_owned()),
            Err(error) => Err(Error::Factorization {
                what: "the Cholesky factorisation of H",
                reason: format!(
                    "{error:?}; H is not positive definite: take the eigen whitening, or the Gram route"
                ),
            }),
        },
        Whitening::Eigen => {
            let (values, mut vectors) = eigen(h.to_owned(), "the eigenvectors of H")?;
            for (column, value) in vectors.col_iter_mut().zip(values) {
                let scale = value.max(0.0).sqrt();
                column.iter_mut().for_each(|x| *x *= scale);
            }
            Ok(vectors)
        }
    }
}

/// Eigenvalues, falling, and eigenvectors of the symmetric matrix with this lower triangle.
pub(super) fn eigen(matrix: Mat<f64>, what: &'static str) -> Result<(Vec<f64>, Mat<f64>)> {
    if matrix.nrows() == 0 {
        return Ok((Vec::new(), matrix));
    }
    let eigen = matrix
        .self_adjoint_eigen(Side::Lower)
        .map_err(|error| Error::Factorization {
            what,
            reason: format!("{error:?}"),
        })?;
    let values = eigen.S().column_vector().iter().rev().copied().collect();
    Ok((values, eigen.U().reverse_cols().to_owned()))
}
