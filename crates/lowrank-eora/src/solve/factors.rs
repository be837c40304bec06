//! B and A.

use super::Spectrum;
use crate::{Error, Result, matrix};
use candle_core::{DType, Device, Tensor};
use faer::{Mat, MatRef};
use linalg::{Entries, add_product, product};
use serde::{Deserialize, Serialize};

/// How B and A share the singular values; B A is the same for all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Split {
    /// Column i of B as long as row i of A: both fit f16 whenever B A does.
    #[default]
    Balanced,
    /// B = U √S, A = √S⁻¹ Uᵀ D with S the singular values of D X, as EoRA's program does; they
    /// grow with the number of tokens. Where S is zero the split is balanced.
    SqrtSigma,
    /// B = U, A = Uᵀ D.
    Orthonormal,
}

/// A correction B A.
#[derive(Clone, Debug)]
pub struct LowRank {
    /// B, `m × r`.
    pub b: Mat<f64>,
    /// A, `r × n`.
    pub a: Mat<f64>,
}

impl LowRank {
    /// U Uᵀ D for orthonormal U, split.
    pub(super) fn project(
        d: MatRef<'_, f64>,
        u: Mat<f64>,
        spectrum: &Spectrum,
        split: Split,
    ) -> Self {
        let (mut b, mut a) = (u, Mat::zeros(0, 0));
        fix_signs(&mut b);
        a.clone_from(&product(b.transpose(), d));
        for i in 0..b.ncols() {
            let balanced = a.row(i).norm_l2();
            let singular = spectrum.squares()[i].sqrt();
            let length = match split {
                Split::Orthonormal => 1.0,
                Split::SqrtSigma if singular > 0.0 => singular,
                Split::SqrtSigma | Split::Balanced => balanced,
            };
            if length > 0.0 {
                let scale = length.sqrt();
                b.col_mut(i).iter_mut().for_each(|x| *x *= scale);
                a.row_mut(i).iter_mut().for_each(|x| *x /= scale);
            }
        }
        Self { b, a }
    }

    /// r.
    pub fn rank(&self) -> usize {
        self.b.ncols()
    }

    /// B A, `m × n`.
    pub fn product(&self) -> Mat<f64> {
        product(self.b.as_ref(), self.a.as_ref())
    }

    /// D − B A.
    pub fn error(&self, d: MatRef<'_, f64>) -> Mat<f64> {
        let mut error = d.to_owned();
        let (b, a) = (self.b.as_ref(), self.a.as_ref());
        add_product(error.as_mut(), b, a, -1.0, Entries::All);
        error
    }

    /// The first `rank` columns of B and rows of A.
    ///
    /// # Errors
    /// When the rank is zero or larger than this one.
    pub fn truncated(&self, rank: usize) -> Result<Self> {
        if rank == 0 || rank > self.rank() {
            return Err(Error::Rank {
                rank,
                rows: self.rank(),
                cols: self.rank(),
            });
        }
        Ok(Self {
            b: self.b.as_ref().subcols(0, rank).to_owned(),
            a: self.a.as_ref().subrows(0, rank).to_owned(),
        })
    }

    /// A `[r, n]` and B `[m, r]` as tensors, in this order.
    ///
    /// # Errors
    /// When the device has no room.
    pub fn to_tensors(&self, dtype: DType, device: &Device) -> Result<(Tensor, Tensor)> {
        Ok((
            matrix::to_tensor(self.a.as_ref(), dtype, device)?,
            matrix::to_tensor(self.b.as_ref(), dtype, device)?,
        ))
    }

    /// From tensors A `[r, n]` and B `[m, r]`, for instance those that were exported.
    ///
    /// # Errors
    /// When the ranks differ or a value is not finite.
    pub fn from_tensors(a: &Tensor, b: &Tensor) -> Result<Self> {
        let a = matrix::from_tensor(a, "factor A")?;
        let b = matrix::from_tensor(b, "factor B")?;
        matrix::expect_shape("factor B", b.as_ref(), (b.nrows(), a.nrows()))?;
        Ok(Self { b, a })
    }
}

/// Makes the largest entry of every column positive: eigenvectors have no sign of their own.
fn fix_signs(u: &mut Mat<f64>) {
    for column in u.col_iter_mut() {
        let entries = column.as_ref().iter();
        let largest = entries.fold(
            0.0f64,
            |best, &x| if x.abs() > best.abs() { x } else { best },
        );
        if largest < 0.0 {
            column.iter_mut().for_each(|x| *x = -*x);
        }
    }
}
