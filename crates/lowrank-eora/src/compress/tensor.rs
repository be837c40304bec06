//! From and to candle's tensors.

use candle_core::{DType, Device, Tensor};
use faer::MatRef;

use super::rows::Rows;
use super::{Compressed, Compressor, Inputs};
use crate::Result;

impl Compressor {
    /// As [`Compressor::compress`], for a tensor `[m, n]` of any float dtype.
    ///
    /// # Errors
    /// As [`Compressor::compress`]; also [`Error::Candle`](crate::Error::Candle) for a tensor that is no matrix.
    pub fn compress_tensor(
        &self,
        weight: &Tensor,
        inputs: Option<Inputs<'_>>,
    ) -> Result<Compressed> {
        let (m, n) = weight.dims2()?;
        let values: Vec<f64> = weight
            .to_device(&Device::Cpu)?
            .to_dtype(DType::F64)?
            .flatten_all()?
            .to_vec1()?;
        self.compress(MatRef::from_row_major_slice(&values, m, n), inputs)
    }
}

impl Compressed {
    /// W_c as a tensor `[m, n]`, rounded to `dtype` where that is coarser.
    ///
    /// # Errors
    /// [`Error::Candle`](crate::Error::Candle).
    pub fn to_tensor(&self, dtype: DType, device: &Device) -> Result<Tensor> {
        Rows::read(self.weight.as_ref(), "compressed weight")?.to_tensor(dtype, device)
    }
}
