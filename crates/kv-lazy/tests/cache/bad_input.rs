//! What cannot work is a typed error when a cache is built or a snapshot restored, and leaves caches as they were.

use crate::common::{all_policies, named, run, steps, with};
use candle_core::{DType, Device, Tensor};
use kv_lazy::{
    Budget, CacheConfig, CacheSet, Error, LayerCache, LayerShape, Pairs, Positions, Prompt, Rotary,
    StorageConfig,
};

fn shape(head_dim: usize) -> LayerShape {
    LayerShape {
        query_heads: 4,
        kv_heads: 2,
        head_dim,
        sliding_window: None,
    }
}

fn build(config: &CacheConfig, head_dim: usize) -> Result<CacheSet, Error> {
    CacheSet::new(&[shape(head_dim)], 1, DType::F32, &Device::Cpu, config)
}

#[test]
fn a_budget_must_hold_sinks_and_recent_tokens_and_one_more_under_every_policy() {
    for config in all_policies(100) {
        for storage in ["f16", "int8", "int4"] {
            let within = |budget| {
                with(config.clone(), |c| {
                    (c.sinks, c.recent) = (40, 60);
                    c.budget = Budget::Tokens(budget);
                    c.storage = storage.parse().unwrap();
                })
            };
            build(&within(101), 16).unwrap();
            LayerCache::new(&within(101), 0).unwrap();
            let small = [
                build(&within(100), 16).map(|_| ()),
                LayerCache::new(&within(100), 0).map(|_| ()),
                build(&within(0), 16).map(|_| ()),
            ];
            for error in small {
                if config.keeps_all() {
                    error.unwrap();
                } else {
                    assert!(
                        matches!(
                            error,
                            Err(Error::BudgetTooSmall {
                                budget: 0 | 100,
                                sinks: 40,
                                recent: 60..,
                            })
                        ),
                        "{config:?} {error:?}"
                    );
                }
            }
            if config.keeps_all() {
                continue;
            }
            // A prompt compressed to its sinks alone, to one token more, to as much as fits beside the recent tokens, and to one token more.
            let once = |tokens| {
                with(within(120), |c| {
                    c.prompt = Some(Prompt::CompressOnce(tokens))
                })
            };
            let error = build(&once(40), 16);
            assert!(
                matches!(error, Err(Error::BudgetTooSmall { budget: 40, .. })),
                "{config:?}"
            );
            for tokens in [41, 59] {
                let mut cache = build(&once(tokens), 16).unwrap();
                run(&mut cache, &steps(3, 1, shape(16), &[150]));
                // Scissorhands goes below its budget.
                let held = cache.physical_len(0);
                assert!((40..=tokens).contains(&held), "{held} {config:?}");
                if config.decode.name() != "scissorhands" {
                    assert_eq!(held, tokens, "{config:?}");
                }
            }
            let error = build(&once(60), 16);
            assert!(
                matches!(error, Err(Error::BudgetTooSmall { budget: 120, .. })),
                "{config:?}"
            );
        }
    }
}

#[test]
fn rotations_that_do_not_fit_a_head_are_refused() {
    let streaming = |rotary: Rotary| {
        with(named("streaming", 20), |c| {
            c.positions = Positions::Consecutive;
            c.rotary = Some(rotary);
        })
    };
    let tri = |rotary: Rotary| with(named("tri-attention", 20), |c| c.rotary = Some(rotary));
    let pairs = |count| Rotary::new(vec![0.1; count], Pairs::Halves);
    for (rotary, head_dim) in [
        (pairs(5), 9),
        (pairs(9), 16),
        (Rotary::new(vec![f64::NAN], Pairs::Neighbours), 16),
    ] {
        for config in [streaming(rotary.clone()), tri(rotary.clone())] {
            let error = build(&config, head_dim);
            assert!(
                matches!(error, Err(Error::Setting { name: "rotary", .. })),
                "{error:?}"
            );
            // A handle learns the head's size from its first call.
            let x =
                |heads| Tensor::ones((1, heads, 1, head_dim), DType::F32, &Device::Cpu).unwrap();
            let mut cache = LayerCache::new(&config, 0).unwrap();
            let error = cache.attend(&x(4), &x(2), &x(2), 0.1).unwrap_err();
            assert!(error.to_string().contains("`rotary`"), "{error}");
        }
    }
    // An odd head whose even part is rotated is fine, and a layer that does not rotate.
    for count in [0, 4] {
        build(&streaming(pairs(count)), 9).unwrap();
        build(&tri(pairs(count)), 9).unwrap();
    }
    for storage in [
        StorageConfig::int8(),
        StorageConfig::k8v4(),
        StorageConfig::int4(),
    ] {
        for head_dim in [1, 9, 20, 63, 8 * 17 * 64] {
            for rotate in [None, Some(true), Some(false)] {
                let config = with(named("full", 1), |c| {
                    c.storage = storage;
                    (c.storage.rotate_keys, c.storage.rotate_values) = (rotate, rotate);
                });
                let error = build(&config, head_dim);
                assert!(
                    matches!(error, Err(Error::Setting { name: "group", .. })),
                    "{head_dim} {error:?}"
                );
            }
        }
    }
}

#[test]
fn settings_that_a_cache_of_every_token_would_not_heed_are_refused() {
    for (name, change) in [
        (
            "prompt",
            (|c| c.prompt = Some(Prompt::CompressOnce(100))) as fn(&mut CacheConfig),
        ),
        ("guard-values", |c| c.guard_values = 3),
        ("shared-budget", |c| c.shared_budget = Some(0.2)),
    ] {
        let config = with(named("full", 64), change);
        for error in [
            build(&config, 16).map(|_| ()),
            LayerCache::new(&config, 0).map(|_| ()),
        ] {
            assert!(
                matches!(error, Err(Error::Setting { name: of, .. }) if of == name),
                "{error:?}"
            );
        }
    }
    // What a full cache does anyway may be asked for.
    let kept = with(named("full", 64), |c| {
        (c.prompt, c.sinks) = (Some(Prompt::Keep), 4);
    });
    build(&kept, 16).unwrap();
}

#[test]
fn no_sequences_and_more_queries_than_positions_are_refused() {
    let none = CacheSet::new(
        &[shape(16)],
        0,
        DType::F32,
        &Device::Cpu,
        &named("random", 20),
    );
    assert!(matches!(none, Err(Error::Setting { name: "batch", .. })));
    let empty = Tensor::zeros((0, 2, 3, 16), DType::F32, &Device::Cpu).unwrap();
    let mut cache = LayerCache::new(&named("full", 20), 0).unwrap();
    let error = cache.append(&empty, &empty).unwrap_err().to_string();
    assert!(error.contains("batch"), "{error}");
    let many: CacheConfig = serde_json::from_str(
        r#"{"decode": {"policy": "tri-attention", "queries": 18446744073709551615}, "budget": {"tokens": 64}}"#,
    )
    .unwrap();
    let many = with(many, |c| c.rotary = Some(Rotary::plain(1e4, 16)));
    let error = build(&many, 16);
    assert!(
        matches!(
            error,
            Err(Error::Setting {
                name: "queries",
                ..
            })
        ),
        "{error:?}"
    );
}

#[test]
fn what_a_path_cannot_give_is_refused_when_the_cache_is_built() {
    let weights = [
        "h2o",
        "tova",
        "scissorhands",
        "raas",
        "lazy",
        "lazy-guarded",
    ];
    let queries = ["snapkv", "r-kv", "dropkv", "vase-attnv", "tri-attention"];
    for (names, need) in [
        (&weights[..], "attention weights"),
        (&queries[..], "queries"),
    ] {
        for name in names {
            // For decoding, and for the prompt alone.
            let alone = named(name, 60);
            let prefill = with(named("random", 60), |c| c.prefill = name.parse().ok());
            for config in [alone, prefill] {
                let config = with(config, |c| c.rotary = Some(Rotary::plain(1e4, 16)));
                let got = CacheSet::external(&[shape(16)], 1, DType::F32, &Device::Cpu, &config);
                assert!(
                    matches!(&got, Err(Error::NeedUnavailable { need: n, .. }) if *n == need),
                    "{name} {got:?}"
                );
                let handle = LayerCache::new(&config, 0).unwrap();
                let got = handle.clone().for_append();
                assert!(
                    matches!(&got, Err(Error::NeedUnavailable { need: n, .. }) if *n == need),
                    "{name}"
                );
                // Without that check it is the first call that fails, not one after an eviction.
                let k = Tensor::ones((1, 2, 3, 16), DType::F32, &Device::Cpu).unwrap();
                assert!(handle.clone().append(&k, &k).is_err(), "{name}");
                let mut set = build(&config, 16).unwrap();
                set.begin(3).unwrap();
                let got = set.extend(0, &k, &k);
                assert!(matches!(got, Err(Error::NeedUnavailable { .. })), "{name}");
            }
        }
    }
    let unrotated = with(named("tri-attention", 60), |c| c.rotary = None);
    for got in [
        build(&unrotated, 16).map(|_| ()),
        LayerCache::new(&unrotated, 0).map(|_| ()),
        build(&named("oracle", 60), 16).map(|_| ()),
    ] {
        assert!(matches!(got, Err(Error::NeedUnavailable { .. })), "{got:?}");
    }
}

#[test]
fn snapshots_of_another_configuration_are_refused_and_change_nothing() {
    let config = with(named("keydiff", 24), |c| c.rotary = None);
    let all = steps(41, 1, shape(16), &[&[30][..], &[1; 20]].concat());
    let mut cache = build(&config, 16).unwrap();
    run(&mut cache, &all[..10]);
    let held = cache.snapshot();
    let want = run(&mut cache, &all[10..]);
    cache.restore(&held).unwrap();
    let change = |change: &dyn Fn(&mut CacheConfig)| with(config.clone(), |c| change(c));
    let others = [
        change(&|c| c.decode = "knorm".parse().unwrap()),
        change(&|c| c.budget = Budget::Tokens(25)),
        change(&|c| c.budget = Budget::Ratio(0.5)),
        change(&|c| c.storage = StorageConfig::int8()),
        change(&|c| c.sinks = 5),
        change(&|c| c.recent = 15),
        change(&|c| c.evict_every = Some(9)),
        change(&|c| c.prompt = Some(Prompt::Keep)),
        change(&|c| c.guard_values = 2),
        change(&|c| c.prefill = "random".parse().ok()),
    ];
    let mut foreign: Vec<CacheSet> = others.iter().map(|c| build(c, 16).unwrap()).collect();
    let of = |layers: &[LayerShape], batch, dtype| {
        CacheSet::new(layers, batch, dtype, &Device::Cpu, &config).unwrap()
    };
    foreign.push(of(&[shape(16); 2], 1, DType::F32));
    foreign.push(of(&[shape(32)], 1, DType::F32));
    foreign.push(of(&[shape(16)], 2, DType::F32));
    foreign.push(of(&[shape(16)], 1, DType::F16));
    for (index, other) in foreign.iter_mut().enumerate() {
        for snapshot in [other.snapshot(), {
            other.begin(1).unwrap();
            other.snapshot()
        }] {
            let got = cache.restore(&snapshot);
            assert!(
                matches!(got, Err(Error::Snapshot { .. })),
                "{index} {got:?}"
            );
        }
    }
    assert_eq!(run(&mut cache, &all[10..]), want);
}
