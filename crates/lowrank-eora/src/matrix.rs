//! Between candle's row-major tensors and faer's column-major matrices.

use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use faer::{Mat, MatMut, MatRef};

/// A `[rows, cols]` tensor of any float dtype as a matrix.
///
/// # Errors
/// When the tensor is not two-dimensional or holds a NaN or an infinity; `what` names it.
pub(crate) fn from_tensor(tensor: &Tensor, what: &'static str) -> Result<Mat<f64>> {
    let &[rows, cols] = tensor.dims() else {
        let cols = tensor.dims().last().copied().unwrap_or(1);
        return Err(Error::Shape {
            what,
            found: tensor.dims().to_vec(),
            expected: vec![tensor.elem_count() / cols.max(1), cols],
        });
    };
    let values = tensor
        .to_device(&Device::Cpu)?
        .to_dtype(DType::F64)?
        .flatten_all()?
        .to_vec1::<f64>()?;
    let matrix = MatRef::from_row_major_slice(&values, rows, cols).to_owned();
    check_finite(matrix.as_ref(), what)?;
    Ok(matrix)
}

/// A matrix as a `[rows, cols]` tensor.
///
/// # Errors
/// When the device has no room.
pub(crate) fn to_tensor(matrix: MatRef<'_, f64>, dtype: DType, device: &Device) -> Result<Tensor> {
    let (rows, cols) = matrix.shape();
    let mut values = vec![0f64; rows * cols];
    MatMut::from_row_major_slice_mut(&mut values, rows, cols).copy_from(matrix);
    Ok(Tensor::from_vec(values, (rows, cols), &Device::Cpu)?
        .to_dtype(dtype)?
        .to_device(device)?)
}

pub(crate) fn expect_shape(
    what: &'static str,
    found: MatRef<'_, f64>,
    (rows, cols): (usize, usize),
) -> Result<()> {
    if found.shape() == (rows, cols) {
        return Ok(());
    }
    Err(Error::Shape {
        what,
        found: vec![found.nrows(), found.ncols()],
        expected: vec![rows, cols],
    })
}

pub(crate) fn check_finite(matrix: MatRef<'_, f64>, what: &'static str) -> Result<()> {
    linalg::check_finite(matrix).map_err(|error| match error {
        linalg::Error::NotFinite { row, column, value } => Error::NotFinite {
            what,
            row,
            column,
            value,
        },
        source => Error::Factorization { what, source },
    })
}
