//! The norm in which a correction is best.

use crate::matrix::{check_finite, expect_shape};
use crate::{Error, Result};
use faer::{Mat, MatRef};
use linalg::{Entries, add_product, dot, product};

/// H, the second moments of a layer's input, in the form in which it is known.
///
/// The norm of an error E is ‖E X‖_F = √tr(E H Eᵀ). A positive factor on H changes no solution.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub enum Weighting<'a> {
    /// H = I: the plain Frobenius norm.
    Identity,
    /// H = diag(h), `n` numbers ≥ 0.
    Diagonal(&'a [f64]),
    /// H itself, `n × n`, symmetric positive semidefinite.
    Gram(MatRef<'a, f64>),
    /// T with H = T Tᵀ, `n × k`: X itself, or a factor of H.
    Factor(MatRef<'a, f64>),
    /// G = D H Dᵀ of the very residual that is solved for, `m × m`.
    Output(MatRef<'a, f64>),
}

impl Weighting<'_> {
    pub(super) fn check(&self, m: usize, n: usize) -> Result<()> {
        match *self {
            Self::Identity => Ok(()),
            Self::Diagonal(h) => {
                if h.len() != n {
                    return Err(Error::Shape {
                        what: "diagonal weighting",
                        found: vec![h.len()],
                        expected: vec![n],
                    });
                }
                match h.iter().find(|h| !(h.is_finite() && **h >= 0.0)) {
                    None => Ok(()),
                    Some(bad) => Err(Error::Setting {
                        name: "diagonal weighting",
                        value: bad.to_string(),
                        expected: "finite numbers ≥ 0",
                    }),
                }
            }
            Self::Gram(h) => {
                expect_shape("Gram matrix", h, (n, n))?;
                check_finite(h, "Gram matrix")
            }
            Self::Factor(t) => {
                expect_shape("factor of H", t, (n, t.ncols()))?;
                check_finite(t, "factor of H")
            }
            Self::Output(g) => {
                expect_shape("output Gram matrix", g, (m, m))?;
                check_finite(g, "output Gram matrix")
            }
        }
    }

    /// E H, for an E with n columns; `None` when H is not known.
    pub(super) fn times(&self, e: MatRef<'_, f64>) -> Option<Mat<f64>> {
        match *self {
            Self::Identity => Some(e.to_owned()),
            Self::Diagonal(h) => Some(Mat::from_fn(e.nrows(), e.ncols(), |i, j| e[(i, j)] * h[j])),
            Self::Gram(h) => Some(product(e, h)),
            Self::Factor(t) => Some(product(product(e, t).as_ref(), t.transpose())),
            Self::Output(_) => None,
        }
    }

    /// ‖E X‖²_F = tr(E H Eᵀ) of any error E (`p × n`).
    ///
    /// # Errors
    /// When E has another width or only G is known.
    pub fn energy(&self, e: MatRef<'_, f64>) -> Result<f64> {
        self.check_width(e)?;
        let weighted = match *self {
            Self::Factor(t) => return Ok(product(e, t).squared_norm_l2()),
            _ => self.times(e).ok_or(Error::MissingStatistic {
                method: "the loss of a given error",
                statistic: "H",
            })?,
        };
        Ok(dot(weighted.as_ref(), e))
    }

    fn check_width(&self, e: MatRef<'_, f64>) -> Result<()> {
        self.check(0, e.ncols()).or_else(|error| match self {
            Self::Output(_) => Ok(()),
            _ => Err(error),
        })
    }

    /// The lower triangle of G = D H Dᵀ.
    pub(super) fn output_gram(&self, d: MatRef<'_, f64>) -> Mat<f64> {
        let mut g = Mat::zeros(d.nrows(), d.nrows());
        let mut add = |a: MatRef<'_, f64>, b: MatRef<'_, f64>| {
            add_product(g.as_mut(), a, b.transpose(), 1.0, Entries::Lower);
        };
        match *self {
            Self::Output(known) => return known.to_owned(),
            Self::Factor(t) => {
                let dt = product(d, t);
                add(dt.as_ref(), dt.as_ref());
            }
            Self::Identity => add(d, d),
            Self::Diagonal(_) | Self::Gram(_) => {
                if let Some(dh) = self.times(d) {
                    add(dh.as_ref(), d);
                }
            }
        }
        g
    }
}
