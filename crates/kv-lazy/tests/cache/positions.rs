//! Consecutive positions, and heads that share their budgets.

use crate::common::{Qkv, distance, flat, naive, named, run, steps, with};
use candle_core::{DType, Device, Tensor};
use kv_lazy::policy::h2o::{self, Normalise};
use kv_lazy::{
    Budget, CacheConfig, CacheSet, Error, LayerShape, Pairs, PolicyConfig, Positions, Rotary,
};

const SHAPE: LayerShape = LayerShape {
    query_heads: 4,
    kv_heads: 2,
    head_dim: 16,
    sliding_window: None,
};

fn build(config: &CacheConfig, batch: usize) -> kv_lazy::Result<CacheSet> {
    CacheSet::new(&[SHAPE], batch, DType::F32, &Device::Cpu, config)
}

/// `x` `[B, H, T, d]` with each token rotated to its position.
fn rotated(x: &Tensor, rotary: &Rotary, positions: &[i64]) -> Tensor {
    let (b, h, t, d) = x.dims4().unwrap();
    let mut numbers = flat(x);
    for (i, row) in numbers.chunks_exact_mut(d).enumerate() {
        rotary.rotate(row, positions[i % t]);
    }
    Tensor::from_vec(numbers, (b, h, t, d), &Device::Cpu).unwrap()
}

fn consecutive(rotary: &Rotary, storage: &str, budget: usize) -> CacheConfig {
    with(named("streaming", budget), |c| {
        c.positions = Positions::Consecutive;
        c.rotary = Some(rotary.clone());
        c.storage = storage.parse().unwrap();
        c.storage.residual = 8;
    })
}

#[test]
fn consecutive_positions_are_the_ranks_of_the_cached_tokens() {
    let llama3: Vec<f64> = vec![1.0, 0.1, 0.01, 0.002, 3e-4, 1e-4, 4e-5, 1e-6];
    for rotary in [
        Rotary::plain(10_000.0, 16),
        // Some elements are not rotated.
        Rotary::plain(10_000.0, 8),
        Rotary::new(llama3, Pairs::Neighbours),
    ] {
        // In the last case there is room for blocks of quantised tokens.
        for (storage, budget, bar) in [
            ("f32", 12, 1e-5),
            ("f16", 12, 4e-3),
            ("int8", 12, 4e-3),
            ("int8", 160, 2e-2),
        ] {
            let mut cache = build(&consecutive(&rotary, storage, budget), 2).unwrap();
            let mut held: Vec<(Tensor, Tensor)> = Vec::new();
            let tokens = [vec![6], vec![1; 2 * budget - 10], vec![3], vec![1; 5]].concat();
            for (q, k, v) in steps(11, 2, SHAPE, &tokens) {
                let t = q.dim(2).unwrap();
                let step = cache.begin(t).unwrap();
                let own: Vec<i64> = (0..t).map(|i| (step.position + i) as i64).collect();
                let (near, far) = (rotated(&q, &rotary, &own), rotated(&k, &rotary, &own));
                let got = cache.attend(0, &near, &far, &v, 0.5).unwrap();
                for i in 0..t {
                    held.push((k.narrow(2, i, 1).unwrap(), v.narrow(2, i, 1).unwrap()));
                }
                // Four sinks and the newest: what is attended has at most the budget's tokens, or the step's own where these are more.
                let n = held.len();
                let newest = budget - 4;
                let kept: Vec<usize> = (0..n).filter(|&i| i < 4 || i + newest >= n).collect();
                let part = |which: fn(&(Tensor, Tensor)) -> &Tensor| {
                    let parts: Vec<&Tensor> = kept.iter().map(|&i| which(&held[i])).collect();
                    Tensor::cat(&parts, 2).unwrap()
                };
                let ranks: Vec<i64> = (0..kept.len() as i64).collect();
                let keys = rotated(&part(|kv| &kv.0), &rotary, &ranks);
                let last = &ranks[kept.len() - t..];
                let query = rotated(&q, &rotary, last);
                let first = kept.len() - t;
                let want = naive(&query, &keys, &part(|kv| &kv.1), 0.5, |i, j| j <= first + i);
                let off = distance(&flat(&got), &want);
                assert!(off < bar, "{storage} {step:?}: {off}");
            }
            if budget == 160 {
                let f16 = 2 * 2 * 2 * budget * 16 * 2;
                assert!(cache.bytes() < f16, "{} of {f16}", cache.bytes());
            }
        }
    }
}

#[test]
fn consecutive_positions_are_refused_where_they_would_not_be_exact() {
    let rotary = Rotary::plain(10_000.0, 16);
    let of = |name: &str| {
        with(consecutive(&rotary, "f32", 12), |c| {
            c.decode = name.parse().unwrap()
        })
    };
    for config in [
        of("h2o"),
        of("full"),
        with(of("streaming"), |c| c.guard_values = 2),
        with(of("streaming"), |c| c.prompt = Some(kv_lazy::Prompt::Keep)),
        with(of("streaming"), |c| {
            c.storage = "int4".parse().unwrap();
            c.storage.sinks = 2;
        }),
        with(of("streaming"), |c| c.rotary = Some(Rotary::plain(1e4, 64))),
    ] {
        assert!(
            matches!(build(&config, 1), Err(Error::Setting { .. })),
            "{config:?}"
        );
    }
    // A sliding window masks by the positions of the text.
    let sliding = LayerShape {
        sliding_window: Some(4096),
        ..SHAPE
    };
    let config = of("streaming");
    let error = CacheSet::new(&[SHAPE, sliding], 1, DType::F32, &Device::Cpu, &config);
    assert!(
        matches!(
            error,
            Err(Error::Setting {
                name: "positions",
                ..
            })
        ),
        "{error:?}"
    );
    let unrotated = with(of("streaming"), |c| c.rotary = None);
    assert!(matches!(
        build(&unrotated, 1),
        Err(Error::NeedUnavailable { .. })
    ));
    let external = CacheSet::external(&[SHAPE], 1, DType::F32, &Device::Cpu, &of("streaming"));
    assert!(external.is_err());
}

fn shared(name: &str, budget: usize, storage: &str) -> CacheConfig {
    with(named(name, budget), |c| {
        c.shared_budget = Some(0.2);
        c.storage = storage.parse().unwrap();
        c.evict_every = Some(4);
        if name == "h2o" {
            let mut mean = h2o::Settings::default();
            (mean.recent, mean.normalise) = (Some(4), Normalise::Mean);
            c.decode = PolicyConfig::H2o(mean);
        }
    })
}

fn lens(cache: &CacheSet, batch: usize) -> Vec<usize> {
    let rows = (0..batch).flat_map(|b| (0..2).map(move |h| (b, h)));
    rows.map(|(b, h)| cache.positions(0, b, h).len()).collect()
}

/// One KV head attends sharply, the other evenly.
fn uneven(seed: u64, tokens: &[usize]) -> Vec<Qkv> {
    let all = steps(seed, 2, SHAPE, tokens);
    let scaled = |(q, k, v): Qkv| {
        let factors = Tensor::new(&[0.05f32, 0.05, 3.0, 3.0], &Device::Cpu).unwrap();
        let factors = factors.reshape((1, 4, 1, 1)).unwrap();
        (q.broadcast_mul(&factors).unwrap(), k, v)
    };
    all.into_iter().map(scaled).collect()
}

#[test]
fn heads_that_share_budgets_hold_what_they_need_and_no_more_in_all() {
    // Rows of 24 tokens are never quantised.
    for (name, storage, budget, bar) in [
        ("snapkv", "f32", 24, 1e-5),
        ("dropkv", "f32", 24, 1e-5),
        ("vase-attnv", "f32", 24, 1e-5),
        ("h2o", "f32", 24, 1e-5),
        ("snapkv", "int8", 100, 5e-2),
        ("h2o", "k8v4", 100, 0.15),
    ] {
        let prompt = 60 * budget / 24;
        let tokens = [vec![prompt], vec![1; 40], vec![5], vec![1; 30]].concat();
        let config = with(shared(name, budget, storage), |c| c.storage.residual = 8);
        let mut cache = build(&config, 2).unwrap();
        let mut held: Vec<(Tensor, Tensor)> = Vec::new();
        let mut differ = false;
        for (q, k, v) in uneven(3, &tokens) {
            let step = cache.begin(q.dim(2).unwrap()).unwrap();
            let before: Vec<Vec<u32>> = (0..4)
                .map(|row| cache.positions(0, row / 2, row % 2).to_vec())
                .collect();
            let got = cache.attend(0, &q, &k, &v, 0.5).unwrap();
            held.push((k.clone(), v.clone()));
            let keys = Tensor::cat(&held.iter().map(|kv| &kv.0).collect::<Vec<_>>(), 2).unwrap();
            let values = Tensor::cat(&held.iter().map(|kv| &kv.1).collect::<Vec<_>>(), 2).unwrap();
            for (row, before) in before.iter().enumerate() {
                let part = |x: &Tensor, from, count| {
                    x.narrow(0, row / 2, 1)
                        .unwrap()
                        .narrow(1, from, count)
                        .unwrap()
                };
                let h = row % 2;
                let seen = |i: usize, j: usize| {
                    j <= step.position + i && (j >= step.position || before.contains(&(j as u32)))
                };
                let want = naive(
                    &part(&q, 2 * h, 2),
                    &part(&keys, h, 1),
                    &part(&values, h, 1),
                    0.5,
                    seen,
                );
                let off = distance(&flat(&part(&got, 2 * h, 2)), &want);
                assert!(off < bar, "{name} {storage} {step:?} row {row}: {off}");
            }
            let lens = lens(&cache, 2);
            differ |= lens[0] != lens[1];
            for pair in lens.chunks(2) {
                // Up to four steps, or one of five tokens, between evictions.
                assert!(pair[0] + pair[1] <= 2 * (budget + 8), "{name} {pair:?}");
                assert!(
                    pair.iter().all(|&n| step.position < prompt || n >= 4),
                    "{name} {pair:?}"
                );
            }
        }
        assert!(differ, "{name}: both heads always held as many");
        let lens = lens(&cache, 2);
        assert!(cache.bytes() > 0 && cache.physical_len(0) == *lens.iter().max().unwrap());
        if storage != "f32" {
            let f16 = lens.iter().sum::<usize>() * 16 * 2 * 2;
            assert!(cache.bytes() < f16, "{} of {f16}", cache.bytes());
        }
    }
}

#[test]
fn shared_budgets_free_bytes_and_do_not_depend_on_batches_or_snapshots() {
    let tokens = [vec![60], vec![1; 50]].concat();
    let config = shared("snapkv", 24, "f32");
    let all = uneven(9, &tokens);
    let mut cache = build(&config, 2).unwrap();
    let want = run(&mut cache, &all);
    let full = 2 * 2 * 110 * 16 * 4 * 2;
    assert!(cache.bytes() < full / 2, "{} of {full}", cache.bytes());
    // Each sequence alone.
    for sequence in 0..2 {
        let of = |x: &Tensor| x.narrow(0, sequence, 1).unwrap().contiguous().unwrap();
        let own: Vec<Qkv> = all.iter().map(|(q, k, v)| (of(q), of(k), of(v))).collect();
        let mut alone = build(&config, 1).unwrap().numbered_from(sequence).unwrap();
        for (got, want) in run(&mut alone, &own).iter().zip(&want) {
            let half = want.len() / 2;
            assert_eq!(got[..], want[sequence * half..(sequence + 1) * half]);
        }
    }
    let mut again = build(&config, 2).unwrap();
    run(&mut again, &all[..20]);
    let snapshot = again.snapshot();
    run(&mut again, &all[20..]);
    again.restore(&snapshot).unwrap();
    assert_eq!(run(&mut again, &all[20..])[..], want[20..]);
}

#[test]
fn policies_whose_scores_cannot_be_compared_do_not_share() {
    for name in [
        "random",
        "keydiff",
        "knorm",
        "raas",
        "lazy",
        "streaming",
        "h2o",
        "tri-attention",
    ] {
        let config = with(named(name, 24), |c| c.shared_budget = Some(0.2));
        let got = build(&config, 1);
        assert!(
            matches!(
                got,
                Err(Error::Setting {
                    name: "shared-budget",
                    ..
                })
            ),
            "{name}"
        );
    }
    let wide = with(shared("snapkv", 24, "f32"), |c| c.shared_budget = Some(1.5));
    assert!(build(&wide, 1).is_err());
    let external = CacheSet::external(
        &[SHAPE],
        1,
        DType::F32,
        &Device::Cpu,
        &shared("snapkv", 24, "f32"),
    );
    assert!(external.is_err());
    let ratio = with(shared("snapkv", 24, "f32"), |c| {
        c.budget = Budget::Ratio(0.5)
    });
    assert!(build(&ratio, 1).is_ok());
}
