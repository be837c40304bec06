//! Which tokens to keep: policies on plain slices, no tensors.
//!
//! A [`Policy`] keeps some state per token and gives every cached token a [`Score`]; its [`Rule`] says when to
//! evict and what is never evicted. The [`Evictor`] turns both into a [`Plan`], the one place where tokens are chosen. Combinators
//! change the rule ([`EvictEvery`], [`Protect`]), the score ([`ValueGuard`]) or the policy by phase ([`PerPhase`]).
//!
//! A policy object serves one layer of one sequence: a single KV head, or all of them where it [needs](Needs::all_heads) that. Weights arrive reduced over the query heads that share a
//! KV head.
//!
//! A new policy is a file here with its `Settings`, and a line in `config.rs` that gives it a name.

mod activation;
mod config;
mod draw;
pub mod dropkv;
mod every;
mod evictor;
pub mod full;
pub mod h2o;
pub mod keydiff;
pub mod knorm;
pub mod lagkv;
pub mod lazy;
mod lowest;
#[cfg(feature = "trace")]
pub mod oracle;
pub mod periodic;
mod phase;
mod protect;
pub mod r_kv;
pub mod raas;
pub mod random;
mod rule;
pub mod scissorhands;
pub mod snapkv;
pub mod streaming;
pub mod tova;
pub mod tri_attention;
mod value_guard;
pub mod vase;
mod window;

pub use activation::Threshold;
#[cfg(feature = "trace")]
pub(crate) use config::quarter;
pub use config::{CacheConfig, Evicts, NAMES, PolicyConfig, Positions};
pub use every::EvictEvery;
pub use evictor::{Evictor, Plan};
pub use phase::PerPhase;
pub use protect::Protect;
pub use rule::{Budget, Prompt, Rule, Trigger};
pub use value_guard::{Outlier, ValueGuard};

use crate::LayerShape;
use crate::attention::{WeightKind, WeightKinds};
use crate::error::Result;
use crate::rotary::Rotary;
use crate::store::Relocation;
use std::borrow::Cow;
use std::ops::Range;

/// Whether a step belongs to the prompt or to generation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Reading the prompt, in one step or in chunks.
    Prefill,
    /// Everything after.
    Decode,
}

/// Where a generation stands after a step's attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Clock {
    /// Logical length: the position the next token will have.
    pub next: u32,
    /// Decode steps t since the prompt; 0 during prefill.
    pub step: u32,
    /// New tokens of this step.
    pub tokens: u32,
    /// Length of the prompt so far.
    pub prompt: u32,
    /// Phase of this step.
    pub phase: Phase,
}

impl Clock {
    /// The decode step at which each of the step's tokens joins; 0 for those of the prompt.
    pub fn births(&self) -> impl Iterator<Item = u32> + use<> {
        let Self { step, tokens, .. } = *self;
        (0..tokens).map(move |t| (step + t + 1).saturating_sub(tokens))
    }
}

/// A number of tokens as positions count them; more than there can be is as many as there can be.
pub(crate) fn count(tokens: usize) -> u32 {
    u32::try_from(tokens).unwrap_or(u32::MAX)
}

/// Which KV heads of which layer of which sequence a policy serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Place {
    /// Layer index.
    pub layer: usize,
    /// Sequence in the batch.
    pub sequence: usize,
    /// The first of the KV heads served.
    pub first_head: usize,
    /// KV heads served.
    pub heads: usize,
    /// KV heads of the layer.
    pub kv_heads: usize,
    /// Query heads that read each of them.
    pub group: usize,
    /// Elements of a head.
    pub head_dim: usize,
}

/// What a policy must be given; a cache that cannot give it refuses to be built.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Needs {
    /// Weights of the prompt's steps.
    pub prefill: WeightKinds,
    /// Weights of decode steps.
    pub decode: WeightKinds,
    /// The last queries, this many, at eviction.
    pub queries: usize,
    /// Keys at eviction.
    pub keys: bool,
    /// Values at eviction.
    pub values: bool,
    /// The values of new tokens when they join, before they are quantised.
    pub new_values: bool,
    /// The model's rotation of keys.
    pub rotary: bool,
    /// All KV heads of a layer together, because one decision serves them all; otherwise each head is served by a policy object of its own, in parallel.
    pub all_heads: bool,
}

impl Needs {
    /// Nothing.
    pub const NOTHING: Self = Self {
        prefill: WeightKinds::NONE,
        decode: WeightKinds::NONE,
        queries: 0,
        keys: false,
        values: false,
        new_values: false,
        rotary: false,
        all_heads: false,
    };

    /// Weights of decode steps alone.
    pub const fn decode(kinds: WeightKinds) -> Self {
        Self {
            decode: kinds,
            ..Self::NOTHING
        }
    }

    /// The same weights of all steps.
    pub const fn weights(kinds: WeightKinds) -> Self {
        Self {
            prefill: kinds,
            ..Self::decode(kinds)
        }
    }

    /// Keys, and nothing that attention computes.
    pub const fn keys() -> Self {
        Self {
            keys: true,
            ..Self::NOTHING
        }
    }

    /// The same with the last `queries` queries at eviction.
    pub const fn with_queries(self, queries: usize) -> Self {
        Self { queries, ..self }
    }

    /// The same with values at eviction.
    pub const fn with_values(self) -> Self {
        Self {
            values: true,
            ..self
        }
    }

    /// The same with the values of new tokens.
    pub const fn with_new_values(self) -> Self {
        Self {
            new_values: true,
            ..self
        }
    }

    /// The same with the model's rotation.
    pub const fn with_rotary(self) -> Self {
        Self {
            rotary: true,
            ..self
        }
    }

    /// The same for all heads together.
    pub const fn for_all_heads(self) -> Self {
        Self {
            all_heads: true,
            ..self
        }
    }

    /// The weights wanted of a phase's steps.
    pub const fn of(&self, phase: Phase) -> WeightKinds {
        match phase {
            Phase::Prefill => self.prefill,
            Phase::Decode => self.decode,
        }
    }

    /// Whether attention must hand out weights or queries: what a cache cannot give to a policy where attention is computed elsewhere.
    pub fn attention(&self) -> Option<&'static str> {
        if !self.prefill.union(self.decode).is_empty() {
            Some("attention weights")
        } else if self.queries > 0 {
            Some("queries")
        } else {
            None
        }
    }

    /// What is needed, in words.
    pub fn describe(&self) -> String {
        let weights = match (self.prefill.is_empty(), self.decode.is_empty()) {
            (true, true) => None,
            (false, false) => Some("the weights of every step".to_owned()),
            (false, true) => Some("the prompt's weights".into()),
            (true, false) => Some("the weights of decode steps".into()),
        };
        let queries = (self.queries > 0).then(|| format!("the last {} queries", self.queries));
        let flag = |wanted: bool, what: &str| wanted.then(|| what.to_owned());
        let all = [
            weights,
            queries,
            flag(self.keys, "keys"),
            flag(self.values || self.new_values, "values"),
            flag(self.rotary, "the model's rotation"),
        ];
        let all: Vec<String> = all.into_iter().flatten().collect();
        if all.is_empty() {
            return "nothing".into();
        }
        all.join(", ")
    }

    /// Everything that either wants.
    pub fn union(self, other: Self) -> Self {
        Self {
            prefill: self.prefill.union(other.prefill),
            decode: self.decode.union(other.decode),
            queries: self.queries.max(other.queries),
            keys: self.keys || other.keys,
            values: self.values || other.values,
            new_values: self.new_values || other.new_values,
            rotary: self.rotary || other.rotary,
            all_heads: self.all_heads || other.all_heads,
        }
    }
}

/// Attention weights of one KV head, one per cached token in physical order. In a step of several tokens the weights of a single query
/// end with that query's own token.
#[derive(Debug, Clone, Copy)]
pub struct Seen<'a> {
    /// Which weights; one of those that the policy declared for the step's phase.
    pub kind: WeightKind,
    /// The weights.
    pub weights: &'a [f32],
}

/// What a sequence holds in one layer, as a policy sees it at eviction; heads are counted from the policy's first.
pub trait Rows {
    /// Tokens of a head.
    fn len(&self, head: usize) -> usize {
        self.ids(head).len()
    }
    /// Elements of a key, query or value.
    fn head_dim(&self) -> usize;
    /// Logical positions of a head's tokens in physical order.
    fn ids(&self, head: usize) -> &[u32];
    /// Logical positions whose tokens may leave at this eviction: all but what is protected.
    fn candidates(&self) -> Range<u32> {
        0..u32::MAX
    }
    /// Keys of a head from slot `from` on: `[n − from, d]`; borrowed where the cache holds them in f32 on the CPU, else a copy.
    ///
    /// # Errors
    /// A failed copy from the device.
    fn keys(&self, head: usize, from: usize) -> Result<Cow<'_, [f32]>>;
    /// Values of a head from slot `from` on: `[n − from, d]`; borrowed where the cache holds them in f32 on the CPU, else a copy.
    ///
    /// # Errors
    /// A failed copy from the device.
    fn values(&self, head: usize, from: usize) -> Result<Cow<'_, [f32]>>;
    /// The last queries of a head.
    fn queries(&self, head: usize) -> RecentQueries<'_>;
    /// The model's rotation of keys in this layer, where the cache was told.
    fn rotary(&self) -> Option<&Rotary> {
        None
    }
}

/// The last queries that a KV head's group asked, already scaled, in no particular order.
#[derive(Debug, Clone, Copy, Default)]
pub struct RecentQueries<'a> {
    /// `[positions, group, d]`.
    pub queries: &'a [f32],
    /// Logical position of each.
    pub positions: &'a [u32],
    /// Cap on their products with keys, for models that cap attention logits.
    pub softcap: Option<f32>,
}

/// How much a token should stay: `value` decides, then `tie`, then the newer position.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Score {
    /// Higher stays.
    pub value: f32,
    /// Between equal values, higher stays.
    pub tie: u32,
}

impl Score {
    /// A score without tie-breaker.
    pub fn new(value: f32) -> Self {
        Self { value, tie: 0 }
    }
}

/// Settings that policies have in common, for callers that set them without naming policies.
trait Tunable {
    /// The seed, of a policy that draws.
    fn seed(&mut self) -> Option<&mut u64> {
        None
    }
    /// The weight from which a token counts as active.
    fn threshold(&mut self) -> Option<&mut Threshold> {
        None
    }
    /// Statistics of the model's queries.
    fn calibration(&mut self) -> Option<&mut Option<tri_attention::QueryStatistics>> {
        None
    }
}

/// A policy for one layer of one sequence.
///
/// A combinator gives the policy it wraps as [`inner`](Self::inner) and implements what it changes: everything else is the inner
/// policy's. Without an inner policy the defaults keep no state, need nothing and give all tokens the same score.
pub trait Policy: std::fmt::Debug + Send + Sync {
    /// The name used on the command line.
    fn name(&self) -> &'static str;
    /// When to evict and what is never evicted.
    fn rule(&self, phase: Phase) -> Rule;
    /// A deep copy.
    fn boxed_clone(&self) -> Box<dyn Policy>;
    /// The policy that this one wraps.
    fn inner(&self) -> Option<&dyn Policy> {
        None
    }
    /// The same, to be changed; some exactly where `inner` is.
    fn inner_mut(&mut self) -> Option<&mut dyn Policy> {
        None
    }
    /// What must be provided.
    fn needs(&self) -> Needs {
        self.inner()
            .map_or_else(Needs::default, |inner| inner.needs())
    }
    /// Whether the policy can serve a layer; asked once, when the cache is built.
    ///
    /// # Errors
    /// Settings that do not fit the layer.
    fn admits(&self, layer: usize, shape: &LayerShape) -> Result<()> {
        self.inner()
            .map_or(Ok(()), |inner| inner.admits(layer, shape))
    }
    /// Whether the policy's settings fit the model's rotation of a layer's keys; asked once, when the cache is told of it.
    ///
    /// # Errors
    /// Settings made for another rotation.
    fn admits_rotary(&self, layer: usize, rotary: &Rotary) -> Result<()> {
        self.inner()
            .map_or(Ok(()), |inner| inner.admits_rotary(layer, rotary))
    }
    /// Whether the scores of different KV heads are in the same unit, so that heads can compete for slots.
    fn comparable(&self) -> bool {
        self.inner().is_some_and(|inner| inner.comparable())
    }
    /// Called once, before the first token.
    fn start(&mut self, place: Place) {
        if let Some(inner) = self.inner_mut() {
            inner.start(place);
        }
    }
    /// `clock.tokens` tokens join every head, at the end.
    fn append(&mut self, clock: &Clock) {
        if let Some(inner) = self.inner_mut() {
            inner.append(clock);
        }
    }
    /// The tokens of the last [`append`](Self::append) are stored, at the end of each head; called where the policy needs new values.
    ///
    /// # Errors
    /// Values that could not be read.
    fn joined(&mut self, rows: &dyn Rows) -> Result<()> {
        match self.inner_mut() {
            Some(inner) => inner.joined(rows),
            None => Ok(()),
        }
    }
    /// What the policy asked for, head after head: once per step for column sums, once per query for single queries, whose `clock` stands where that
    /// query stood.
    fn observe(&mut self, head: usize, seen: Seen<'_>, clock: &Clock) {
        if let Some(inner) = self.inner_mut() {
            inner.observe(head, seen, clock);
        }
    }
    /// Scores for all of a head's tokens, in physical order; called when an eviction is due.
    ///
    /// # Errors
    /// Keys, values or queries that could not be read.
    fn score(
        &mut self,
        head: usize,
        rows: &dyn Rows,
        clock: &Clock,
        scores: &mut [Score],
    ) -> Result<()> {
        match self.inner_mut() {
            Some(inner) => inner.score(head, rows, clock, scores),
            None => Ok(()),
        }
    }
    /// Tokens of a head move or leave: per-token state follows.
    fn relocate(&mut self, head: usize, moves: &Relocation) {
        if let Some(inner) = self.inner_mut() {
            inner.relocate(head, moves);
        }
    }
    /// Bytes of per-token state.
    fn state_bytes(&self) -> usize {
        self.inner().map_or(0, |inner| inner.state_bytes())
    }
}

impl Clone for Box<dyn Policy> {
    fn clone(&self) -> Self {
        self.as_ref().boxed_clone()
    }
}

impl Policy for Box<dyn Policy> {
    fn name(&self) -> &'static str {
        self.as_ref().name()
    }
    fn rule(&self, phase: Phase) -> Rule {
        self.as_ref().rule(phase)
    }
    fn boxed_clone(&self) -> Box<dyn Policy> {
        self.as_ref().boxed_clone()
    }
    fn inner(&self) -> Option<&dyn Policy> {
        Some(self.as_ref())
    }
    fn inner_mut(&mut self) -> Option<&mut dyn Policy> {
        Some(self.as_mut())
    }
}
