//! Reading candle tensors as slices.

use crate::error::{Error, Result};
use candle_core::{Storage, Tensor, WithDType};

/// Calls `f` with the elements of a CPU tensor in row-major order, converted to `T` and made contiguous where they are not.
pub(crate) fn read<T: WithDType, R>(tensor: &Tensor, f: impl FnOnce(&[T]) -> R) -> Result<R> {
    let tensor = tensor.to_dtype(T::DTYPE)?.contiguous()?;
    let (storage, layout) = tensor.storage_and_layout();
    let Storage::Cpu(storage) = &*storage else {
        return Err(Error::Device {
            what: "tensor",
            got: tensor.device().location(),
            expected: candle_core::DeviceLocation::Cpu,
        });
    };
    let from = layout.start_offset();
    let elements = storage.as_slice::<T>()?;
    Ok(f(&elements[from..from + tensor.elem_count()]))
}

/// A typed error unless `tensor` has exactly `shape`.
pub(crate) fn expect_shape(what: &'static str, tensor: &Tensor, shape: &[usize]) -> Result<()> {
    if tensor.dims() == shape {
        return Ok(());
    }
    Err(Error::Shape {
        what,
        got: tensor.dims().to_vec(),
        expected: format!("{shape:?}"),
    })
}
