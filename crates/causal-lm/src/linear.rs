//! Linear layers in the Hugging Face layout.

use crate::Result;
use candle_core::Tensor;

/// `y = x Wᵀ + b`.
#[derive(Clone, Debug)]
pub struct Linear {
    /// `[out, in]`.
    pub weight: Tensor,
    /// `[out]`.
    pub bias: Option<Tensor>,
}

impl Linear {
    /// Width of what it reads.
    pub fn inputs(&self) -> usize {
        self.weight.dims()[1]
    }

    /// Width of what it writes.
    pub fn outputs(&self) -> usize {
        self.weight.dims()[0]
    }

    /// `[rows, in]` to `[rows, out]`.
    ///
    /// # Errors
    /// When `x` has another width than the weight.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let y = x.matmul(&self.weight.t()?)?;
        Ok(match &self.bias {
            Some(bias) => y.broadcast_add(bias)?,
            None => y,
        })
    }
}
