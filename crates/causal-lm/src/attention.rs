//! What a query sees: the earlier tokens of its own window or branch, or a cache.

use crate::Result;
use crate::forest::Forest;
use candle_core::Tensor;
use kv_lazy::attention::Scores;
use kv_lazy::{CacheConfig, CacheSet, LayerShape};

/// How a block's attention reaches keys and values.
#[derive(Debug)]
pub enum Mixer<'a> {
    /// Each batch entry is a window of its own that starts at position 0; nothing is kept.
    Windows,
    /// The one batch entry is packed with sequences that begin alike; nothing is kept.
    Forest(&'a Forest),
    /// Keys and values are added to a cache, which decides what stays and computes attention; it also holds what a delta net
    /// carries from token to token.
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

/// Attention of windows as it is when they are decoded: one token after the other through a new cache of `config`. Shapes as
/// in [`Mixer::attend`].
pub(crate) fn decoded(
    config: &CacheConfig,
    [q, k, v]: [&Tensor; 3],
    scores: Scores,
    sliding_window: Option<usize>,
) -> Result<Tensor> {
    let (batch, query_heads, tokens, head_dim) = q.dims4()?;
    let shape = LayerShape {
        query_heads,
        kv_heads: k.dim(1)?,
        head_dim,
        sliding_window,
    };
    let mut cache = CacheSet::new(&[shape], batch, q.dtype(), q.device(), config)?;
    let mut steps = Vec::with_capacity(tokens);
    for at in 0..tokens {
        let token = |x: &Tensor| x.narrow(2, at, 1)?.contiguous();
        cache.begin(1)?;
        steps.push(cache.attend(0, &token(q)?, &token(k)?, &token(v)?, scores)?);
    }
    Ok(Tensor::cat(&steps, 2)?)
}
