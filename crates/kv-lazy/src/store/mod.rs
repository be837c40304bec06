//! Where keys and values live: per layer, one row per (sequence, KV head), never expanded to query heads.
//!
//! Keys are stored after RoPE with their original position in `ids`; the *logical* length counts positions and
//! drives RoPE, the *physical* length counts slots and drives masks. Memory is freed when tokens are evicted.

mod data;
mod device;
mod host;
mod packed_device;
mod relocation;
mod side;

pub(crate) use device::DeviceStore;
pub(crate) use host::HostStore;
pub(crate) use packed_device::PackedDeviceStore;
pub use relocation::{Relocation, Run};

use crate::attention::{Exported, Scores, WeightKinds};
use crate::error::{Error, Result};
use candle_core::Tensor;
use serde::{Deserialize, Serialize};
use std::borrow::Cow;

/// Tokens by which storage that holds `len` grows when it is full: a quarter, but not by too few.
pub(crate) fn growth(len: usize) -> usize {
    (len / 4).max(32)
}

/// How slots are freed when tokens leave.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Layout {
    /// The remaining tokens stay in order, for policies that compare neighbours: everything behind the first hole moves.
    Compact,
    /// The last tokens are moved into the holes: one token moves per evicted token, whether at every step or every W steps.
    SlotReuse,
    /// A new token overwrites the evicted one, behind the sinks: for policies that evict before they append.
    SinkRing,
}

/// One layer's attention call.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Call {
    /// From q·k to the softmax.
    pub(crate) scores: Scores,
    /// Logical position of the first new token.
    pub(crate) position: u32,
    /// Sliding window of the layer.
    pub(crate) sliding_window: Option<usize>,
    /// Weights that are handed out.
    pub(crate) weights: WeightKinds,
    /// Queries whose weights are handed out one by one: the last ones.
    pub(crate) queries: usize,
}

/// Nothing, or the row whose keys or values cannot be quantised.
pub(crate) type Appended = std::result::Result<(), (usize, &'static str)>;

/// Output `[B, Hq, T, d]`, or the row whose softmax was not finite.
pub(crate) type Attended = std::result::Result<Tensor, usize>;

/// Storage of one layer.
pub(crate) trait Store: Send + Sync + std::fmt::Debug {
    /// Appends `k` and `v` `[B, Hkv, T, d]` at logical positions `first..first + T`. A row in `overwrite` names slots that
    /// the new tokens replace, one for one, instead of growing the row. On an error nothing has changed.
    fn append(
        &mut self,
        k: &Tensor,
        v: &Tensor,
        first: u32,
        overwrite: &[Vec<u32>],
    ) -> Result<Appended>;
    /// Whether appended tokens can replace others in their slots.
    fn overwrites(&self) -> bool;
    /// Attends `q` `[B, Hq, T, d]`, whose keys were appended last.
    fn attend(&mut self, q: &Tensor, call: &Call) -> Result<Attended>;
    /// Replaces the key in a slot that is not quantised.
    ///
    /// # Errors
    /// Storage that cannot be written in place.
    fn replace_key(&mut self, row: usize, slot: usize, key: &[f32]) -> Result<()> {
        let _ = (row, slot, key);
        Err(Error::NeedUnavailable {
            policy: "with moving sinks".into(),
            need: "keys that can be replaced",
            path: "storage on this device",
        })
    }
    /// The weights that the last call handed out.
    fn exported(&self) -> &Exported;
    /// Evicts the tokens in these ascending slots of each row; afterwards the storage has room for at most `room` more tokens than remain. Returns how
    /// the others moved. On an error nothing has changed.
    fn evict(&mut self, evict: &[Vec<u32>], layout: Layout, room: usize)
    -> Result<Vec<Relocation>>;
    /// Quantises what is no longer among the newest tokens; at the end of a step. Returns the most bytes that keys and values occupied meanwhile, 0 where
    /// nothing was to be done. On an error nothing has changed.
    fn settle(&mut self) -> Result<usize>;
    /// Rows: sequences times KV heads.
    fn rows(&self) -> usize;
    /// Tokens of a row.
    fn len(&self, row: usize) -> usize {
        self.ids(row).len()
    }
    /// Logical positions of a row's tokens in physical order.
    fn ids(&self, row: usize) -> &[u32];
    /// Keys of a row from slot `from` on, as f32 `[n − from, d]`.
    fn keys(&self, row: usize, from: usize) -> Result<Cow<'_, [f32]>>;
    /// Values of a row from slot `from` on, as f32 `[n − from, d]`.
    fn values(&self, row: usize, from: usize) -> Result<Cow<'_, [f32]>>;
    /// Bytes that keys and values occupy, filled or not.
    fn bytes(&self) -> usize;
    /// Keys and values `[B, Hkv, n, d]` of `batch` sequences.
    fn tensors(&self, batch: usize) -> Result<(Tensor, Tensor)>;
    /// Bytes of the positions.
    fn id_bytes(&self) -> usize;
    /// Forgets all tokens and frees their storage.
    fn clear(&mut self);
    /// A deep copy.
    fn boxed_clone(&self) -> Box<dyn Store>;
}

impl Clone for Box<dyn Store> {
    fn clone(&self) -> Self {
        self.boxed_clone()
    }
}
