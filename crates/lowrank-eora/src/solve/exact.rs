//! Routes through a full factorisation.

use super::{Leading, Route, Spectrum, Weighting, Whitening, eigenvectors};
use crate::{Error, Result};
use faer::{Mat, MatRef};
use linalg::{Cholesky, Eigen, LeftSingular, Qr, Vectors, left_singular, product};

/// Eigenvectors of G = D H Dᵀ; where D has more rows than columns, of R H Rᵀ with D = Q R.
pub(super) fn by_gram(
    d: MatRef<'_, f64>,
    weighting: &Weighting<'_>,
    rank: usize,
) -> Result<Leading> {
    let (m, n) = d.shape();
    if m > n && !matches!(weighting, Weighting::Output(_)) {
        let qr = Qr::new(d.to_owned());
        let inner = by_gram(qr.r().as_ref(), weighting, rank)?;
        return Ok(Leading {
            vectors: product(qr.q().as_ref(), inner.vectors.as_ref()),
            ..inner
        });
    }
    let g = weighting.output_gram(d);
    let Eigen { values, vectors } = eigenvectors(g.as_ref(), "eigenvectors of D H Dᵀ")?;
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
        Weighting::Factor(t) => product(d, t),
        Weighting::Gram(h) => product(d, factor(h, whitening)?.as_ref()),
        // The whitening factor of G is D T up to a rotation of its columns.
        Weighting::Output(g) => factor(g, whitening)?,
    };
    let wanted = match whitened.ncols().min(whitened.nrows()) < rank {
        true => Vectors::Full,
        false => Vectors::Thin,
    };
    let LeftSingular { values, vectors } =
        left_singular(whitened.as_ref(), wanted).map_err(|source| Error::Factorization {
            what: "singular value decomposition of D T",
            source,
        })?;
    let mut squares: Vec<f64> = values.iter().map(|s| s * s).collect();
    squares.resize(squares.len().max(rank), 0.0);
    Ok(Leading {
        vectors: vectors.subcols(0, rank).to_owned(),
        spectrum: Spectrum::new(squares, 0.0),
        route: Route::Factor(whitening),
    })
}

/// T with T Tᵀ = H.
pub(super) fn factor(h: MatRef<'_, f64>, whitening: Whitening) -> Result<Mat<f64>> {
    match whitening {
        Whitening::Cholesky => match Cholesky::new(h.to_owned()) {
            Ok(cholesky) => Ok(cholesky.into_l()),
            Err(source) => Err(Error::Factorization {
                what: "Cholesky whitening of H, where the eigen whitening and the Gram route take any H",
                source,
            }),
        },
        Whitening::Eigen => {
            let Eigen {
                values,
                mut vectors,
            } = eigenvectors(h, "eigenvectors of H")?;
            for (column, value) in vectors.col_iter_mut().zip(values) {
                let scale = value.max(0.0).sqrt();
                column.iter_mut().for_each(|x| *x *= scale);
            }
            Ok(vectors)
        }
    }
}
