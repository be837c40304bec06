//! Between candle's row-major tensors and faer's column-major matrices.

use crate::Result;
use candle_core::{DType, Device, Tensor};
use faer::{Mat, MatMut, MatRef};

/// A `[rows, cols]` tensor of any float dtype as a matrix.
pub(crate) fn from_tensor(tensor: &Tensor) -> Result<Mat<f64>> {
    let (rows, cols) = tensor.dims2()?;
    let values = tensor.to_device(&Device::Cpu)?.to_dtype(DType::F64)?;
    let values = values.flatten_all()?.to_vec1::<f64>()?;
    Ok(MatRef::from_row_major_slice(&values, rows, cols).to_owned())
}

/// A matrix as a `[rows, cols]` tensor on the CPU.
pub(crate) fn to_tensor(matrix: MatRef<'_, f64>, dtype: DType) -> Result<Tensor> {
    let (rows, cols) = matrix.shape();
    let mut values = vec![0f64; rows * cols];
    MatMut::from_row_major_slice_mut(&mut values, rows, cols).copy_from(matrix);
    Ok(Tensor::from_vec(values, (rows, cols), &Device::Cpu)?.to_dtype(dtype)?)
}

/// The rows and columns `ids` of a square matrix.
pub(crate) fn among(matrix: MatRef<'_, f64>, ids: &[usize]) -> Mat<f64> {
    Mat::from_fn(ids.len(), ids.len(), |i, j| matrix[(ids[i], ids[j])])
}
