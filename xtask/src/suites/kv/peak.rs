//! What caches hold while a model runs, per sequence.

use causal_lm::CacheSet;
use eval_report::Row;
use serde_json::json;

/// The largest cache of a run.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct PeakCache {
    kv_bytes: usize,
    state_bytes: usize,
    tokens: usize,
}

impl PeakCache {
    /// Takes in the state of the caches after a step, and the most they held since they were new.
    pub(crate) fn observe(&mut self, cache: &CacheSet) {
        self.note(cache, cache.peak_bytes());
    }

    /// Takes in the caches as they are after a step.
    pub(crate) fn observe_between(&mut self, cache: &CacheSet) {
        self.note(cache, cache.bytes());
    }

    fn note(&mut self, cache: &CacheSet, kv_bytes: usize) {
        let batch = cache.batch().max(1);
        let layers = cache.shapes().len();
        let tokens = (0..layers).map(|layer| cache.physical_len(layer)).max();
        self.kv_bytes = self.kv_bytes.max(kv_bytes / batch);
        self.state_bytes = self.state_bytes.max(cache.state_bytes() / batch);
        self.tokens = self.tokens.max(tokens.unwrap_or(0));
    }

    /// Fills the row's memory.
    pub(crate) fn fill(&self, row: &mut Row) {
        row.kv_bytes = Some(self.kv_bytes as u64);
        row.state_bytes = Some(self.state_bytes as u64);
        row.extra.insert("tokens_held".into(), json!(self.tokens));
    }
}
