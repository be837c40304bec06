//! What a configuration costs in bytes, and which budget fits a number of bytes.

use super::LayerShape;
use super::build::laid_out;
use crate::error::Result;
use crate::policy::{CacheConfig, Clock, Evictor, Phase, Positions, count};
use crate::store;
use candle_core::DType;

impl CacheConfig {
    /// The most bytes that `layer` occupies for one sequence within a budget of `tokens` tokens per KV head, once a prompt has been cut to it and
    /// tokens join one by one: keys, values, positions, the policy's state and its queries, with room for the tokens that join until the next
    /// eviction, under a ratio also to grow by a quarter. Under `full`: after a prompt of `tokens` tokens. Policies that do not cut the prompt at once hold more before they do;
    /// on devices other than the CPU quantised storage keeps the newest tokens twice.
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
        let (layout, _) = laid_out(&evictors, self.storage_of(layer)?, shape, dtype)?;
        let rule = evictors.first().map(|e| e.rule(Phase::Decode));
        let mut most = tokens.saturating_add(rule.map_or(0, |rule| rule.headroom()));
        if evictors.first().is_some_and(Evictor::grows) {
            most = most.saturating_add(store::growth(tokens));
        }
        let room = match evictors.first().map(|e| e.rule(Phase::Prefill)) {
            Some(rule) if !rule.after_prefill => layout.room_after_more(most),
            _ => layout.room(most),
        };
        let prompt = Clock {
            next: count(most),
            step: 0,
            tokens: count(most),
            prompt: count(most),
            phase: Phase::Prefill,
        };
        let mut state = 0;
        for evictor in &mut evictors {
            evictor.append(&prompt);
            state += evictor.state_bytes();
        }
        let needs = evictors.first().map(Evictor::needs).unwrap_or_default();
        let numbers = if needs.new_values { 4 } else { 0 };
        let queries = needs.queries * shape.query_heads * shape.head_dim * 4;
        let mut per_head = layout.bytes(shape.head_dim, room) + most * (4 + numbers);
        if self.positions == Positions::Consecutive {
            per_head += rule.map_or(0, |rule| rule.sinks * shape.head_dim * 4 + 4);
        }
        Ok(shape.kv_heads * per_head + state + queries)
    }

    /// [`bytes`](Self::bytes) of all `layers`.
    ///
    /// # Errors
    /// As for a cache of this configuration.
    pub fn bytes_of(&self, layers: &[LayerShape], dtype: DType, tokens: usize) -> Result<usize> {
        let own = layers.iter().enumerate().filter(|(_, s)| s.kv_heads > 0);
        own.map(|(layer, &shape)| self.bytes(layer, shape, dtype, tokens))
            .sum()
    }

    /// The largest budget, up to `most` tokens, at which all `layers` of the configuration that `config` gives for it hold at most `bytes` for one sequence,
    /// by [`bytes_of`](Self::bytes_of); at least one token. Settings that follow from the budget follow.
    ///
    /// # Errors
    /// A configuration that cannot be built within that budget.
    pub fn budget_within(
        bytes: usize,
        most: usize,
        layers: &[LayerShape],
        dtype: DType,
        config: impl Fn(usize) -> Self,
    ) -> Result<usize> {
        let cost = |tokens: usize| config(tokens).bytes_of(layers, dtype, tokens);
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
            let tokens =
                CacheConfig::budget_within(half, 1024, &[SHAPE], DType::F16, config).unwrap();
            let bytes = |tokens| config(tokens).bytes(0, SHAPE, DType::F16, tokens).unwrap();
            assert!(bytes(tokens) <= half, "{name} {storage}");
            assert!(
                tokens == 1024 || bytes(tokens + 1) > half,
                "{name} {storage}"
            );
            tokens
        };
        // One token more before each eviction; with knorm 64.
        assert_eq!((fit("random", "f16"), fit("knorm", "f16")), (511, 448));
        // Four bytes of state a token; the last queries.
        assert!(fit("h2o", "f16") < 511 && fit("snapkv", "f16") < 480);
        assert!(fit("knorm", "int8") > 800 && fit("knorm", "int4") == 1024);
        assert!(StorageConfig::int4().is_quantised());
        // Layers differ in size: a budget for all of them is one by their sum.
        let wide = LayerShape {
            head_dim: 128,
            ..SHAPE
        };
        let layers = [SHAPE, wide];
        let both = full.bytes_of(&layers, DType::F16, 512).unwrap();
        assert_eq!(both, 512 * 3 * (2 * 2 * (64 + 128) + 2 * 4));
        let config = |tokens| of("random", "f16", tokens);
        let tokens = CacheConfig::budget_within(both, 1024, &layers, DType::F16, config);
        assert_eq!(tokens.unwrap(), 511);
    }
}
