//! Agreement with transformers on tiny decoders of every supported kind.

mod common;

use causal_lm::{CacheSet, Hidden, Model, NoProgress, NoTap, Windows, run_blocks};
use common::{for_each, mean_nll};
use kv_lazy::{Budget, CacheConfig, PolicyConfig};

/// Rounding of f32; Gemma's scaled embeddings and unit offsets make its logits ten times as large.
fn tolerance(name: &str) -> f32 {
    match name.starts_with("gemma") {
        true => 1e-4,
        false => 2e-5,
    }
}

fn check(name: &str, found: &[f32], golden: &[f32]) {
    assert_eq!(found.len(), golden.len());
    for (i, (found, golden)) in found.iter().zip(golden).enumerate() {
        assert!(
            (found - golden).abs() < tolerance(name),
            "{name}[{i}]: {found} is not {golden}"
        );
    }
}

#[test]
fn logits_of_a_prefill_agree_with_transformers() {
    for_each(|name, golden, decoder| {
        let model = Model::load(decoder).unwrap();
        let logits = model
            .forward_all(&[&golden.tokens()], &mut model.full_cache(1).unwrap())
            .unwrap();
        check(
            name,
            &logits.flatten_all().unwrap().to_vec1().unwrap(),
            &golden.logits().concat(),
        );
    });
}

#[test]
fn logits_of_token_by_token_decoding_agree_with_transformers() {
    for_each(|name, golden, decoder| {
        // Known in advance: some models rotate by other frequencies in long sequences.
        let model = Model::load(decoder).unwrap();
        let model = model.for_positions(golden.tokens().len());
        let mut cache = model.full_cache(1).unwrap();
        for (token, row) in golden.tokens().into_iter().zip(golden.logits()) {
            let logits = model.forward(&[&[token]], &mut cache).unwrap();
            check(
                name,
                &logits.flatten_all().unwrap().to_vec1().unwrap(),
                &row,
            );
        }
    });
}

#[test]
fn hidden_states_and_loss_of_streamed_windows_agree_with_transformers() {
    for_each(|name, golden, decoder| {
        let tokens = golden.tokens();
        let windows = Windows::cut(&tokens, tokens.len(), None).unwrap();
        let mut hidden = Hidden::embed(decoder, &windows).unwrap();
        hidden
            .advance(&decoder.block(0).unwrap(), &mut NoTap)
            .unwrap();
        let last = hidden.batches()[0]
            .get(0)
            .unwrap()
            .get(tokens.len() - 1)
            .unwrap();
        let expected: Vec<f32> =
            serde_json::from_value(golden.0["first_block_last_row"].clone()).unwrap();
        check(name, &last.to_vec1().unwrap(), &expected);
        let found = mean_nll(decoder, &windows);
        assert!((found - golden.mean_nll()).abs() < 1e-5, "{name}");
    });
}

#[test]
fn windows_in_a_batch_do_not_see_each_other() {
    for_each(|name, golden, decoder| {
        let tokens = golden.tokens();
        let twice = [tokens.clone(), tokens.iter().rev().copied().collect()].concat();
        let last = |text: &[u32]| -> Vec<Vec<f32>> {
            let windows = Windows::cut(text, tokens.len(), None).unwrap();
            let hidden = run_blocks(decoder, &windows, &mut NoTap, &NoProgress).unwrap();
            hidden.batches()[0]
                .flatten_from(1)
                .unwrap()
                .to_vec2()
                .unwrap()
        };
        check(name, &last(&twice)[0], &last(&tokens)[0]);
    });
}

#[test]
fn caches_that_evict_stay_within_their_budget_and_are_exact_until_they_are_full() {
    const TOKENS: usize = 8;
    for_each(|name, golden, decoder| {
        let tokens = golden.tokens();
        let model = Model::load(decoder).unwrap().for_positions(tokens.len());
        for policy in ["streaming", "h2o", "tova"] {
            let policy: PolicyConfig = policy.parse().unwrap();
            let config = CacheConfig::new(policy, Budget::Tokens(TOKENS));
            let (dtype, device) = (decoder.dtype(), decoder.device());
            let shapes = model.cache_shapes();
            let mut cache = CacheSet::new(&shapes, 1, dtype, device, &config).unwrap();
            for (step, (&token, row)) in tokens.iter().zip(golden.logits()).enumerate() {
                let logits = model.forward(&[&[token]], &mut cache).unwrap();
                let logits: Vec<f32> = logits.flatten_all().unwrap().to_vec1().unwrap();
                assert!(logits.iter().all(|x| x.is_finite()), "{name}");
                if step < TOKENS {
                    check(name, &logits, &row);
                }
                let layers = 0..shapes.len();
                let held: Vec<usize> = layers.map(|layer| cache.physical_len(layer)).collect();
                assert!(held.iter().all(|&held| held <= TOKENS), "{name}: {held:?}");
            }
        }
    });
}
