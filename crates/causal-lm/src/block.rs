//! One decoder block: norms, grouped-query attention and a gated MLP.
//!
//! A block is plain data. Its widths are those of its tensors, so that a pruned block, one without
//! attention or one without an MLP runs through the same code, and a compressor may replace any
//! tensor between loading and running.

use crate::attention::Mixer;
use crate::linear::Linear;
use crate::ops::silu_mul;
use crate::tap::{Site, Tap};
use crate::{Error, Result};
use candle_core::Tensor;

/// `x / rms(x) * weight` over the last dimension.
#[derive(Clone, Debug)]
pub struct RmsNorm {
    /// `[width]`.
    pub weight: Tensor,
    /// Added to the mean square.
    pub eps: f64,
}

impl RmsNorm {
    /// Any shape whose last dimension is the weight's width.
    ///
    /// # Errors
    /// When the widths differ.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(candle_nn::ops::rms_norm(
            &x.contiguous()?,
            &self.weight,
            self.eps as f32,
        )?)
    }
}

/// Grouped-query self-attention. Query head `h` reads key/value head `h / (heads / kv_heads)`.
#[derive(Clone, Debug)]
pub struct Attention {
    /// `[heads * head_dim, hidden]`.
    pub q: Linear,
    /// `[kv_heads * head_dim, hidden]`.
    pub k: Linear,
    /// `[kv_heads * head_dim, hidden]`.
    pub v: Linear,
    /// `[hidden, heads * head_dim]`.
    pub o: Linear,
    /// Norm of each query head (Qwen3).
    pub q_norm: Option<RmsNorm>,
    /// Norm of each key head (Qwen3).
    pub k_norm: Option<RmsNorm>,
    /// Width of a head.
    pub head_dim: usize,
    /// Positions a query sees, itself included; `None` for all before it.
    pub sliding_window: Option<usize>,
}

impl Attention {
    /// Query heads.
    pub fn heads(&self) -> usize {
        self.q.weight.dims()[0] / self.head_dim
    }

    /// Key/value heads.
    pub fn kv_heads(&self) -> usize {
        self.k.weight.dims()[0] / self.head_dim
    }
}

/// `down(silu(gate(x)) * up(x))`.
#[derive(Clone, Debug)]
pub struct Mlp {
    /// `[neurons, hidden]`.
    pub gate: Linear,
    /// `[neurons, hidden]`.
    pub up: Linear,
    /// `[hidden, neurons]`.
    pub down: Linear,
}

/// A decoder block with its weights.
#[derive(Clone, Debug)]
pub struct Block {
    /// Index in the model.
    pub layer: usize,
    /// Norm before attention.
    pub input_norm: RmsNorm,
    /// Attention, unless the block has none.
    pub attention: Option<Attention>,
    /// What a block without attention adds to every token, `[hidden]`: the bias of an o_proj whose
    /// weight is gone.
    pub attention_constant: Option<Tensor>,
    /// Norm before the MLP.
    pub post_norm: RmsNorm,
    /// MLP, unless the block has none.
    pub mlp: Option<Mlp>,
    /// What a block without an MLP adds to every token, `[hidden]`.
    pub mlp_constant: Option<Tensor>,
}

/// cos and sin of the positions of a step, each `[tokens, head_dim / 2]`.
#[derive(Clone, Debug)]
pub struct RopeTables {
    pub(crate) cos: Tensor,
    pub(crate) sin: Tensor,
}

impl RopeTables {
    /// The rows of `positions`, which count from the first position of these tables.
    ///
    /// # Errors
    /// When the device refuses, or a position is not in the tables.
    pub fn at(&self, positions: &[u32]) -> Result<Self> {
        let positions = Tensor::new(positions, self.cos.device())?;
        Ok(Self {
            cos: self.cos.index_select(&positions, 0)?,
            sin: self.sin.index_select(&positions, 0)?,
        })
    }
}

impl Block {
    /// Runs the block on `x`, `[batch, tokens, hidden]`; the result has the same shape.
    ///
    /// # Errors
    /// [`Error::Tap`] when the tap refuses an input, otherwise what the device reports.
    pub fn forward(
        &self,
        x: &Tensor,
        rope: &RopeTables,
        mixer: &mut Mixer<'_>,
        tap: &mut dyn Tap,
    ) -> Result<Tensor> {
        let mut observe = |site, input: &Tensor| {
            tap.observe(self.layer, site, input)
                .map_err(|source| Error::Tap {
                    layer: self.layer,
                    source,
                })
        };
        let (batch, tokens, hidden) = x.dims3()?;
        let mut x = x.reshape((batch * tokens, hidden))?;
        if let Some(attention) = &self.attention {
            let input = self.input_norm.forward(&x)?;
            observe(Site::Qkv, &input)?;
            let heads = attention.mix(&input, (batch, tokens), self.layer, rope, mixer)?;
            observe(Site::O, &heads)?;
            x = (x + attention.o.forward(&heads)?)?;
        } else if let Some(constant) = &self.attention_constant {
            x = x.broadcast_add(constant)?;
        }
        if let Some(mlp) = &self.mlp {
            let input = self.post_norm.forward(&x)?;
            observe(Site::GateUp, &input)?;
            let neurons = silu_mul(&mlp.gate.forward(&input)?, &mlp.up.forward(&input)?)?;
            observe(Site::Down, &neurons)?;
            x = (x + mlp.down.forward(&neurons)?)?;
        } else if let Some(constant) = &self.mlp_constant {
            x = x.broadcast_add(constant)?;
        }
        Ok(x.reshape((batch, tokens, hidden))?)
    }
}

impl Attention {
    /// From the normed input `[batch * tokens, hidden]` to the input of o_proj.
    fn mix(
        &self,
        x: &Tensor,
        (batch, tokens): (usize, usize),
        layer: usize,
        rope: &RopeTables,
        mixer: &mut Mixer<'_>,
    ) -> Result<Tensor> {
        // [batch * tokens, n * d] -> [batch, n, tokens, d]
        let split = |x: Tensor, norm: Option<&RmsNorm>| -> Result<Tensor> {
            let x = x.reshape((batch, tokens, (), self.head_dim))?;
            let x = match norm {
                Some(norm) => norm.forward(&x)?,
                None => x,
            };
            Ok(x.transpose(1, 2)?.contiguous()?)
        };
        let rotate = |x: Tensor| candle_nn::rotary_emb::rope(&x, &rope.cos, &rope.sin);
        let q = rotate(split(self.q.forward(x)?, self.q_norm.as_ref())?)?;
        let k = rotate(split(self.k.forward(x)?, self.k_norm.as_ref())?)?;
        let v = split(self.v.forward(x)?, None)?;
        let heads = mixer.attend(layer, &q, &k, &v, self.sliding_window)?;
        Ok(heads
            .transpose(1, 2)?
            .reshape((batch * tokens, self.heads() * self.head_dim))?)
    }
}
