//! The caches of one generation: a batch of sequences, all layers, one clock.
//!
//! A step is `begin(tokens)`, then `attend` once for each layer that has KV heads. The set appends the new keys and
//! values, attends, gives the policy the weights it needs and lets it evict.

mod build;
mod cost;
mod handle;
mod layer;
mod queries;
mod recurrent;
mod sinks;

pub use handle::{LayerCache, LayerSnapshot, bottom_right_mask};

use crate::attention::{Scores, expect_shape};
use crate::error::{Error, Result};
use crate::policy::{CacheConfig, Clock, Phase, count};
#[cfg(feature = "trace")]
use crate::trace::Recorder;
use candle_core::{DType, Device, Tensor};
use layer::Layer;

/// Heads of one layer. Query head h reads KV head h / (`query_heads` / `kv_heads`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerShape {
    /// Query heads; a multiple of `kv_heads`.
    pub query_heads: usize,
    /// KV heads; 0 for a layer without attention, which is never attended. It may have a [state](CacheSet::state).
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

/// The KV caches of all layers for one batch of sequences.
///
/// After an error in the middle of a step the layers before have taken the step and the others have not: [`restore`](Self::restore) a snapshot or
/// [`reset`](Self::reset) before going on.
#[derive(Debug, Clone)]
pub struct CacheSet {
    layers: Vec<Layer>,
    batch: usize,
    dtype: DType,
    device: Device,
    /// What it was built from; none for policies of the caller's own.
    config: Option<CacheConfig>,
    clock: Clock,
    #[cfg(feature = "trace")]
    recorder: Option<Recorder>,
    /// Bytes of keys and values now, and the most there were.
    held: usize,
    peak: usize,
}

/// A clock before the first step.
const START: Clock = Clock {
    next: 0,
    step: 0,
    tokens: 0,
    prompt: 0,
    phase: Phase::Prefill,
};

impl CacheSet {
    /// Starts a step of `tokens` new positions per sequence. Steps are the prompt until the first step of a single token that is not
    /// the very first; from then on they are generation.
    ///
    /// # Errors
    /// No tokens, or a layer that was not attended in the step before.
    pub fn begin(&mut self, tokens: usize) -> Result<Step> {
        let prompt = self.clock.phase == Phase::Prefill && (tokens > 1 || self.clock.next == 0);
        self.start(tokens, prompt)
    }

    /// Starts a step that belongs to the prompt, whatever its length: for prompts read in chunks, where the last may be a single
    /// token.
    ///
    /// # Errors
    /// As [`begin`](Self::begin); a prompt after generation has begun.
    pub fn begin_prompt(&mut self, tokens: usize) -> Result<Step> {
        if self.clock.phase == Phase::Decode {
            return Err(Error::Step {
                layer: self.first_layer(),
                what: "a prompt after generation has begun",
            });
        }
        self.start(tokens, true)
    }

    /// As [`begin`](Self::begin) where the prompt is known to have so many positions.
    fn begin_within(&mut self, prompt: Option<usize>, tokens: usize) -> Result<Step> {
        match prompt {
            None => self.begin(tokens),
            Some(prompt) => self.start(tokens, self.logical_len() < prompt),
        }
    }

    /// As [`begin`](Self::begin), for callers that count positions themselves.
    ///
    /// # Errors
    /// As `begin`; and [`Error::NotReset`] when `position` is not where this cache stands, as when a new
    /// sequence starts at 0 in a cache that still holds another.
    pub fn begin_at(&mut self, position: usize, tokens: usize) -> Result<Step> {
        if position != self.logical_len() {
            return Err(Error::NotReset {
                held: self.logical_len(),
            });
        }
        self.begin(tokens)
    }

    fn start(&mut self, tokens: usize, prompt: bool) -> Result<Step> {
        self.end()?;
        if tokens == 0 {
            return Err(Error::Step {
                layer: self.first_layer(),
                what: "a step of no tokens",
            });
        }
        let position = self.logical_len();
        let next = count(position.saturating_add(tokens));
        if next == u32::MAX {
            return Err(Error::Step {
                layer: self.first_layer(),
                what: "more positions than 4294967294",
            });
        }
        let clock = &mut self.clock;
        clock.tokens = tokens as u32;
        clock.next = next;
        if prompt {
            clock.prompt = clock.next;
        } else {
            clock.phase = Phase::Decode;
            clock.step += clock.tokens;
        }
        for layer in &mut self.layers {
            layer.attended = layer.shape.kv_heads == 0 && layer.state.is_empty();
        }
        Ok(Step { position, tokens })
    }

    /// Index of the set's first layer.
    fn first_layer(&self) -> usize {
        self.layers.first().map_or(0, |layer| layer.index)
    }

    /// Checks that every layer took part in the step; `begin` does so too.
    ///
    /// # Errors
    /// [`Error::Step`] with the first layer that was not attended.
    pub fn end(&mut self) -> Result<()> {
        match self.layers.iter().position(|layer| !layer.attended) {
            None => Ok(()),
            Some(layer) => Err(Error::Step {
                layer: self.layers[layer].index,
                what: "not attended in this step",
            }),
        }
    }

    /// Appends the step's `k` and `v` `[B, Hkv, T, d]` (keys after RoPE) to the layer's cache and attends `q` `[B, Hq, T, d]` over
    /// what is cached: causal among the new tokens, within the sliding window where the layer has one. Returns `[B, Hq, T, d]` in the
    /// dtype of `q`. `scores` is the factor on q·k, and the cap where the model has one. The policy evicts after the attention.
    ///
    /// # Errors
    /// Shapes or devices that do not fit, a layer attended twice or outside a step, non-finite weights.
    pub fn attend(
        &mut self,
        layer: usize,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        scores: impl Into<Scores>,
    ) -> Result<Tensor> {
        self.attend_shown(layer, [q, k, v], scores.into(), |_| ())
    }

    /// As [`attend`](Self::attend); `show` is given the set when the step's tokens have joined and before they are attended to.
    pub(crate) fn attend_shown(
        &mut self,
        layer: usize,
        [q, k, v]: [&Tensor; 3],
        scores: Scores,
        show: impl FnOnce(&Self),
    ) -> Result<Tensor> {
        self.check(layer, [("q", q), ("k", k), ("v", v)])?;
        #[cfg(feature = "trace")]
        if let Some(recorder) = &mut self.recorder {
            recorder.push(layer, q, k, v, scores)?;
        }
        let clock = self.clock;
        self.append(layer, k, v)?;
        show(self);
        let at = &mut self.layers[layer];
        let out = at.attend(q, scores, &clock)?;
        at.evict(&clock)?;
        self.finish(layer)?;
        Ok(out)
    }

    /// As [`attend`](Self::attend) for a step whose output is not wanted, as when a prompt's queries, keys and values are known: attention is
    /// computed only where the policy needs its weights.
    ///
    /// # Errors
    /// As [`attend`](Self::attend).
    pub fn feed(
        &mut self,
        layer: usize,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        scores: impl Into<Scores>,
    ) -> Result<()> {
        self.check(layer, [("q", q), ("k", k), ("v", v)])?;
        let clock = self.clock;
        self.append(layer, k, v)?;
        let at = &mut self.layers[layer];
        at.feed(q, scores.into(), &clock)?;
        at.evict(&clock)?;
        self.finish(layer)
    }

    /// Keys and values of a layer as they are held, widened where they are quantised.
    pub(crate) fn tensors(&self, layer: usize) -> Result<(Tensor, Tensor)> {
        self.layers[layer].store.tensors(self.batch)
    }

    /// Appends the step's `k` and `v` `[B, Hkv, T, d]` and returns all keys and values `[B, Hkv, n, d]` that the step's queries
    /// are to attend, for attention computed elsewhere. Of a step of several tokens the new ones are the last T of n, and a causal mask's offset is n − T; a single one needs no mask, and
    /// where a policy gives up a token for it (`streaming`) it stands in that token's place. The policy evicts afterwards.
    ///
    /// # Errors
    /// As [`attend`](Self::attend).
    pub fn extend(&mut self, layer: usize, k: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
        self.check(layer, [("k", k), ("v", v)])?;
        let (clock, batch) = (self.clock, self.batch);
        self.layers[layer].check_elsewhere(|| format!("of layer {layer}"))?;
        self.append(layer, k, v)?;
        let at = &mut self.layers[layer];
        let tensors = at.store.tensors(batch)?;
        at.evict(&clock)?;
        self.finish(layer)?;
        Ok(tensors)
    }

    /// Appends to a layer; the step holds the most bytes now, before the layer evicts.
    fn append(&mut self, layer: usize, k: &Tensor, v: &Tensor) -> Result<()> {
        let at = &mut self.layers[layer];
        at.append(k, v, &self.clock)?;
        self.account(layer);
        self.peak = self.peak.max(self.held);
        Ok(())
    }

    /// The layer has done its step.
    fn finish(&mut self, layer: usize) -> Result<()> {
        self.account(layer);
        let at = &mut self.layers[layer];
        let most = at.settle()?;
        if most > 0 {
            self.peak = self.peak.max(self.held - at.bytes + most);
            self.account(layer);
        }
        self.layers[layer].attended = true;
        Ok(())
    }

    /// Takes the layer's bytes as they are now into the sum over all.
    fn account(&mut self, layer: usize) {
        let at = &mut self.layers[layer];
        let bytes = at.store.bytes();
        self.held = self.held - at.bytes + bytes;
        at.bytes = bytes;
    }

    /// Checks that the layer awaits its turn and that the step's tensors fit it.
    fn check<const N: usize>(
        &self,
        layer: usize,
        tensors: [(&'static str, &Tensor); N],
    ) -> Result<()> {
        let layers = self.layers.len();
        let at = self.layers.get(layer).ok_or(Error::Layer {
            layer,
            layers,
            without_heads: false,
        })?;
        let LayerShape {
            query_heads,
            kv_heads,
            head_dim,
            ..
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
                layer: at.index,
                what: "attended twice, or before begin",
            });
        }
        for (what, tensor) in tensors {
            let heads = if what == "q" { query_heads } else { kv_heads };
            let tokens = self.clock.tokens as usize;
            expect_shape(what, tensor, &[self.batch, heads, tokens, head_dim])?;
            Error::check_device(what, tensor.device(), &self.device)?;
        }
        Ok(())
    }

    /// Lets `recorder` keep the queries, keys and values of all following steps.
    ///
    /// # Errors
    /// A batch of more than one sequence, or a recorder handed over in mid-sequence.
    #[cfg(feature = "trace")]
    pub fn record(&mut self, recorder: Recorder) -> Result<()> {
        if self.batch != 1 {
            return Err(Error::Setting {
                name: "batch",
                value: self.batch.to_string(),
                expected: "1 while recording",
            });
        }
        if self.clock.next > 0 {
            return Err(Error::NotReset {
                held: self.logical_len(),
            });
        }
        self.recorder = Some(recorder);
        Ok(())
    }

    /// Takes the recorder back, with what it holds.
    #[cfg(feature = "trace")]
    pub fn take_recorder(&mut self) -> Option<Recorder> {
        self.recorder.take()
    }

    /// Measures the time that policies take from now on.
    #[cfg(feature = "trace")]
    pub(crate) fn measure_policies(&mut self) {
        self.layers.iter_mut().for_each(Layer::measure_policy);
    }

    /// The time that policies took while it was measured.
    #[cfg(feature = "trace")]
    pub(crate) fn policy_time(&self) -> std::time::Duration {
        self.layers.iter().map(Layer::policy_time).sum()
    }

    /// Positions seen so far, evicted or not: where RoPE goes on.
    pub fn logical_len(&self) -> usize {
        self.clock.next as usize
    }

    /// Positions of the prompt.
    pub fn prompt_len(&self) -> usize {
        self.clock.prompt as usize
    }

    /// Tokens that `layer` holds per sequence and head; the most of any where heads share their budgets.
    pub fn physical_len(&self, layer: usize) -> usize {
        self.layers.get(layer).map_or(0, Layer::physical_len)
    }

    /// Logical positions that a KV head of `layer` holds, in physical order.
    pub fn positions(&self, layer: usize, sequence: usize, head: usize) -> &[u32] {
        let Some(at) = self.layers.get(layer) else {
            return &[];
        };
        if head >= at.shape.kv_heads || sequence >= self.batch {
            return &[];
        }
        at.store.ids(sequence * at.shape.kv_heads + head)
    }

    /// Shapes of all layers.
    pub fn shapes(&self) -> Vec<LayerShape> {
        self.layers.iter().map(|layer| layer.shape).collect()
    }

    /// Sequences in the batch.
    pub fn batch(&self) -> usize {
        self.batch
    }

    /// Bytes that the keys and values of all layers occupy, as allocated.
    pub fn bytes(&self) -> usize {
        self.layers.iter().map(|layer| layer.store.bytes()).sum()
    }

    /// The most bytes that keys and values of all layers have occupied since the set was new or [reset](Self::reset), within steps
    /// too: after a layer has appended and before it evicts. What the allocator holds while it moves a row is not counted.
    pub fn peak_bytes(&self) -> usize {
        self.peak
    }

    /// Bytes that the policies remember beside keys and values, and those of the [states](Self::state) of layers without.
    pub fn state_bytes(&self) -> usize {
        self.layers.iter().map(Layer::state_bytes).sum()
    }

    /// Bytes of the tokens' positions, which every cache keeps: 4 per token, sequence and KV head.
    pub fn position_bytes(&self) -> usize {
        self.layers.iter().map(|layer| layer.store.id_bytes()).sum()
    }

    /// Forgets everything and frees the storage; the set is as new. A recorder stays, with what it holds.
    pub fn reset(&mut self) {
        self.layers.iter_mut().for_each(Layer::reset);
        self.clock = START;
        (self.held, self.peak) = (0, 0);
    }

    /// A copy of everything, to return to after speculative tokens.
    pub fn snapshot(&self) -> Snapshot {
        Snapshot(Self {
            layers: self.layers.clone(),
            batch: self.batch,
            dtype: self.dtype,
            device: self.device.clone(),
            config: self.config.clone(),
            clock: self.clock,
            #[cfg(feature = "trace")]
            recorder: None,
            held: self.held,
            peak: self.peak,
        })
    }

    /// Returns to `snapshot`. A recorder cannot go back and is dropped.
    ///
    /// # Errors
    /// A snapshot of a set with other layers, batch, dtype, device, policy, budget or storage.
    pub fn restore(&mut self, snapshot: &Snapshot) -> Result<()> {
        let other = &snapshot.0;
        let problem = if self.shapes() != other.shapes() {
            "other layers"
        } else if self.batch != other.batch {
            "another batch size"
        } else if self.dtype != other.dtype {
            "another dtype"
        } else if !self.device.same_device(&other.device) {
            "another device"
        } else if self.config != other.config
            || (self.layers.iter().zip(&other.layers)).any(|(a, b)| !a.is_like(b))
        {
            "another policy, budget or storage"
        } else {
            *self = other.clone();
            return Ok(());
        };
        Err(Error::Snapshot { problem })
    }
}
