//! What a query sees: the earlier tokens of its own window or branch, or a cache.

use crate::Result;
use crate::forest::Forest;
use candle_core::Tensor;
use kv_lazy::CacheSet;
use kv_lazy::attention::Scores;

/// How a block's attention reaches keys and values.
#[derive(Debug)]
pub enum Mixer<'a> {
    /// Each batch entry is a window of its own that starts at position 0; nothing is kept.
    Windows,
    /// The one batch entry is packed with sequences that begin alike; nothing is kept.
    Forest(&'a Forest),
    /// Keys and values are added to a cache, which decides what stays and computes attention.
    Cache(&'a mut CacheSet),
}

impl Mixer<'_> {
    /// `q` is `[batch, heads, tokens, head_dim]` after RoPE, `k` and `v` have `kv_heads`; the
    /// result has the shape of `q`.
    pub(crate) fn attend(
        &mut self,
        layer: usize,
        [q, k, v]: [&Tensor; 3],
        scores: Scores,
        sliding_window: Option<usize>,
    ) -> Result<Tensor> {
        Ok(match self {
            Self::Windows => kv_lazy::attention::prefill(q, k, v, scores, 0, sliding_window)?,
            Self::Forest(forest) => forest.attend(q, k, v, scores, sliding_window)?,
            Self::Cache(cache) => cache.attend(layer, q, k, v, scores)?,
        })
    }
}
