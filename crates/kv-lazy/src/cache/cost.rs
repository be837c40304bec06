//! What a configuration costs in bytes, and which budget fits a number of bytes.

use super::LayerShape;
use crate::error::Result;
use crate::policy::{CacheConfig, Clock, Evictor, Phase, count};
use candle_core::DType;

impl CacheConfig {
    /// Bytes that `layer` holds for one sequence of `tokens` tokens per KV head: keys, values, positions, the policy's state and its queries, without
    /// room for more tokens.
    ///
    /// # Errors
    /// As for a cache of this configuration.
    pub fn bytes(
        &self,
        layer: usize,
        shape: LayerShape,
        dtype: DType,
        tokens: usize,
    ) -> Result<usize> {
        let budget = self.layer_budget(layer)?;
        let mut evictors = Vec::new();
        if !self.keeps_all() && shape.kv_heads > 0 {
            let policy = self.build(budget)?;
            evictors = Evictor::for_batch(
                policy.as_ref(),
                budget,
                layer,
                1,
                &shape,
                self.shared_budget,
            )?;
        }
        let recent = evictors.first().map_or(0, Evictor::recent);
        let storage = self.storage_of(layer)?;
        let layout = storage.layout(shape.head_dim, dtype, recent)?;
        let prompt = Clock {
            next: count(tokens),
            step: 0,
            tokens: count(tokens),
            prompt: count(tokens),
            phase: Phase::Prefill,
        };
        let mut state = 0;
        for evictor in &mut evictors {
            evictor.append(&prompt);
            state += evictor.state_bytes();
        }
        let needs = evictors.first().map(Evictor::needs).unwrap_or_default();
        let numbers = if needs.new_values { 4 } else { 0 };
        let queries = needs.queries.min(tokens) * shape.query_heads * shape.head_dim * 4;
        let per_head = layout.bytes(shape.head_dim, tokens) + tokens * (4 + numbers);
        Ok(shape.kv_heads * per_head + state + queries)
    }

    /// The largest budget, up to `most` tokens, at which layer 0 of the configuration that `config` gives for it holds at most `bytes` for one sequence,
    /// by [`bytes`](Self::bytes); at least one token. Settings that follow from the budget follow.
    ///
    /// # Errors
    /// A configuration that cannot be built within that budget.
    pub fn budget_within(
        bytes: usize,
        most: usize,
        shape: LayerShape,
        dtype: DType,
        config: impl Fn(usize) -> Self,
    ) -> Result<usize> {
        let cost = |tokens: usize| config(tokens).bytes(0, shape, dtype, tokens);
        let (mut low, mut high) = (1, most.max(1) + 1);
        while high - low > 1 {
            let middle = low + (high - low) / 2;
            // Budgets too small to be built are too small.
            if cost(middle).map_or(true, |cost| cost <= bytes) {
                low = middle;
            } else {
                high = middle;
            }
        }
        cost(low)?;
        Ok(low)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::Budget;
    use crate::quantise::StorageConfig;

    const SHAPE: LayerShape = LayerShape {
        query_heads: 9,
        kv_heads: 3,
        head_dim: 64,
        sliding_window: None,
    };

    #[test]
    fn a_budget_of_bytes_is_used_and_not_exceeded() {
        let full = CacheConfig::new("full".parse().unwrap(), Budget::Tokens(1024));
        let of = |name: &str, storage: &str, tokens: usize| {
            let mut config = CacheConfig::new(name.parse().unwrap(), Budget::Tokens(tokens));
            config.storage = storage.parse().unwrap();
            config
        };
        let half = full.bytes(0, SHAPE, DType::F16, 512).unwrap();
        assert_eq!(half, 512 * 3 * (2 * 2 * 64 + 4));
        let fit = |name: &str, storage: &str| {
            let config = |tokens| of(name, storage, tokens);
            let tokens = CacheConfig::budget_within(half, 1024, SHAPE, DType::F16, config).unwrap();
            let bytes = |tokens| config(tokens).bytes(0, SHAPE, DType::F16, tokens).unwrap();
            assert!(bytes(tokens) <= half, "{name} {storage}");
            assert!(
                tokens == 1024 || bytes(tokens + 1) > half,
                "{name} {storage}"
            );
            tokens
        };
        assert_eq!(fit("knorm", "f16"), 512);
        // Four bytes of state a token; the last queries.
        assert!(fit("h2o", "f16") < 512 && fit("snapkv", "f16") < 512);
        assert!(fit("knorm", "int8") > 900 && fit("knorm", "int4") == 1024);
        assert!(StorageConfig::int4().is_quantised());
    }
}
