//! The caches of one generation: a batch of sequences, all layers, one clock.
//!
//! A step is `begin(tokens)`, then `attend` once for each layer that has KV heads. The set appends the new keys and
//! values, attends, shows the policy what it asked for and lets it evict.

use crate::attention::{Geometry, expect_shape};
use crate::error::{Error, Result};
use crate::store::{Call, DeviceStore, HostStore, Store};
use candle_core::{DType, Device, Tensor};

/// Heads of one layer. Query head h reads KV head h / (`query_heads` / `kv_heads`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerShape {
    /// Query heads; a multiple of `kv_heads`.
    pub query_heads: usize,
    /// KV heads; 0 for a layer without attention, which is never attended.
    pub kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Tokens a query sees at most, itself included.
    pub sliding_window: Option<usize>,
}

/// One step of the clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Step {
    /// Logical position of the first new token: where RoPE starts.
    pub position: usize,
    /// New tokens.
    pub tokens: usize,
}

/// Everything a [`CacheSet`] held at one moment.
#[derive(Debug, Clone)]
pub struct Snapshot(CacheSet);

#[derive(Debug, Clone)]
struct Layer {
    shape: LayerShape,
    store: Box<dyn Store>,
    attended: bool,
}

/// The KV caches of all layers for one batch of sequences.
#[derive(Debug, Clone)]
pub struct CacheSet {
    layers: Vec<Layer>,
    batch: usize,
    dtype: DType,
    device: Device,
    logical: usize,
    step: Step,
}

impl CacheSet {
    /// Caches that keep every token, stored as `dtype` (f32, f16 or bf16) on `device`.
    ///
    /// # Errors
    /// Query heads that do not divide over the KV heads; other dtypes.
    pub fn full(
        layers: &[LayerShape],
        batch: usize,
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        let layers = layers
            .iter()
            .enumerate()
            .map(|(layer, &shape)| {
                Ok(Layer {
                    shape,
                    store: new_store(layer, shape, batch, dtype, device)?,
                    attended: true,
                })
            })
            .collect::<Result<_>>()?;
        Ok(Self {
            layers,
            batch,
            dtype,
            device: device.clone(),
            logical: 0,
            step: Step {
                position: 0,
                tokens: 0,
            },
        })
    }

    /// Starts a step of `tokens` new positions per sequence.
    ///
    /// # Errors
    /// No tokens, or a layer that was not attended in the step before.
    pub fn begin(&mut self, tokens: usize) -> Result<Step> {
        self.end()?;
        if tokens == 0 {
            return Err(Error::Step {
                layer: 0,
                what: "a step of no tokens",
            });
        }
        self.step = Step {
            position: self.logical,
            tokens,
        };
        self.logical += tokens;
        for layer in &mut self.layers {
            layer.attended = layer.shape.kv_heads == 0;
        }
        Ok(self.step)
    }

    /// As [`begin`](Self::begin), for callers that count positions themselves.
    ///
    /// # Errors
    /// As `begin`; and [`Error::NotReset`] when `position` is not where this cache stands, as when a new
    /// sequence starts at 0 in a cache that still holds another.
    pub fn begin_at(&mut self, position: usize, tokens: usize) -> Result<Step> {
        if position != self.logical {
            return Err(Error::NotReset { held: self.logical });
        }
        self.begin(tokens)
    }

    /// Checks that every layer took part in the step; `begin` does so too.
    ///
    /// # Errors
    /// [`Error::Step`] with the first layer that was not attended.
    pub fn end(&mut self) -> Result<()> {
        match self.layers.iter().position(|layer| !layer.attended) {
            None => Ok(()),
            Some(layer) => Err(Error::Step {
                layer,
                what: "not attended in this step",
            }),
        }
    }

    /// Appends the step's `k` and `v` `[B, Hkv, T, d]` (keys after RoPE) to the layer's cache and attends `q` `[B, Hq, T, d]` over
    /// what is cached: causal among the new tokens, within the sliding window where the layer has one. Returns `[B, Hq, T, d]` in the
    /// dtype of `q`.
    ///
    /// # Errors
    /// Shapes or devices that do not fit, a layer attended twice or outside a step, non-finite weights.
    pub fn attend(
        &mut self,
        layer: usize,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        scale: f64,
    ) -> Result<Tensor> {
        let layers = self.layers.len();
        let at = self.layers.get_mut(layer).ok_or(Error::Layer {
            layer,
            layers,
            without_heads: false,
        })?;
        let LayerShape {
            query_heads,
            kv_heads,
            head_dim,
            sliding_window,
        } = at.shape;
        if kv_heads == 0 {
            return Err(Error::Layer {
                layer,
                layers,
                without_heads: true,
            });
        }
        if at.attended {
            return Err(Error::Step {
                layer,
                what: "attended twice, or before begin",
            });
        }
        let tokens = self.step.tokens;
        for (what, tensor, heads) in [
            ("q", q, query_heads),
            ("k", k, kv_heads),
            ("v", v, kv_heads),
        ] {
            expect_shape(what, tensor, &[self.batch, heads, tokens, head_dim])?;
            Error::check_device(what, tensor.device(), &self.device)?;
        }
        let position = self.step.position as u32;
        at.store.append(k, v, position, &[])?;
        let call = Call {
            scale,
            position,
            sliding_window,
            export: None,
        };
        let (out, _) = at.store.attend(q, &call)?.map_err(|row| Error::NonFinite {
            layer,
            sequence: row / kv_heads,
            head: row % kv_heads,
        })?;
        at.attended = true;
        Ok(out)
    }

    /// Positions seen so far, evicted or not.
    pub fn logical_len(&self) -> usize {
        self.logical
    }

    /// Tokens that `layer` holds per sequence and head.
    pub fn physical_len(&self, layer: usize) -> usize {
        self.layers.get(layer).map_or(0, |layer| layer.store.len())
    }

    /// Sequences in the batch.
    pub fn batch(&self) -> usize {
        self.batch
    }

    /// Bytes that the keys and values of all layers occupy, as allocated.
    pub fn bytes(&self) -> usize {
        self.layers.iter().map(|layer| layer.store.bytes()).sum()
    }

    /// Bytes kept beside keys and values: positions and what the policies remember.
    pub fn state_bytes(&self) -> usize {
        self.layers.iter().map(|layer| layer.store.id_bytes()).sum()
    }

    /// Forgets everything and frees the storage; the set is as new.
    pub fn reset(&mut self) {
        for layer in &mut self.layers {
            layer.store.clear();
            layer.attended = true;
        }
        self.logical = 0;
        self.step = Step {
            position: 0,
            tokens: 0,
        };
    }

    /// A copy of everything, to return to after speculative tokens.
    pub fn snapshot(&self) -> Snapshot {
        Snapshot(self.clone())
    }

    /// Returns to `snapshot`.
    ///
    /// # Errors
    /// A snapshot of a set with other layers, batch, dtype or device.
    pub fn restore(&mut self, snapshot: &Snapshot) -> Result<()> {
        let other = &snapshot.0;
        let shapes = |set: &Self| {
            set.layers
                .iter()
                .map(|layer| layer.shape)
                .collect::<Vec<_>>()
        };
        let problem = if shapes(self) != shapes(other) {
            "other layers"
        } else if self.batch != other.batch {
            "another batch size"
        } else if self.dtype != other.dtype {
            "another dtype"
        } else if !self.device.same_device(&other.device) {
            "another device"
        } else {
            *self = other.clone();
            return Ok(());
        };
        Err(Error::Snapshot { problem })
    }
}

fn new_store(
    layer: usize,
    shape: LayerShape,
    batch: usize,
    dtype: DType,
    device: &Device,
) -> Result<Box<dyn Store>> {
    let LayerShape {
        query_heads,
        kv_heads,
        head_dim,
        ..
    } = shape;
    if kv_heads > 0 && (query_heads == 0 || query_heads % kv_heads != 0) {
        return Err(Error::HeadGroups {
            layer,
            query_heads,
            kv_heads,
        });
    }
    let rows = batch * kv_heads;
    let geometry = Geometry {
        group: query_heads.checked_div(kv_heads).unwrap_or(1),
        head_dim,
    };
    Ok(match (dtype, device) {
        (DType::F32, Device::Cpu) => Box::new(HostStore::<f32>::new(rows, geometry)),
        (DType::F16, Device::Cpu) => Box::new(HostStore::<half::f16>::new(rows, geometry)),
        (DType::BF16, Device::Cpu) => Box::new(HostStore::<half::bf16>::new(rows, geometry)),
        (DType::F32 | DType::F16 | DType::BF16, device) => {
            Box::new(DeviceStore::new(rows, geometry, dtype, device))
        }
        (got, _) => return Err(Error::DType { got }),
    })
}
