//! What a configuration says that it costs, and what its cache then occupies.

use crate::common::{Qkv, all_policies, named, steps, with};
use candle_core::{DType, Device};
use kv_lazy::{Budget, CacheConfig, CacheSet, LayerShape, Prompt};

const SHAPE: LayerShape = LayerShape {
    query_heads: 6,
    kv_heads: 2,
    head_dim: 64,
    sliding_window: None,
};

fn build(config: &CacheConfig) -> CacheSet {
    CacheSet::new(&[SHAPE], 1, DType::F16, &Device::Cpu, config).unwrap()
}

fn occupied(cache: &CacheSet) -> usize {
    cache.bytes() + cache.state_bytes() + cache.position_bytes()
}

fn step(cache: &mut CacheSet, (q, k, v): &Qkv) {
    cache.begin(q.dim(2).unwrap()).unwrap();
    cache.attend(0, q, k, v, 0.1).unwrap();
}

#[test]
fn a_cache_occupies_at_most_what_its_configuration_costs_and_nearly_as_much() {
    let budget = 150;
    let all = steps(21, 1, SHAPE, &[&[400][..], &[1; 150]].concat());
    for storage in ["f16", "int8", "k8v4", "int4"] {
        for config in all_policies(budget) {
            // What is kept of the prompt would exceed the budget; snapkv keeps what comes after it.
            let config = with(config, |c| {
                c.prompt = Some(Prompt::Evictable);
                c.storage = storage.parse().unwrap();
            });
            let name = config.decode.name();
            let cost = |tokens| config.bytes(0, SHAPE, DType::F16, tokens).unwrap();
            let mut cache = build(&config);
            let (mut most, mut cut) = (0, false);
            for (i, qkv) in all.iter().enumerate() {
                step(&mut cache, qkv);
                // LazyEviction cuts the prompt at its first window.
                cut |= cache.physical_len(0) <= budget;
                if config.keeps_all() && i == 0 {
                    let held = occupied(&cache);
                    assert!(held <= cost(400), "{storage} {name} {held}");
                    assert!(held as f64 > 0.9 * cost(400) as f64, "{storage} {name}");
                }
                if cut && (i < 32 || name != "snapkv") {
                    most = most.max(occupied(&cache));
                }
            }
            if !config.keeps_all() {
                assert!(
                    cut && most <= cost(budget),
                    "{storage} {name}: {most} of {}",
                    cost(budget)
                );
                assert!(
                    most as f64 > 0.85 * cost(budget) as f64,
                    "{storage} {name}: {most} of {}",
                    cost(budget)
                );
            }
        }
    }
}

#[test]
fn a_cache_that_never_saw_a_prompt_grows_to_its_budget_and_not_beyond() {
    let all = steps(22, 1, SHAPE, &[1; 220]);
    for name in ["random", "keydiff", "streaming", "scissorhands", "lazy"] {
        for storage in ["f16", "int4"] {
            let config = with(named(name, 100), |c| {
                c.prompt = Some(Prompt::Evictable);
                c.storage = storage.parse().unwrap();
            });
            let mut cache = build(&config);
            let cost = config.bytes(0, SHAPE, DType::F16, 100).unwrap();
            for qkv in &all {
                step(&mut cache, qkv);
                let held = occupied(&cache);
                assert!(held <= cost, "{storage} {name}: {held} of {cost}");
            }
        }
    }
}

#[test]
fn a_full_cache_has_room_for_the_tokens_of_its_budget_and_grows_beyond_as_without_one() {
    let all = steps(24, 1, SHAPE, &[1; 260]);
    for storage in ["f16", "int8", "int4"] {
        let of = |budget| {
            with(named("full", budget), |c| {
                c.storage = storage.parse().unwrap();
            })
        };
        let config = of(200);
        let cost = config.bytes(0, SHAPE, DType::F16, 200).unwrap();
        let mut cache = build(&config);
        for qkv in &all[..200] {
            step(&mut cache, qkv);
            assert!(occupied(&cache) <= cost, "{storage}");
        }
        let held = occupied(&cache);
        assert!(
            held as f64 > 0.98 * cost as f64,
            "{storage}: {held} of {cost}"
        );
        for qkv in &all[200..] {
            step(&mut cache, qkv);
        }
        assert_eq!(cache.physical_len(0), 260);
        assert!(occupied(&cache) > cost, "{storage}");
    }
}

#[test]
fn a_quantised_cache_reserves_its_first_tokens_exactly_and_one_block_beside_the_newest() {
    let config = with(named("full", 1), |c| c.storage = "int8".parse().unwrap());
    let mut cache = build(&config);
    let all = steps(23, 1, SHAPE, &[&[400][..], &[1; 40]].concat());
    step(&mut cache, &all[0]);
    // 4 + 32 + 32 tokens in f16; 11 blocks of codes with a scale a token.
    let prompt = 2 * (68 * 2 * 64 * 2 + 352 * 2 * (64 + 2));
    assert_eq!(cache.bytes(), prompt);
    for qkv in &all[1..] {
        step(&mut cache, qkv);
    }
    // Room for a quarter more codes.
    let grown = 2 * (68 * 2 * 64 * 2 + (352 + 88) * 2 * (64 + 2));
    assert_eq!(cache.bytes(), grown);
}

#[test]
fn storage_under_a_ratio_grows_by_quarters_and_not_step_by_step() {
    let all = steps(23, 1, SHAPE, &[&[64][..], &[1; 400]].concat());
    for (name, storage) in [
        ("streaming", "f16"),
        ("h2o", "f16"),
        ("random", "f32"),
        ("tova", "int8"),
    ] {
        let config = with(named(name, 1), |c| {
            c.budget = Budget::Ratio(0.5);
            c.storage = storage.parse().unwrap();
            c.prompt = Some(Prompt::Evictable);
        });
        let mut cache = build(&config);
        let (mut held, mut changes) = (0, 0);
        for (i, qkv) in all.iter().enumerate() {
            step(&mut cache, qkv);
            changes += usize::from(cache.bytes() != held);
            held = cache.bytes();
            let tokens = cache.physical_len(0);
            assert!(tokens <= (64 + i).div_ceil(2) + 8, "{name} {i}: {tokens}");
            let cost = config.bytes(0, SHAPE, DType::F16, tokens.max(32)).unwrap();
            assert!(i < 32 || occupied(&cache) <= cost, "{name} {storage} {i}");
        }
        // From 32 tokens to 232, and quantised rows have three parts.
        let most = if storage == "int8" { 40 } else { 12 };
        assert!(changes <= most, "{name} {storage}: {changes}");
    }
}
