//! What eviction does to attention, lengths and memory, for every policy.

use crate::common::{all_configurations, all_policies, distance, flat, naive, run, steps};
use candle_core::{DType, Device, Tensor};
use kv_lazy::policy::{LazySettings, Threshold};
use kv_lazy::{Budget, CacheConfig, CacheSet, Error, LayerShape, PolicyConfig, Prompt};
use proptest::prelude::*;

const SHAPE: LayerShape = LayerShape {
    query_heads: 4,
    kv_heads: 2,
    head_dim: 16,
    sliding_window: None,
};

fn build(config: &CacheConfig, batch: usize) -> CacheSet {
    CacheSet::new(&[SHAPE], batch, DType::F32, &Device::Cpu, config).unwrap()
}

fn lazy(window: usize) -> PolicyConfig {
    PolicyConfig::Lazy(LazySettings {
        window: Some(window),
        threshold: Threshold::Absolute(0.02),
        ..LazySettings::default()
    })
}

/// A prompt, generation, a chunk in the middle of it, generation.
fn tokens() -> Vec<usize> {
    let mut tokens = vec![30];
    tokens.extend([1; 25]);
    tokens.extend([7, 4]);
    tokens.extend([1; 30]);
    tokens
}

#[test]
fn a_budget_of_the_whole_length_is_bit_identical_to_the_full_cache() {
    let tokens = tokens();
    let total = tokens.iter().sum();
    let steps = steps(1, 2, SHAPE, &tokens);
    let mut full = CacheSet::full(&[SHAPE], 2, DType::F32, &Device::Cpu).unwrap();
    let want = run(&mut full, &steps);
    for config in all_configurations(total) {
        if config.budget != Budget::Tokens(total) || config.prompt.is_some() {
            continue;
        }
        let mut cache = build(&config, 2);
        assert_eq!(run(&mut cache, &steps), want, "{config:?}");
        assert_eq!(cache.physical_len(0), total, "{config:?}");
    }
}

#[test]
fn evicting_equals_masking_in_the_full_cache_for_every_policy() {
    let tokens = tokens();
    for (seed, config) in all_configurations(24).into_iter().enumerate() {
        let steps = steps(seed as u64, 2, SHAPE, &tokens);
        let mut cache = build(&config, 2);
        let ahead = config.decode.to_string() == "streaming" && config.guard_values == 0;
        let mut held: Vec<(Tensor, Tensor)> = Vec::new();
        let mut evicted = false;
        for (q, k, v) in &steps {
            let positions = |cache: &CacheSet| -> Vec<Vec<u32>> {
                (0..4)
                    .map(|row| cache.positions(0, row / 2, row % 2).to_vec())
                    .collect()
            };
            let before = positions(&cache);
            let step = cache.begin(q.dim(2).unwrap()).unwrap();
            let got = cache.attend(0, q, k, v, 0.5).unwrap();
            let after = positions(&cache);
            held.push((k.clone(), v.clone()));
            let keys: Vec<_> = held.iter().map(|kv| &kv.0).collect();
            let values: Vec<_> = held.iter().map(|kv| &kv.1).collect();
            let (keys, values) = (
                Tensor::cat(&keys, 2).unwrap(),
                Tensor::cat(&values, 2).unwrap(),
            );
            for row in 0..4 {
                let (b, h) = (row / 2, row % 2);
                // What was there at the step's attention: streaming makes room before, all others evict after.
                let resident = |j: usize| {
                    let old = j < step.position;
                    let set = if ahead && step.position > 0 {
                        &after[row]
                    } else {
                        &before[row]
                    };
                    !old || set.contains(&(j as u32))
                };
                let part = |x: &Tensor, from, count| {
                    x.narrow(0, b, 1).unwrap().narrow(1, from, count).unwrap()
                };
                let want = naive(
                    &part(q, 2 * h, 2),
                    &part(&keys, h, 1),
                    &part(&values, h, 1),
                    0.5,
                    |i, j| j <= step.position + i && resident(j),
                );
                let got = flat(&part(&got, 2 * h, 2));
                let far = distance(&got, &want);
                assert!(far < 1e-5, "{config:?} step {step:?} row {row}: {far}");
            }
            evicted |= cache.physical_len(0) < cache.logical_len();
        }
        assert_eq!(evicted, config.decode != PolicyConfig::Full, "{config:?}");
    }
}

#[test]
fn lengths_saw_between_the_budget_and_budget_plus_window_minus_one() {
    let (budget, window) = (20, 6);
    let mut cache = build(&CacheConfig::new(lazy(window), Budget::Tokens(budget)), 1);
    for (t, (q, k, v)) in steps(2, 1, SHAPE, &[&[30][..], &[1; 60]].concat())
        .iter()
        .enumerate()
    {
        cache.begin(q.dim(2).unwrap()).unwrap();
        cache.attend(0, q, k, v, 0.5).unwrap();
        let len = cache.physical_len(0);
        if t < window {
            assert_eq!(
                len,
                30 + t,
                "the prompt is kept until the first window ends"
            );
        } else {
            assert_eq!(len, budget + t % window, "step {t}");
        }
        if t >= window {
            let newest = 30 + t as u32 - (window as u32 - 1)..30 + t as u32;
            let held = cache.positions(0, 0, 1);
            assert!(t % window != 0 || newest.clone().all(|id| held.contains(&id)));
        }
    }
}

#[test]
fn sinks_prompt_and_recent_tokens_stay_where_they_are_protected() {
    for config in all_policies(24) {
        if config.decode == PolicyConfig::Full {
            continue;
        }
        let config = CacheConfig {
            sinks: 3,
            recent: 5,
            ..config
        };
        let keep = CacheConfig {
            prompt: Some(Prompt::Keep),
            ..config.clone()
        };
        let beside = CacheConfig {
            prompt: Some(Prompt::KeepBeside),
            ..config.clone()
        };
        for (config, prompt, bound) in [(config, 3, 24), (keep, 12, 24), (beside, 12, 36)] {
            let mut cache = build(&config, 1);
            run(
                &mut cache,
                &steps(3, 1, SHAPE, &[&[12][..], &[1; 50]].concat()),
            );
            for head in 0..2 {
                let held = cache.positions(0, 0, head);
                assert!(
                    (0..prompt).all(|id| held.contains(&id)),
                    "{config:?} {held:?}"
                );
                assert!((57..62).all(|id| held.contains(&id)), "{config:?} {held:?}");
            }
            let unbounded = config.decode.to_string() == "snapkv";
            // An interval of a quarter of the budget may be under way.
            assert!(unbounded || cache.physical_len(0) < bound + 6, "{config:?}");
        }
    }
}

#[test]
fn a_prompt_compressed_once_keeps_its_share() {
    let config = CacheConfig {
        prompt: Some(Prompt::CompressOnce(8)),
        ..CacheConfig::new(lazy(4), Budget::Tokens(20))
    };
    let mut cache = build(&config, 1);
    let steps = steps(4, 1, SHAPE, &[&[30][..], &[1; 40]].concat());
    run(&mut cache, &steps[..1]);
    let survivors: Vec<u32> = cache.positions(0, 0, 0).to_vec();
    assert_eq!(survivors.len(), 8);
    run(&mut cache, &steps[1..]);
    let held = cache.positions(0, 0, 0);
    assert!(survivors.iter().all(|id| held.contains(id)));
    assert_eq!(held.len(), 20);
}

#[test]
fn a_chunked_prompt_is_cut_down_after_each_chunk() {
    let config = CacheConfig::new("h2o".parse().unwrap(), Budget::Tokens(16));
    let mut cache = build(&config, 1);
    for (q, k, v) in &steps(5, 1, SHAPE, &[20, 20, 1, 20]) {
        cache.begin_prompt(q.dim(2).unwrap()).unwrap();
        cache.attend(0, q, k, v, 0.5).unwrap();
        assert_eq!(cache.physical_len(0), 16);
    }
    assert_eq!((cache.prompt_len(), cache.logical_len()), (61, 61));
}

#[test]
fn memory_is_given_back_and_stays_bounded() {
    let per_token = 2 * 2 * 16 * 4;
    for name in ["streaming", "h2o", "tova", "raas", "random", "lazy", "r-kv"] {
        let config = CacheConfig {
            prompt: Some(Prompt::Evictable),
            ..CacheConfig::new(name.parse().unwrap(), Budget::Tokens(32))
        };
        let mut cache = build(&config, 1);
        let steps = steps(6, 1, SHAPE, &[&[400][..], &[1; 100]].concat());
        run(&mut cache, &steps[..1]);
        let at_first = cache.bytes();
        let mut most = 0;
        run(&mut cache, &steps[1..20]);
        for step in &steps[20..] {
            run(&mut cache, std::slice::from_ref(step));
            most = most.max(cache.bytes());
        }
        // The budget, one window of 8 and the room to append.
        assert!(most <= (32 + 8 + 32) * per_token, "{name}: {most}");
        assert!(
            most < at_first || at_first <= 64 * per_token,
            "{name}: {at_first} {most}"
        );
        cache.reset();
        assert_eq!(cache.bytes(), 0);
    }
}

#[test]
fn a_sliding_window_bounds_the_full_cache() {
    let shape = LayerShape {
        sliding_window: Some(50),
        ..SHAPE
    };
    let mut cache = CacheSet::full(&[shape], 1, DType::F32, &Device::Cpu).unwrap();
    let all = steps(7, 1, shape, &[&[90][..], &[1; 300], &[5; 20]].concat());
    let (mut keys, mut values): (Vec<Tensor>, Vec<Tensor>) = (Vec::new(), Vec::new());
    for (q, k, v) in &all {
        let step = cache.begin(q.dim(2).unwrap()).unwrap();
        let got = cache.attend(0, q, k, v, 0.5).unwrap();
        keys.push(k.clone());
        values.push(v.clone());
        let (k, v) = (
            Tensor::cat(&keys, 2).unwrap(),
            Tensor::cat(&values, 2).unwrap(),
        );
        let want = naive(q, &k, &v, 0.5, |i, j| {
            j <= step.position + i && step.position + i < j + 50
        });
        assert!(distance(&flat(&got), &want) < 1e-5);
        assert!(
            cache.physical_len(0) < 50 + 64 + 50,
            "{}",
            cache.physical_len(0)
        );
    }
}

#[test]
fn impossible_settings_are_refused_with_their_numbers() {
    let build = |config: &CacheConfig| {
        CacheSet::new(&[SHAPE], 1, DType::F32, &Device::Cpu, config).map(|_| ())
    };
    let named =
        |name: &str, budget| CacheConfig::new(name.parse().unwrap(), Budget::Tokens(budget));
    assert!(matches!(
        build(&CacheConfig {
            sinks: 4,
            recent: 10,
            ..named("tova", 14)
        }),
        Err(Error::BudgetTooSmall {
            budget: 14,
            sinks: 4,
            recent: 10
        })
    ));
    build(&CacheConfig {
        sinks: 4,
        recent: 10,
        ..named("tova", 15)
    })
    .unwrap();
    assert!(matches!(
        build(&CacheConfig::new(lazy(20), Budget::Tokens(20))),
        Err(Error::BudgetTooSmall { .. })
    ));
    assert!(matches!(
        build(&CacheConfig::new(lazy(0), Budget::Tokens(20))),
        Err(Error::ZeroWindow { name: "window" })
    ));
    assert!(matches!(
        build(&CacheConfig {
            lag: Some(0),
            ..named("h2o", 20)
        }),
        Err(Error::ZeroWindow { .. })
    ));
    assert!(matches!(
        build(&CacheConfig {
            budget: Budget::Ratio(1.5),
            ..named("h2o", 20)
        }),
        Err(Error::Setting { name: "budget", .. })
    ));
    assert!(matches!(
        build(&CacheConfig {
            layer_budgets: Vec::from([Budget::Tokens(3)]),
            ..named("h2o", 20)
        }),
        Ok(())
    ));
    assert!(matches!(
        build(&named("oracle", 20)),
        Err(Error::NeedUnavailable { .. })
    ));
    for (name, need) in [
        ("h2o", "attention weights"),
        ("lazy", "attention weights"),
        ("r-kv", "queries"),
    ] {
        let got = CacheSet::external(&[SHAPE], 1, DType::F32, &Device::Cpu, &named(name, 40));
        assert!(
            matches!(got, Err(Error::NeedUnavailable { need: n, .. }) if n == need),
            "{name}"
        );
    }
}

#[test]
fn attention_computed_elsewhere_sees_the_same_tokens() {
    for name in ["full", "streaming", "random"] {
        let config = CacheConfig::new(name.parse().unwrap(), Budget::Tokens(24));
        let mut inside = build(&config, 2);
        let mut outside =
            CacheSet::external(&[SHAPE], 2, DType::F32, &Device::Cpu, &config).unwrap();
        for (q, k, v) in &steps(8, 2, SHAPE, &tokens()) {
            let t = q.dim(2).unwrap();
            inside.begin(t).unwrap();
            let want = inside.attend(0, q, k, v, 0.5).unwrap();
            outside.begin(t).unwrap();
            let (keys, values) = outside.extend(0, k, v).unwrap();
            let offset = keys.dim(2).unwrap() - t;
            let got = naive(q, &keys, &values, 0.5, |i, j| j <= offset + i);
            assert!(distance(&got, &flat(&want)) < 1e-5, "{name}");
        }
    }
}

#[test]
fn layers_may_differ_in_heads_and_budgets() {
    let shapes = [
        SHAPE,
        LayerShape {
            query_heads: 0,
            kv_heads: 0,
            ..SHAPE
        },
        LayerShape {
            query_heads: 3,
            kv_heads: 1,
            ..SHAPE
        },
    ];
    let config = CacheConfig {
        layer_budgets: vec![Budget::Tokens(20), Budget::Tokens(1), Budget::Tokens(10)],
        ..CacheConfig::new("h2o".parse().unwrap(), Budget::Tokens(1))
    };
    let mut cache = CacheSet::new(&shapes, 1, DType::F32, &Device::Cpu, &config).unwrap();
    let tokens = [&[16][..], &[1; 20]].concat();
    let (a, c) = (
        steps(9, 1, shapes[0], &tokens),
        steps(10, 1, shapes[2], &tokens),
    );
    for ((q, k, v), (q2, k2, v2)) in a.iter().zip(&c) {
        cache.begin(q.dim(2).unwrap()).unwrap();
        cache.attend(0, q, k, v, 0.5).unwrap();
        cache.attend(2, q2, k2, v2, 0.5).unwrap();
    }
    assert_eq!([0, 1, 2].map(|l| cache.physical_len(l)), [20, 0, 10]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    /// Whatever the policy, budget and rhythm of steps: heads hold equally many, distinct, seen positions; the newest is there
    /// where it is protected; the cache is within its bound; nothing panics.
    #[test]
    fn caches_stay_consistent_under_any_rhythm_of_steps(
        tokens in proptest::collection::vec(1usize..9, 1..40),
        prompt in 1usize..40,
        policy in 0usize..12,
        budget in 12usize..40,
        sinks in 0usize..4,
        seed in any::<u64>(),
    ) {
        let config = CacheConfig { sinks, recent: 1, ..all_policies(budget).swap_remove(policy) };
        let mut cache = build(&config, 2);
        // The first single token ends the prompt.
        let tokens = [&[prompt, 1][..], &tokens].concat();
        for (q, k, v) in &steps(seed, 2, SHAPE, &tokens) {
            let t = q.dim(2).unwrap();
            let step = cache.begin(t).unwrap();
            let out = cache.attend(0, q, k, v, 0.5).unwrap();
            prop_assert!(flat(&out).iter().all(|x| x.is_finite()));
            let next = step.position + t;
            for row in 0..4 {
                let mut held = cache.positions(0, row / 2, row % 2).to_vec();
                prop_assert_eq!(held.len(), cache.physical_len(0));
                held.sort_unstable();
                held.dedup();
                prop_assert_eq!(held.len(), cache.physical_len(0));
                prop_assert_eq!(held.last().copied(), Some(next as u32 - 1));
                prop_assert!((0..sinks.min(next)).all(|id| held.contains(&(id as u32))));
            }
            let name = config.decode.to_string();
            let kept_prompt = if matches!(name.as_str(), "raas" | "random" | "lazy-guarded") { prompt } else { 0 };
            if !matches!(name.as_str(), "full" | "snapkv") && step.position > prompt + budget {
                // A quarter of the budget as window, and a chunk on top.
                prop_assert!(cache.physical_len(0) <= budget.max(kept_prompt + sinks + 2 + budget / 4) + budget / 4 + t);
            }
        }
    }
}
