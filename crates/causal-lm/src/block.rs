//! One decoder block: norms, grouped-query attention or a delta net, and an MLP.
//!
//! A block is plain data. Its widths are those of its tensors, so that a pruned block, one without attention or one
//! without an MLP runs through the same code, and a compressor may replace any tensor between loading and running. What
//! architectures differ in is data too: where norms are, what multiplies what, which activation.

use crate::attention::{Mixer, decoded};
use crate::config::{Activation, NormKind};
pub use crate::delta_net::DeltaNet;
use crate::linear::Linear;
use crate::mixture::{MixturePass, Moe};
use crate::names::LinearName;
use crate::ops;
use crate::rope::Pairs;
use crate::tap::{Site, Tap};
pub use crate::token_mixer::TokenMixer;
use crate::{Error, Result};
use candle_core::Tensor;
use kv_lazy::CacheConfig;
use kv_lazy::attention::Scores;
use std::sync::Arc;

/// A norm over the last dimension.
#[derive(Clone, Debug)]
pub struct Norm {
    /// What it computes.
    pub kind: NormKind,
    /// `[width]`: what the normalised values are multiplied by, whatever the checkpoint stores.
    pub weight: Tensor,
    /// `[width]`, of layer norms.
    pub bias: Option<Tensor>,
    /// Added to the mean square or variance.
    pub eps: f64,
}

impl Norm {
    /// Any shape whose last dimension is the weight's width.
    ///
    /// # Errors
    /// When the widths differ.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let x = x.contiguous()?;
        let eps = self.eps as f32;
        Ok(match self.kind {
            NormKind::Rms => candle_nn::ops::rms_norm(&x, &self.weight, eps)?,
            NormKind::Layer => {
                let bias = match &self.bias {
                    Some(bias) => bias.clone(),
                    None => self.weight.zeros_like()?,
                };
                candle_nn::ops::layer_norm(&x, &self.weight, &bias, eps)?
            }
        })
    }

    /// Bytes of its weights in memory.
    pub fn bytes(&self) -> usize {
        let bytes = |x: &Tensor| x.elem_count() * x.dtype().size_in_bytes();
        bytes(&self.weight) + self.bias.as_ref().map_or(0, bytes)
    }

    /// Width of what it normalises.
    pub fn width(&self) -> usize {
        self.weight.elem_count()
    }
}

/// Grouped-query self-attention. Query head `h` reads key/value head `h / (heads / kv_heads)`.
#[derive(Clone, Debug)]
pub struct Attention {
    /// `[heads * head_dim, hidden]`; where gated, each head's rows are followed by as many of its gate.
    pub q: Linear,
    /// `[kv_heads * head_dim, hidden]`.
    pub k: Linear,
    /// `[kv_heads * head_dim, hidden]`; `None` where values are the keys before norm and rotation.
    pub v: Option<Linear>,
    /// `[hidden, heads * head_dim]`.
    pub o: Linear,
    /// Norm of queries: of each head where it is one head wide, else of all heads together.
    pub q_norm: Option<Norm>,
    /// Norm of keys, alike.
    pub k_norm: Option<Norm>,
    /// Norm of each value head.
    pub v_norm: Option<Norm>,
    /// Width of a head.
    pub head_dim: usize,
    /// Positions a query sees, itself included; `None` for all before it.
    pub sliding_window: Option<usize>,
    /// Which rotation of [`RopeTables`] encodes positions; `None` for none.
    pub rotation: Option<usize>,
    /// Factor on q·k, and the cap on it.
    pub scores: Scores,
    /// Whether q also projects a gate: heads' outputs are multiplied by its sigmoid.
    pub gated: bool,
    /// Queries, keys and values are clamped to ± this before rotation.
    pub clip: Option<f64>,
    /// The cache of this layer through which windows are attended, one token after the other, as when they are decoded;
    /// `None` for attention over the window as it is. Where there is a cache already, it is that one.
    pub cache: Option<Arc<CacheConfig>>,
}

impl Attention {
    /// Query heads.
    pub fn heads(&self) -> usize {
        self.o.inputs() / self.head_dim
    }

    /// Key/value heads.
    pub fn kv_heads(&self) -> usize {
        self.k.outputs() / self.head_dim
    }
}

/// `down(act(gate(x)) * up(x))`, or `down(act(up(x)))` without a gate.
#[derive(Clone, Debug)]
pub struct Mlp {
    /// `[neurons, hidden]`.
    pub gate: Option<Linear>,
    /// `[neurons, hidden]`.
    pub up: Linear,
    /// `[hidden, neurons]`.
    pub down: Linear,
    /// The activation.
    pub activation: Activation,
}

impl Mlp {
    /// The input of down_proj.
    ///
    /// # Errors
    /// When `x` has another width than the weights.
    pub fn neurons(&self, x: &Tensor) -> Result<Tensor> {
        match &self.gate {
            Some(gate) => {
                let [gate, up] = Linear::forward_all([gate, &self.up], x)?;
                ops::activate(self.activation, &gate, Some(&up))
            }
            None => ops::activate(self.activation, &self.up.forward(x)?, None),
        }
    }

    /// Bytes of its weights in memory.
    pub fn bytes(&self) -> usize {
        self.gate.as_ref().map_or(0, Linear::bytes) + self.up.bytes() + self.down.bytes()
    }
}

/// Attention, a delta net or an MLP with the norms around it: adds `scale · after(body(before(x)))` to the residual stream.
#[derive(Clone, Debug)]
pub struct Half<T> {
    /// Norm of its input.
    pub before: Option<Norm>,
    /// What it computes, unless the block has no such half.
    pub body: Option<T>,
    /// What a half without a body puts out for every token, `[hidden]`: the bias of an output projection whose weight is
    /// gone.
    pub constant: Option<Tensor>,
    /// Norm of its output.
    pub after: Option<Norm>,
    /// Factor on what it adds.
    pub scale: f64,
}

impl<T> Half<T> {
    fn input(&self, x: &Tensor) -> Result<Tensor> {
        match &self.before {
            Some(norm) => norm.forward(x),
            None => Ok(x.clone()),
        }
    }

    fn normed(&self, y: Tensor) -> Result<Tensor> {
        let y = match &self.after {
            Some(norm) => norm.forward(&y)?,
            None => y,
        };
        match self.scale == 1.0 {
            true => Ok(y),
            false => Ok((y * self.scale)?),
        }
    }

    /// `x` with what the half adds when it has no body.
    fn without_body(&self, x: Tensor) -> Result<Tensor> {
        match &self.constant {
            Some(constant) => {
                let constant = self.normed(constant.unsqueeze(0)?)?;
                Ok(x.broadcast_add(&constant)?)
            }
            None => Ok(x),
        }
    }
}

/// A decoder block with its weights.
#[derive(Clone, Debug)]
pub struct Block {
    /// Index in the model.
    pub layer: usize,
    /// Attention, or the delta net in its place.
    pub attention: Half<TokenMixer>,
    /// MLP; without a body where the block has experts in its place.
    pub mlp: Half<Mlp>,
    /// Experts, between the norms of `mlp`.
    pub experts: Option<Moe>,
    /// Whether both halves read the block's input.
    pub parallel: bool,
    /// Factor on the block's output.
    pub scalar: Option<f64>,
}

/// A batch between attention and the experts.
pub(crate) struct BetweenHalves {
    /// What the experts read, `[batch * tokens, hidden]`.
    pub(crate) input: Tensor,
    residual: Tensor,
    shape: (usize, usize, usize),
}

/// cos and sin of the positions of a step, for every rotation of a model.
#[derive(Clone, Debug)]
pub struct RopeTables {
    pub(crate) tables: Vec<RopeTable>,
    /// Factor on the query of each position, `[tokens, 1]`.
    pub(crate) query_scale: Option<Tensor>,
}

/// One rotation: cos and sin, each `[tokens, rotated channels / 2]`.
#[derive(Clone, Debug)]
pub(crate) struct RopeTable {
    pub(crate) cos: Tensor,
    pub(crate) sin: Tensor,
    pub(crate) pairs: Pairs,
}

impl RopeTables {
    /// The rows of `positions`, counted from the first position of these tables, in their order.
    ///
    /// # Errors
    /// When a position is beyond the tables.
    pub fn at(&self, positions: &[u32]) -> Result<Self> {
        let select = |x: &Tensor| -> Result<Tensor> {
            Ok(x.index_select(&Tensor::new(positions, x.device())?, 0)?)
        };
        let table = |table: &RopeTable| -> Result<RopeTable> {
            Ok(RopeTable {
                cos: select(&table.cos)?,
                sin: select(&table.sin)?,
                pairs: table.pairs,
            })
        };
        Ok(Self {
            tables: self.tables.iter().map(table).collect::<Result<_>>()?,
            query_scale: self.query_scale.as_ref().map(select).transpose()?,
        })
    }

    /// The rows of all `parts`, one after the other.
    ///
    /// # Errors
    /// When they are of different models, or there is none.
    pub fn cat(parts: &[Self]) -> Result<Self> {
        let first = parts
            .first()
            .ok_or_else(|| Error::Windows("no positions to rotate".into()))?;
        let cat = |part: &dyn Fn(&Self) -> Tensor| -> Result<Tensor> {
            Ok(Tensor::cat(&parts.iter().map(part).collect::<Vec<_>>(), 0)?)
        };
        let table = |(i, table): (usize, &RopeTable)| -> Result<RopeTable> {
            Ok(RopeTable {
                cos: cat(&|part| part.tables[i].cos.clone())?,
                sin: cat(&|part| part.tables[i].sin.clone())?,
                pairs: table.pairs,
            })
        };
        let tables = first.tables.iter().enumerate().map(table);
        let query_scale = match first.query_scale {
            Some(_) => {
                let scales: Vec<Tensor> = parts
                    .iter()
                    .filter_map(|part| part.query_scale.clone())
                    .collect();
                Some(Tensor::cat(&scales, 0)?)
            }
            None => None,
        };
        Ok(Self {
            tables: tables.collect::<Result<_>>()?,
            query_scale,
        })
    }
}

impl RopeTable {
    /// Rotates the first channels of heads `[batch, heads, tokens, head_dim]`.
    fn rotate(&self, x: &Tensor) -> Result<Tensor> {
        let turned = 2 * self.cos.dim(1)?;
        let head_dim = x.dim(3)?;
        let rotate = |x: &Tensor| match self.pairs {
            Pairs::Halves => candle_nn::rotary_emb::rope(x, &self.cos, &self.sin),
            Pairs::Neighbours => candle_nn::rotary_emb::rope_i(x, &self.cos, &self.sin),
        };
        if turned == head_dim {
            return Ok(rotate(x)?);
        }
        let first = rotate(&x.narrow(3, 0, turned)?.contiguous()?)?;
        let rest = x.narrow(3, turned, head_dim - turned)?;
        Ok(Tensor::cat(&[&first, &rest], 3)?)
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
        if let Some(experts) = &self.experts {
            let mut expert = |id| experts.expert(id);
            let (batches, run) = (std::slice::from_ref(x), (rope, mixer));
            let outputs = MixturePass::through(self, batches, run, &mut expert, tap)?;
            // As many as batches.
            let output = outputs.and_then(|outputs| outputs.into_iter().next());
            return output.map_or_else(|| Ok(x.zeros_like()?), Ok);
        }
        let (batch, tokens, hidden) = x.dims3()?;
        let x = x.reshape((batch * tokens, hidden))?;
        let after_attention = self.after_attention(&x, (batch, tokens), rope, mixer, tap)?;
        let y = match &self.mlp.body {
            Some(mlp) => {
                let read = if self.parallel { &x } else { &after_attention };
                let input = self.mlp.input(read)?;
                self.observe(tap, Site::GateUp, &input)?;
                let neurons = mlp.neurons(&input)?;
                self.observe(tap, Site::Down, &neurons)?;
                (&after_attention + self.mlp.normed(mlp.down.forward(&neurons)?)?)?
            }
            None => self.mlp.without_body(after_attention)?,
        };
        self.scaled(y)?
            .reshape((batch, tokens, hidden))
            .map_err(Error::from)
    }

    fn observe(&self, tap: &mut dyn Tap, site: Site, input: &Tensor) -> Result<()> {
        tap.observe(self.layer, site, input)
            .map_err(|source| Error::Tap {
                layer: self.layer,
                source,
            })
    }

    /// `x`, `[batch * tokens, hidden]`, with what attention or a delta net adds.
    fn after_attention(
        &self,
        x: &Tensor,
        (batch, tokens): (usize, usize),
        rope: &RopeTables,
        mixer: &mut Mixer<'_>,
        tap: &mut dyn Tap,
    ) -> Result<Tensor> {
        let Some(body) = &self.attention.body else {
            return self.attention.without_body(x.clone());
        };
        let input = self.attention.input(x)?;
        self.observe(tap, Site::Qkv, &input)?;
        let heads = match body {
            TokenMixer::Attention(attention) => {
                attention.mix(&input, (batch, tokens), self.layer, rope, mixer)?
            }
            TokenMixer::DeltaNet(net) => net.mix(&input, tokens, self.layer, mixer)?,
        };
        self.observe(tap, Site::O, &heads)?;
        Ok((x + self.attention.normed(body.output().forward(&heads)?)?)?)
    }

    fn scaled(&self, y: Tensor) -> Result<Tensor> {
        Ok(match self.scalar {
            Some(scalar) => (y * scalar)?,
            None => y,
        })
    }

    /// Runs `x`, `[batch, tokens, hidden]`, up to what the experts read.
    pub(crate) fn first_half(
        &self,
        x: &Tensor,
        rope: &RopeTables,
        mixer: &mut Mixer<'_>,
        tap: &mut dyn Tap,
    ) -> Result<BetweenHalves> {
        let (batch, tokens, hidden) = x.dims3()?;
        let x = x.reshape((batch * tokens, hidden))?;
        let residual = self.after_attention(&x, (batch, tokens), rope, mixer, tap)?;
        let read = if self.parallel { &x } else { &residual };
        Ok(BetweenHalves {
            input: self.mlp.input(read)?,
            residual,
            shape: (batch, tokens, hidden),
        })
    }

    /// The block's output, from what its experts put out.
    pub(crate) fn second_half(&self, half: BetweenHalves, output: Tensor) -> Result<Tensor> {
        let y = (half.residual + self.mlp.normed(output)?)?;
        Ok(self.scaled(y)?.reshape(half.shape)?)
    }

    /// Bytes of its weights in memory: linears, norms and the experts that are loaded.
    pub fn bytes(&self) -> usize {
        let attention = self.attention.body.as_ref().map_or(0, TokenMixer::bytes);
        let norms = [
            &self.attention.before,
            &self.attention.after,
            &self.mlp.before,
            &self.mlp.after,
        ];
        let norms: usize = norms.into_iter().flatten().map(Norm::bytes).sum();
        let mlp = self.mlp.body.as_ref().map_or(0, Mlp::bytes);
        attention + norms + mlp + self.experts.as_ref().map_or(0, Moe::bytes)
    }

    /// A linear of the block; `None` where it has none.
    pub fn linear(&self, name: LinearName) -> Option<&Linear> {
        let (mixer, mlp) = (self.attention.body.as_ref(), self.mlp.body.as_ref());
        let shared = self.experts.as_ref().and_then(|e| e.shared.as_ref());
        let shared = shared.map(|shared| &shared.mlp);
        match name {
            name if name.is_attention() => mixer.and_then(|mixer| mixer.linear(name)),
            LinearName::Gate => mlp.and_then(|m| m.gate.as_ref()),
            LinearName::Up => mlp.map(|m| &m.up),
            LinearName::Down => mlp.map(|m| &m.down),
            LinearName::SharedGate => shared.and_then(|m| m.gate.as_ref()),
            LinearName::SharedUp => shared.map(|m| &m.up),
            LinearName::SharedDown => shared.map(|m| &m.down),
            _ => None,
        }
    }

    /// A linear of the block, to be changed.
    pub fn linear_mut(&mut self, name: LinearName) -> Option<&mut Linear> {
        let (mixer, mlp) = (self.attention.body.as_mut(), self.mlp.body.as_mut());
        let shared = self.experts.as_mut().and_then(|e| e.shared.as_mut());
        let shared = shared.map(|shared| &mut shared.mlp);
        match name {
            name if name.is_attention() => mixer.and_then(|mixer| mixer.linear_mut(name)),
            LinearName::Gate => mlp.and_then(|m| m.gate.as_mut()),
            LinearName::Up => mlp.map(|m| &mut m.up),
            LinearName::Down => mlp.map(|m| &mut m.down),
            LinearName::SharedGate => shared.and_then(|m| m.gate.as_mut()),
            LinearName::SharedUp => shared.map(|m| &mut m.up),
            LinearName::SharedDown => shared.map(|m| &mut m.down),
            _ => None,
        }
    }
}

impl Attention {
    /// From the input `[batch * tokens, hidden]` of q, k and v to the input of o_proj.
    fn mix(
        &self,
        x: &Tensor,
        (batch, tokens): (usize, usize),
        layer: usize,
        rope: &RopeTables,
        mixer: &mut Mixer<'_>,
    ) -> Result<Tensor> {
        let d = self.head_dim;
        let (mut q, k, v) = match &self.v {
            Some(v) => {
                let [q, k, v] = Linear::forward_all([&self.q, &self.k, v], x)?;
                (q, k, v)
            }
            None => {
                let [q, k] = Linear::forward_all([&self.q, &self.k], x)?;
                (q, k.clone(), k)
            }
        };
        let mut gate = None;
        if self.gated {
            let both = q.reshape((batch * tokens, self.heads(), 2, d))?;
            gate = Some(both.narrow(2, 1, 1)?.contiguous()?);
            q = both
                .narrow(2, 0, 1)?
                .reshape((batch * tokens, self.heads() * d))?;
        }
        // [batch * tokens, n * d] -> [batch, n, tokens, d]
        let split = |x: Tensor, norm: Option<&Norm>| -> Result<Tensor> {
            let whole = norm.filter(|norm| norm.width() != d);
            let x = match whole {
                Some(norm) => norm.forward(&x)?,
                None => x,
            };
            let x = x.reshape((batch, tokens, (), d))?;
            let x = match norm.filter(|_| whole.is_none()) {
                Some(norm) => norm.forward(&x)?,
                None => x,
            };
            let x = match self.clip {
                Some(clip) => x.clamp(-clip, clip)?,
                None => x,
            };
            Ok(x.transpose(1, 2)?.contiguous()?)
        };
        let rotation = self.rotation.map(|rotation| &rope.tables[rotation]);
        let rotate = |x: Tensor| match rotation {
            Some(table) => table.rotate(&x),
            None => Ok(x),
        };
        let mut q = rotate(split(q, self.q_norm.as_ref())?)?;
        if let Some(scale) = &rope.query_scale {
            q = q.broadcast_mul(scale)?;
        }
        let k = rotate(split(k, self.k_norm.as_ref())?)?;
        let v = split(v, self.v_norm.as_ref())?;
        let (scores, window) = (self.scores, self.sliding_window);
        let heads = match (&self.cache, &*mixer) {
            (Some(cache), Mixer::Windows) => decoded(cache, [&q, &k, &v], scores, window)?,
            _ => mixer.attend(layer, [&q, &k, &v], scores, window)?,
        };
        let heads = heads
            .transpose(1, 2)?
            .reshape((batch * tokens, self.heads() * d))?;
        match gate {
            Some(gate) => {
                let gate = gate.reshape((batch * tokens, self.heads() * d))?;
                Ok((heads * candle_nn::ops::sigmoid(&gate)?)?)
            }
            None => Ok(heads),
        }
    }
}
