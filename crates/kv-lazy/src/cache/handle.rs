//! The cache of one attention layer, with the calls of candle-nn's `KvCache`.

use super::{CacheSet, LayerShape, Snapshot};
use crate::attention::Scores;
use crate::error::{Error, Result};
use crate::policy::{CacheConfig, Phase};
use candle_core::{DType, Device, Tensor};
use std::sync::Arc;

/// The cache of one layer: a field of an attention block, in place of candle-nn's `KvCache` or `ConcatKvCache`.
///
/// [`append`](Self::append) is what those have: it returns the keys and values to attend, and admits every policy that needs neither weights nor queries.
/// [`attend`](Self::attend) computes the attention as well, which serves all policies and reads quantised storage as it is. Batch, heads, dtype and device are those of the first call. The first
/// call of several tokens is the prompt. Cloning copies everything.
#[derive(Debug, Clone)]
pub struct LayerCache {
    config: Arc<CacheConfig>,
    layer: usize,
    set: Option<Box<CacheSet>>,
    bottom_right: bool,
    sliding_window: Option<usize>,
    append_only: bool,
    /// Positions of the prompt, where they are known before.
    prompt: Option<usize>,
    /// The call that is in use.
    path: Option<Path>,
    /// Tokens that the last call attended to or returned.
    visible: usize,
}

/// Who computes the attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Path {
    Append,
    Attend,
}

/// What a [`LayerCache`] held at one moment.
#[derive(Debug, Clone)]
pub struct LayerSnapshot {
    layer: usize,
    held: Option<Held>,
}

/// A cache after its first call.
#[derive(Debug, Clone)]
struct Held {
    set: Snapshot,
    path: Option<Path>,
    visible: usize,
}

/// A causal mask of `tokens` new tokens, the last of `len`: `[tokens, len]`, 1 where a token may not look.
///
/// # Errors
/// When the device refuses.
pub fn bottom_right_mask(
    tokens: usize,
    len: usize,
    device: &Device,
) -> candle_core::Result<Tensor> {
    let old = len.saturating_sub(tokens);
    let mask: Vec<u8> = (0..tokens)
        .flat_map(|i| (0..len).map(move |j| u8::from(j > old + i)))
        .collect();
    Tensor::from_vec(mask, (tokens, len), device)
}

impl LayerCache {
    /// A cache for the layer of this index, which decides budgets per layer and draws.
    ///
    /// # Errors
    /// Settings out of range, a budget below sinks + recent + 1, a layer without budget, storage or rotation of its own where these are given per layer.
    pub fn new(config: &CacheConfig, layer: usize) -> Result<Self> {
        config.check()?;
        let budget = config.layer_budget(layer)?;
        config.storage_of(layer)?;
        if !config.keeps_all() {
            let policy = config.build(budget)?;
            if policy.needs().rotary && config.rotary_of(layer).is_none() {
                return Err(Error::NeedUnavailable {
                    policy: config.decode.to_string(),
                    need: "the model's rotation (`rotary`)",
                    path: "this configuration",
                });
            }
            if let Some(rotary) = config.rotary_of(layer) {
                policy.admits_rotary(layer, rotary)?;
            }
            crate::policy::Evictor::new(policy, budget, Default::default())?;
        }
        Ok(Self {
            config: Arc::new(config.clone()),
            layer,
            set: None,
            bottom_right: false,
            sliding_window: None,
            append_only: false,
            prompt: None,
            path: None,
            visible: 0,
        })
    }

    /// Checks that the cache can serve `batch` sequences of a layer of this shape, which the first call would find out otherwise: heads that the storage does not divide, statistics or a rotation of other
    /// heads, a device without what the configuration needs.
    ///
    /// # Errors
    /// As [`CacheSet::new`].
    pub fn with_shape(
        self,
        batch: usize,
        shape: LayerShape,
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        let shape = LayerShape {
            sliding_window: self.sliding_window.or(shape.sliding_window),
            ..shape
        };
        let of = (batch, dtype, device);
        CacheSet::of_layer(self.layer, shape, of, &self.config, self.append_only)?;
        Ok(Self {
            sliding_window: shape.sliding_window,
            ..self
        })
    }

    /// The prompt has so many positions, in however many calls of however many tokens. Otherwise the prompt ends with the first call of a single token that is not the very
    /// first.
    pub fn with_prompt_len(mut self, positions: usize) -> Self {
        self.prompt = Some(positions);
        self
    }

    /// The same for [`append`](Self::append) alone.
    ///
    /// # Errors
    /// [`Error::NeedUnavailable`] for a policy that needs weights or queries.
    pub fn for_append(mut self) -> Result<Self> {
        self.check_append()?;
        self.append_only = true;
        Ok(self)
    }

    /// Each token attends the newest `window` positions, itself included, as in the local layers of Mistral and Gemma. [`attend`](Self::attend) masks by it;
    /// both calls drop what no later token can attend.
    ///
    /// # Errors
    /// [`Error::Setting`] for a window of 0.
    pub fn with_sliding_window(mut self, window: usize) -> Result<Self> {
        if window == 0 {
            return Err(Error::Setting {
                name: "sliding_window",
                value: "0".into(),
                expected: "at least 1 position",
            });
        }
        self.sliding_window = Some(window);
        Ok(self)
    }

    /// The caller aligns causal masks to the last key, as flash attention and [`bottom_right_mask`] do, and not to the position: then [`append`](Self::append) takes
    /// several tokens also after an eviction. [`mask`](Self::mask) makes such a mask of the last call.
    pub fn with_bottom_right_masks(mut self) -> Self {
        self.bottom_right = true;
        self
    }

    fn check_append(&self) -> Result<()> {
        if self.config.keeps_all() {
            return Ok(());
        }
        let policy = self.config.build(self.config.layer_budget(self.layer)?)?;
        match policy.needs().attention() {
            None => Ok(()),
            Some(need) => Err(Error::NeedUnavailable {
                policy: self.config.decode.to_string(),
                need,
                path: "LayerCache::append",
            }),
        }
    }

    /// The set for tensors like these, made at the first call.
    fn set(&mut self, path: Path, query_heads: Option<usize>, k: &Tensor) -> Result<&mut CacheSet> {
        if self.path.is_some_and(|held| held != path) || self.append_only && path == Path::Attend {
            return Err(Error::Step {
                layer: self.layer,
                what: "append and attend on the same cache",
            });
        }
        if self.set.is_none() {
            let (batch, kv_heads, _, head_dim) = k.dims4()?;
            let shape = LayerShape {
                query_heads: query_heads.unwrap_or(kv_heads),
                kv_heads,
                head_dim,
                sliding_window: self.sliding_window,
            };
            let dtype = match k.dtype() {
                dtype @ (DType::F32 | DType::F16 | DType::BF16) => dtype,
                got => return Err(Error::DType { got }),
            };
            let of = (batch, dtype, k.device());
            let external = path == Path::Append;
            if external {
                self.check_append()?;
            }
            let set = CacheSet::of_layer(self.layer, shape, of, &self.config, external)?;
            (self.set, self.path) = (Some(Box::new(set)), Some(path));
        }
        Ok(self.set.as_deref_mut().expect("made above"))
    }

    /// Appends `k` and `v` `[B, Hkv, T, d]`, keys after RoPE, and returns the keys and values `[B, Hkv, n, d]` that the step's queries attend; of
    /// several tokens the new ones are the last T, for which [`mask`](Self::mask) makes the causal mask, and a single one may stand in the place of a token that the policy gave up for it (`streaming`). The policy evicts afterwards, for the next step. Of floats the tensors are views; of quantised storage they are
    /// copies.
    ///
    /// # Errors
    /// A policy that needs weights or queries; shapes, dtypes or devices that do not fit; several tokens after an eviction unless masks are
    /// [aligned to the last key](Self::with_bottom_right_masks).
    pub fn append(&mut self, k: &Tensor, v: &Tensor) -> candle_core::Result<(Tensor, Tensor)> {
        let tokens = k.dim(2)?;
        let (layer, bottom_right, prompt) = (self.layer, self.bottom_right, self.prompt);
        let set = self.set(Path::Append, None, k)?;
        if tokens > 1 && !bottom_right && set.physical_len(0) < set.logical_len() {
            return Err(Error::Step {
                layer,
                what: "several tokens appended after an eviction, when a causal mask made for positions is wrong; use `with_bottom_right_masks`",
            }
            .into());
        }
        set.begin_within(prompt, tokens)?;
        let (k, v) = set.extend(0, k, v)?;
        self.visible = k.dim(2)?;
        Ok((k, v))
    }

    /// The causal mask of the `tokens` that came with the last call, the last of the keys which that call returned: `[tokens, n]`, 1 where a token may not look, as
    /// [`bottom_right_mask`]. None for a single token, which may look everywhere.
    ///
    /// # Errors
    /// When the device refuses.
    pub fn mask(&self, tokens: usize) -> candle_core::Result<Option<Tensor>> {
        match &self.set {
            Some(set) if tokens > 1 => {
                Ok(Some(bottom_right_mask(tokens, self.visible, &set.device)?))
            }
            _ => Ok(None),
        }
    }

    /// Appends `k` and `v` `[B, Hkv, T, d]` and attends `q` `[B, Hq, T, d]`: replaces cache, `repeat_kv`, mask and softmax. `scores` is the factor on q·k, usually 1/√d.
    ///
    /// # Errors
    /// Shapes or devices that do not fit, non-finite weights.
    pub fn attend(
        &mut self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        scores: impl Into<Scores>,
    ) -> candle_core::Result<Tensor> {
        let (heads, prompt) = (q.dim(1)?, self.prompt);
        let set = self.set(Path::Attend, Some(heads), k)?;
        set.begin_within(prompt, k.dim(2)?)?;
        Ok(set.attend(0, q, k, v, scores)?)
    }

    /// Positions so far, evicted or not: where RoPE goes on. The name is that of candle-nn.
    pub fn current_seq_len(&self) -> usize {
        self.set.as_deref().map_or(0, CacheSet::logical_len)
    }

    /// Tokens held per sequence and head: what masks are made for.
    pub fn len(&self) -> usize {
        self.set.as_deref().map_or(0, |set| set.physical_len(0))
    }

    /// Whether nothing is held.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Positions that a KV head holds, in physical order.
    pub fn positions(&self, sequence: usize, head: usize) -> &[u32] {
        self.set
            .as_deref()
            .map_or(&[], |set| set.positions(0, sequence, head))
    }

    /// Bytes of keys and values, as allocated.
    pub fn bytes(&self) -> usize {
        self.set.as_deref().map_or(0, CacheSet::bytes)
    }

    /// Bytes of the policy's state and of positions.
    pub fn state_bytes(&self) -> usize {
        let of = |set: &CacheSet| set.state_bytes() + set.position_bytes();
        self.set.as_deref().map_or(0, of)
    }

    /// Whether generation has begun: a step of one token after the prompt.
    pub fn is_decoding(&self) -> bool {
        let decodes = |set: &CacheSet| set.clock.phase == Phase::Decode;
        self.set.as_deref().is_some_and(decodes)
    }

    /// The keys held, `[B, Hkv, n, d]`; none before the first call. The name is that of candle-nn.
    ///
    /// # Errors
    /// When the device refuses.
    pub fn k(&self) -> candle_core::Result<Option<Tensor>> {
        Ok(self.tensors()?.map(|(k, _)| k))
    }

    /// The values held, `[B, Hkv, n, d]`; none before the first call. The name is that of candle-nn.
    ///
    /// # Errors
    /// When the device refuses.
    pub fn v(&self) -> candle_core::Result<Option<Tensor>> {
        Ok(self.tensors()?.map(|(_, v)| v))
    }

    fn tensors(&self) -> Result<Option<(Tensor, Tensor)>> {
        self.set.as_deref().map(|set| set.tensors(0)).transpose()
    }

    /// Forgets everything and frees the storage. The next call may have another batch, and be the other of
    /// [`append`](Self::append) and [`attend`](Self::attend).
    pub fn reset(&mut self) {
        (self.set, self.path, self.visible) = (None, None, 0);
    }

    /// A copy of everything, to return to.
    pub fn snapshot(&self) -> LayerSnapshot {
        let held = self.set.as_deref().map(|set| Held {
            set: set.snapshot(),
            path: self.path,
            visible: self.visible,
        });
        LayerSnapshot {
            layer: self.layer,
            held,
        }
    }

    /// Returns to `snapshot`.
    ///
    /// # Errors
    /// A snapshot of a cache of another layer, shape, sliding window or configuration; one that was attended, into a cache [for `append`](Self::for_append).
    pub fn restore(&mut self, snapshot: &LayerSnapshot) -> Result<()> {
        if snapshot.layer != self.layer {
            return Err(Error::Snapshot {
                problem: "another layer",
            });
        }
        let Some(held) = &snapshot.held else {
            self.reset();
            return Ok(());
        };
        let windows = held.set.0.shapes().into_iter().map(|s| s.sliding_window);
        let problem = if windows
            .into_iter()
            .any(|window| window != self.sliding_window)
        {
            "another sliding window"
        } else if self.append_only && held.path == Some(Path::Attend) {
            "attention computed by the cache, where this one is for `append`"
        } else if held.set.0.config.as_ref() != Some(&*self.config) {
            "another policy, budget or storage"
        } else {
            match &mut self.set {
                Some(set) => set.restore(&held.set)?,
                None => self.set = Some(Box::new(held.set.0.clone())),
            }
            (self.path, self.visible) = (held.path, held.visible);
            return Ok(());
        };
        Err(Error::Snapshot { problem })
    }
}
