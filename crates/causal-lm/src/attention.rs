//! What a query sees: the earlier tokens of its own window, or a cache.

use crate::Result;
use candle_core::{D, DType, Device, Tensor};

/// How a block's attention reaches keys and values.
#[derive(Debug)]
pub enum Mixer<'a> {
    /// Each batch entry is a window of its own that starts at position 0; nothing is kept.
    Windows,
    #[doc(hidden)]
    Cache(&'a mut ()),
}

impl Mixer<'_> {
    pub(crate) fn attend(
        &mut self,
        _layer: usize,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        scale: f64,
        window: Option<usize>,
    ) -> Result<Tensor> {
        let (b, h, t, d) = q.dims4()?;
        let kv = k.dim(1)?;
        let g = h / kv;
        let q = q.reshape((b, kv, g * t, d))?;
        let s = (q.matmul(&k.t()?)? * scale)?.reshape((b, kv, g, t, t))?;
        let mask: Vec<f32> = (0..t)
            .flat_map(|i| {
                (0..t).map(move |j| {
                    if j > i || window.is_some_and(|w| i - j >= w) {
                        f32::NEG_INFINITY
                    } else {
                        0.0
                    }
                })
            })
            .collect();
        let mask = Tensor::from_vec(mask, (t, t), &Device::Cpu)?.to_dtype(DType::F32)?;
        let s = candle_nn::ops::softmax(&s.broadcast_add(&mask)?, D::Minus1)?;
        Ok(s.reshape((b, kv, g * t, t))?
            .matmul(v)?
            .reshape((b, h, t, d))?)
    }
}
