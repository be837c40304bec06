//! A linear term beside the experts of a block.

use crate::linear::Linear;
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};

/// B A x, added to what the experts of a block put out for x. It is held in memory alone: no checkpoint has a place for it.
#[derive(Clone, Debug)]
pub struct LinearTerm {
    /// A, `[rank, hidden]`.
    pub a: Linear,
    /// B, `[hidden, rank]`.
    pub b: Linear,
}

impl LinearTerm {
    /// From A, `[rank, hidden]`, and B, `[hidden, rank]`.
    pub fn new(a: Tensor, b: Tensor) -> Self {
        Self {
            a: Linear::new(a, None),
            b: Linear::new(b, None),
        }
    }

    /// Numbers that it consists of.
    pub fn parameters(&self) -> usize {
        self.a.outputs() * self.a.inputs() + self.b.outputs() * self.b.inputs()
    }

    /// Bytes in memory.
    pub fn bytes(&self) -> usize {
        self.a.bytes() + self.b.bytes()
    }

    /// B A x for tokens `[tokens, hidden]`.
    ///
    /// # Errors
    /// When `x` has another width than A.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.b.forward(&self.a.forward(x)?)
    }

    /// The same where a layer computes.
    pub(crate) fn to(&self, dtype: DType, device: &Device) -> Result<Self> {
        let moved = |linear: &Linear| -> Result<Tensor> {
            Ok(linear.weight()?.to_dtype(dtype)?.to_device(device)?)
        };
        Ok(Self::new(moved(&self.a)?, moved(&self.b)?))
    }

    /// Refuses a term that does not fit a layer of this width.
    pub(crate) fn check(&self, layer: usize, hidden: usize) -> Result<()> {
        let (a, b) = (&self.a, &self.b);
        let fits = a.inputs() == hidden && b.outputs() == hidden && a.outputs() == b.inputs();
        match fits {
            true => Ok(()),
            false => Err(Error::LinearTerm {
                layer,
                reason: format!(
                    "A is [{}, {}] and B [{}, {}], where [rank, {hidden}] and [{hidden}, rank] are expected",
                    a.outputs(),
                    a.inputs(),
                    b.outputs(),
                    b.inputs()
                ),
            }),
        }
    }
}
