//! Eviction of keys and values in every supported architecture.

mod common;

use causal_lm::{CacheSet, Model};
use common::for_each;
use kv_lazy::{Budget, CacheConfig, PolicyConfig};

const TOKENS: usize = 8;

#[test]
fn caches_stay_within_their_budget_and_are_exact_until_they_are_full() {
    for_each(|name, golden, decoder| {
        let tokens = golden.tokens();
        let model = Model::load(decoder).unwrap().for_positions(tokens.len());
        for policy in ["streaming", "h2o", "tova", "snapkv", "r-kv"] {
            let policy: PolicyConfig = policy.parse().unwrap();
            let config = CacheConfig::new(policy, Budget::Tokens(TOKENS));
            let mut cache = CacheSet::new(
                &model.cache_shapes(),
                1,
                decoder.dtype(),
                decoder.device(),
                &config,
            )
            .unwrap();
            for (step, (&token, expected)) in tokens.iter().zip(golden.logits()).enumerate() {
                let logits = model.forward(&[&[token]], &mut cache).unwrap();
                let logits: Vec<f32> = logits.flatten_all().unwrap().to_vec1().unwrap();
                assert!(logits.iter().all(|x| x.is_finite()), "{name}");
                let gaps = logits.iter().zip(&expected).map(|(a, b)| (a - b).abs());
                let gap = gaps.fold(0.0, f32::max);
                assert!(step >= TOKENS || gap < 1e-4, "{name}, step {step}: {gap}");
                let held = |layer| cache.physical_len(layer);
                let layers = decoder.config().layers();
                assert!((0..layers).all(|layer| held(layer) <= TOKENS), "{name}");
            }
        }
    });
}
