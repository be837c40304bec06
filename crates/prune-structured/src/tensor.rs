//! From candle's tensors to plain values.

use crate::Result;
use candle_core::{DType, Device, Tensor};

/// Row-major f32 values on the CPU.
pub(crate) fn values(tensor: &Tensor) -> Result<Vec<f32>> {
    Ok(tensor
        .to_dtype(DType::F32)?
        .to_device(&Device::Cpu)?
        .flatten_all()?
        .to_vec1()?)
}
