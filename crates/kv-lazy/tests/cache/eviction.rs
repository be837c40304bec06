//! What eviction does to attention, lengths and memory, for every policy.

use crate::common::{
    all_configurations, all_policies, distance, flat, lazy, naive, named, run, steps, with,
};
use candle_core::{DType, Device, Tensor};
use kv_lazy::policy::{Phase, Trigger, r_kv, scissorhands};
use kv_lazy::{Budget, CacheConfig, CacheSet, Error, LayerShape, PolicyConfig, Prompt};
use proptest::prelude::*;

const SHAPE: LayerShape = LayerShape {
    query_heads: 4,
    kv_heads: 2,
    head_dim: 16,
    sliding_window: None,
};

fn is_full(config: &CacheConfig) -> bool {
    matches!(config.decode, PolicyConfig::Full(_))
}

fn build(config: &CacheConfig, batch: usize) -> CacheSet {
    CacheSet::new(&[SHAPE], batch, DType::F32, &Device::Cpu, config).unwrap()
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
        assert_eq!(evicted, !is_full(&config), "{config:?}");
    }
}

#[test]
fn lengths_saw_between_the_budget_and_budget_plus_window_minus_one() {
    let (budget, window) = (20, 6);
    let mut cache = build(
        &CacheConfig::new(lazy(window, 0.02), Budget::Tokens(budget)),
        1,
    );
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
        if is_full(&config) {
            continue;
        }
        let config = with(config, |c| (c.sinks, c.recent) = (3, 5));
        let keep = with(config.clone(), |c| c.prompt = Some(Prompt::Keep));
        let beside = with(config.clone(), |c| c.prompt = Some(Prompt::KeepBeside));
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
    let config = with(CacheConfig::new(lazy(4, 0.02), Budget::Tokens(20)), |c| {
        c.prompt = Some(Prompt::CompressOnce(8));
    });
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
        let config = with(named(name, 32), |c| c.prompt = Some(Prompt::Evictable));
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
    let protected = |budget| with(named("tova", budget), |c| (c.sinks, c.recent) = (4, 10));
    assert!(matches!(
        build(&protected(14)),
        Err(Error::BudgetTooSmall {
            budget: 14,
            sinks: 4,
            recent: 10
        })
    ));
    build(&protected(15)).unwrap();
    assert!(matches!(
        build(&CacheConfig::new(lazy(20, 0.02), Budget::Tokens(20))),
        Err(Error::BudgetTooSmall { .. })
    ));
    assert!(matches!(
        build(&CacheConfig::new(lazy(0, 0.02), Budget::Tokens(20))),
        Err(Error::ZeroWindow { name: "window" })
    ));
    assert!(matches!(
        build(&with(named("h2o", 20), |c| c.evict_every = Some(0))),
        Err(Error::ZeroWindow { .. })
    ));
    assert!(matches!(
        build(&with(named("h2o", 20), |c| c.budget = Budget::Ratio(1.5))),
        Err(Error::Setting { name: "budget", .. })
    ));
    let one_layer = |c: &mut CacheConfig| c.layer_budgets = vec![Budget::Tokens(3)];
    assert!(matches!(build(&with(named("h2o", 20), one_layer)), Ok(())));
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
    for name in [
        "full",
        "streaming",
        "random",
        "knorm",
        "keydiff",
        "lagkv",
        "vase-dkv",
    ] {
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
    let config = with(named("h2o", 1), |c| {
        c.layer_budgets = vec![Budget::Tokens(20), Budget::Tokens(1), Budget::Tokens(10)];
    });
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

/// What is held after steps of 40, 1 and 17 tokens and single tokens: no more than the budget and, where evictions come every W steps, what
/// joined since the last.
#[test]
fn steps_of_several_tokens_keep_every_policy_within_its_budget() {
    let budget = 16;
    for config in all_policies(budget) {
        let name = config.decode.name();
        if name == "full" {
            continue; // It keeps what is generated, as snapkv does that is not told to repeat itself.
        }
        let config = with(config, |c| c.prompt = Some(Prompt::Evictable));
        for config in [config.clone(), with(config, |c| c.evict_every = Some(6))] {
            if name == "snapkv" && config.evict_every.is_none() {
                continue;
            }
            let policy = config.build(config.budget).unwrap();
            let window = match policy.rule(Phase::Decode).decode {
                Trigger::Every(window) => window,
                _ => 1,
            };
            let mut cache = build(&config, 1);
            let tokens = [&[40, 1, 17][..], &[1; 9], &[5, 30, 2]].concat();
            let mut decoded = 0;
            for (q, k, v) in &steps(11, 1, SHAPE, &tokens) {
                let t = q.dim(2).unwrap();
                cache.begin(t).unwrap();
                cache.attend(0, q, k, v, 0.5).unwrap();
                decoded += if cache.logical_len() == 40 { 0 } else { t };
                if decoded >= window {
                    let held = cache.physical_len(0);
                    let bound = budget + decoded % window;
                    assert!(held <= bound, "{config:?}: {held} after {decoded}");
                }
            }
        }
    }
}

#[test]
fn a_prefill_policy_is_given_its_own_weights_whatever_the_decoding_policy_needs() {
    let prompt = steps(12, 2, SHAPE, &[40]);
    for name in ["tova", "scissorhands", "h2o"] {
        let held = |config: CacheConfig| {
            let mut cache = build(&config, 2);
            run(&mut cache, &prompt);
            (0..4)
                .map(|row| cache.positions(0, row / 2, row % 2).to_vec())
                .collect::<Vec<_>>()
        };
        let alone = held(named(name, 16));
        for decode in ["h2o", "tova", "lazy", "raas", "scissorhands", "random"] {
            let both = with(named(decode, 16), |c| {
                c.prefill = name.parse().ok();
                c.prompt = Some(Prompt::Evictable);
            });
            assert_eq!(held(both), alone, "prefill {name}, decode {decode}");
        }
    }
}

/// While nothing is evicted, as in the verification of speculative tokens.
#[test]
fn a_step_of_several_tokens_leaves_the_same_state_as_single_steps() {
    let names = [
        "lazy",
        "lazy-reference",
        "raas",
        "scissorhands",
        "tova",
        "h2o",
    ];
    for name in names {
        let config = with(named(name, 40), |c| c.evict_every = Some(16));
        let singles = steps(13, 2, SHAPE, &[&[30][..], &[1; 50]].concat());
        let mut one = build(&config, 2);
        let want = run(&mut one, &singles);
        let mut many = build(&config, 2);
        run(&mut many, &singles[..1]);
        let mut from = 1;
        // Ends of steps are ends of windows.
        for tokens in [1, 3, 7, 5, 16, 4, 12, 2] {
            let join = |part: fn(&(Tensor, Tensor, Tensor)) -> &Tensor| {
                let parts: Vec<_> = singles[from..from + tokens].iter().map(part).collect();
                Tensor::cat(&parts, 2).unwrap()
            };
            let (q, k, v) = (join(|s| &s.0), join(|s| &s.1), join(|s| &s.2));
            many.begin(tokens).unwrap();
            let out = many.attend(0, &q, &k, &v, 0.5).unwrap();
            for t in 0..tokens {
                let got = flat(&out.narrow(2, t, 1).unwrap());
                assert!(distance(&got, &want[from + t]) < 1e-5, "{name} step {from}");
            }
            from += tokens;
        }
        for row in 0..4 {
            let positions = |cache: &CacheSet| cache.positions(0, row / 2, row % 2).to_vec();
            assert_eq!(positions(&many), positions(&one), "{name}");
        }
    }
}

#[test]
fn settings_beyond_what_positions_can_count_are_refused_or_mean_everything() {
    let build = |config: CacheConfig| {
        CacheSet::new(&[SHAPE], 1, DType::F32, &Device::Cpu, &config).map(|_| ())
    };
    let ratio = |name: &str| with(named(name, 1), |c| c.budget = Budget::Ratio(0.5));
    for huge in [1 << 32, (1 << 32) + 1, usize::MAX] {
        for config in [
            with(ratio("h2o"), |c| c.evict_every = Some(huge)),
            with(ratio("h2o"), |c| c.sinks = huge),
            with(ratio("h2o"), |c| c.recent = huge),
            with(named("h2o", usize::MAX), |c| c.recent = huge),
            CacheConfig::new(lazy(huge, 1e-4), Budget::Ratio(0.5)),
            CacheConfig::new(
                {
                    let mut settings = r_kv::Settings::default();
                    settings.window = huge;
                    PolicyConfig::RKv(settings)
                },
                Budget::Ratio(0.5),
            ),
        ] {
            let error = build(config.clone()).unwrap_err();
            let refused = matches!(error, Error::Setting { .. } | Error::BudgetTooSmall { .. });
            assert!(refused, "{config:?}: {error}");
        }
        let both = with(named("h2o", 20), |c| (c.sinks, c.recent) = (huge, huge));
        let error = build(both).unwrap_err();
        let refused = matches!(error, Error::BudgetTooSmall { .. } | Error::Setting { .. });
        assert!(refused && !error.to_string().is_empty());
        let once = with(named("h2o", 20), |c| {
            c.prompt = Some(Prompt::CompressOnce(huge))
        });
        assert!(matches!(build(once), Err(Error::BudgetTooSmall { .. })));
        let mut settings = scissorhands::Settings::default();
        settings.history = huge;
        let config = CacheConfig::new(PolicyConfig::Scissorhands(settings), Budget::Tokens(20));
        assert!(matches!(
            build(config),
            Err(Error::Setting {
                name: "history",
                ..
            })
        ));
    }
    // The largest that there is: as many tokens protected as there can be, and no eviction for as many steps.
    let most = u32::MAX as usize;
    for change in [
        (|c: &mut CacheConfig, most| c.evict_every = Some(most)) as fn(&mut CacheConfig, usize),
        |c, most| c.sinks = most,
        |c, most| c.recent = most,
    ] {
        let mut cache = build_ratio(change, most);
        run(
            &mut cache,
            &steps(14, 1, SHAPE, &[&[20][..], &[1; 20]].concat()),
        );
        assert!(cache.physical_len(0) >= 20);
    }
    let wide = LayerShape {
        sliding_window: Some(usize::MAX),
        ..SHAPE
    };
    let mut cache = CacheSet::full(&[wide], 1, DType::F32, &Device::Cpu).unwrap();
    let mut plain = CacheSet::full(&[SHAPE], 1, DType::F32, &Device::Cpu).unwrap();
    let all = steps(15, 1, SHAPE, &[40, 1, 3]);
    assert_eq!(run(&mut cache, &all), run(&mut plain, &all));
    for shape in [
        LayerShape {
            sliding_window: Some(0),
            ..SHAPE
        },
        LayerShape {
            head_dim: 0,
            ..SHAPE
        },
    ] {
        assert!(CacheSet::full(&[shape], 1, DType::F32, &Device::Cpu).is_err());
    }
    assert!(CacheSet::full(&[SHAPE], usize::MAX, DType::F32, &Device::Cpu).is_err());
    assert!(matches!(cache.begin(usize::MAX), Err(Error::Step { .. })));
}

fn build_ratio(change: fn(&mut CacheConfig, usize), value: usize) -> CacheSet {
    let config = with(named("h2o", 1), |c| {
        c.budget = Budget::Ratio(0.5);
        change(c, value);
    });
    build(&config, 1)
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
        let config = with(all_policies(budget).swap_remove(policy), |c| {
            (c.sinks, c.recent) = (sinks, 1);
        });
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
