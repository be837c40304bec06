//! What caches are given while a model reads a text.

use anyhow::{Context, Result};
use causal_lm::{CacheSet, Model};
use kv_lazy::trace::Recorder;

/// Queries, keys and values of `tokens`, which `cache` reads as one prompt.
pub(super) fn record(model: &Model<'_>, mut cache: CacheSet, tokens: &[u32]) -> Result<Recorder> {
    cache.record(Recorder::new())?;
    model.forward(&[tokens], &mut cache)?;
    cache.take_recorder().context("a recording was begun")
}
