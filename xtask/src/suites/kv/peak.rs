//! What caches hold while a model runs, per sequence.

use causal_lm::CacheSet;
use eval_report::Row;
use serde_json::json;

/// Extra field of a row: mean bytes of keys, values, positions and state.
const MEAN: &str = "bytes_mean";
/// Extra field of a row: bytes of the tokens' positions.
const POSITIONS: &str = "position_bytes";
/// Extra field of a row: its mean bytes over those of the full cache.
pub(crate) const MEAN_OVER_FULL: &str = "mean_over_full";

/// The largest cache of a run, and the mean over its steps.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct PeakCache {
    kv_bytes: usize,
    state_bytes: usize,
    position_bytes: usize,
    tokens: usize,
    /// Bytes of all kinds after each step.
    sum: f64,
    steps: usize,
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
        let (state, positions) = (cache.state_bytes(), cache.position_bytes());
        self.kv_bytes = self.kv_bytes.max(kv_bytes / batch);
        self.state_bytes = self.state_bytes.max(state / batch);
        self.position_bytes = self.position_bytes.max(positions / batch);
        self.tokens = self.tokens.max(tokens.unwrap_or(0));
        self.sum += (cache.bytes() + state + positions) as f64 / batch as f64;
        self.steps += 1;
    }

    /// Fills the row's memory.
    pub(crate) fn fill(&self, row: &mut Row) {
        row.kv_bytes = Some(self.kv_bytes as u64);
        row.state_bytes = Some(self.state_bytes as u64);
        let mean = (self.sum / self.steps.max(1) as f64).round() as u64;
        row.extra.insert("tokens_held".into(), json!(self.tokens));
        row.extra
            .insert(POSITIONS.into(), json!(self.position_bytes));
        row.extra.insert(MEAN.into(), json!(mean));
    }
}

/// Gives every row its mean bytes as a share of those of the first, which keeps every token.
pub(crate) fn compare_means(rows: &mut [Row]) {
    let mean = |row: &Row| row.extra.get(MEAN).and_then(serde_json::Value::as_f64);
    let Some(full) = rows.first().and_then(mean) else {
        return;
    };
    for row in rows {
        if let Some(own) = mean(row) {
            let share = own / full.max(1.0);
            row.extra.insert(MEAN_OVER_FULL.into(), json!(share));
        }
    }
}

/// The most that a row's caches held: keys, values, the policy's state, and positions where they were counted.
pub(crate) fn held(row: &Row) -> Option<u64> {
    let positions = row.extra.get(POSITIONS).and_then(serde_json::Value::as_u64);
    Some(row.kv_bytes? + row.state_bytes.unwrap_or(0) + positions.unwrap_or(0))
}
