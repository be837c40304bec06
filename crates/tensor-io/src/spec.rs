//! What a writer is told of a tensor before its bytes come.

use safetensors::Dtype;

use crate::error::{Error, Result};
use crate::header::{METADATA_KEY, byte_size};

/// Name, dtype and shape of a tensor to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSpec {
    /// Name, unique in the checkpoint.
    pub name: String,
    /// Dtype to store.
    pub dtype: Dtype,
    /// Shape, outermost dimension first.
    pub shape: Vec<usize>,
}

impl TensorSpec {
    /// A declaration; `dtype` is a stored dtype or one of candle's.
    pub fn new(
        name: impl Into<String>,
        dtype: impl Into<Dtype>,
        shape: impl Into<Vec<usize>>,
    ) -> Self {
        Self {
            name: name.into(),
            dtype: dtype.into(),
            shape: shape.into(),
        }
    }

    /// Size as stored, in bytes.
    pub(crate) fn bytes(&self) -> Result<usize> {
        if self.name == METADATA_KEY {
            return Err(self.refuse("the format keeps this name for itself"));
        }
        byte_size(self.dtype, &self.shape)
            .ok_or_else(|| self.refuse("its shape overflows or does not fill whole bytes"))
    }

    pub(crate) fn refuse(&self, reason: &'static str) -> Error {
        Error::BadDeclaration {
            tensor: self.name.clone(),
            reason,
        }
    }
}
