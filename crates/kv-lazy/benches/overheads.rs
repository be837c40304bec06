//! What eviction costs beside attention itself, each figure beside its bound.
//!
//! One layer of an 8B model (32 query heads, 8 KV heads of 128), by one thread and by all: LazyEviction in f32 and bf16, every policy that scores by keys, values or the last queries in f32, f16
//! and quantised. The static cache is the full one, at each
//! step at the same length. Steps of all configurations are interleaved and the fastest of each kept, so that a busy machine disturbs
//! them alike; criterion's own figures per step follow.

use candle_core::{DType, Device, Tensor};
use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use kv_lazy::policy::lazy;
use kv_lazy::{Budget, CacheConfig, CacheSet, LayerShape, PolicyConfig, Prompt, Rotary, attention};
use std::hint::black_box;
use std::time::Instant;

const SHAPE: LayerShape = LayerShape {
    query_heads: 32,
    kv_heads: 8,
    head_dim: 128,
    sliding_window: None,
};
const WINDOW: usize = 64;
const SCALE: f64 = 0.088;

fn random(heads: usize, tokens: usize) -> Tensor {
    Tensor::randn(0.0f32, 1.0, (1, heads, tokens, 128), &Device::Cpu).expect("a CPU tensor")
}

/// A cache under `config` after a prompt of `n` tokens.
fn filled(config: &CacheConfig, n: usize, dtype: DType) -> CacheSet {
    let mut cache = CacheSet::new(&[SHAPE], 1, dtype, &Device::Cpu, config).expect("valid");
    for _ in 0..n / 32 {
        cache.begin_prompt(32).expect("a step");
        let (q, k) = (random(32, 32), random(8, 32));
        cache.attend(0, &q, &k, &k, SCALE).expect("attention");
    }
    cache
}

fn named(name: &str, budget: usize) -> CacheConfig {
    let policy = name.parse().expect("a policy");
    let mut config = CacheConfig::new(policy, Budget::Tokens(budget));
    if name != "full" {
        config.prompt = Some(Prompt::Evictable);
    }
    config
}

fn every_window(budget: usize) -> CacheConfig {
    let mut settings = lazy::Settings::default();
    settings.window = Some(WINDOW);
    CacheConfig::new(PolicyConfig::Lazy(settings), Budget::Tokens(budget))
}

/// Seconds of each step of two windows, after a window to warm up: the fastest of several rounds.
fn seconds(caches: &mut [CacheSet], window: usize, rounds: usize) -> Vec<Vec<f64>> {
    let (q, k) = (random(32, 1), random(8, 1));
    let fresh: Vec<_> = caches.iter().map(CacheSet::snapshot).collect();
    let steps = 2 * window;
    let mut best = vec![vec![f64::INFINITY; steps]; caches.len()];
    for _ in 0..rounds {
        for (cache, fresh) in caches.iter_mut().zip(&fresh) {
            cache.restore(fresh).expect("the same cache");
        }
        // Storage grows when a restored cache goes on, and takes its size at the first eviction.
        for step in 0..window + steps {
            for (cache, best) in caches.iter_mut().zip(&mut best) {
                let started = Instant::now();
                cache.begin(1).expect("a step");
                black_box(cache.attend(0, &q, &k, &k, SCALE).expect("attention"));
                if let Some(step) = step.checked_sub(window) {
                    best[step] = best[step].min(started.elapsed().as_secs_f64());
                }
            }
        }
    }
    best
}

/// Prints a share beside its bound.
fn row(name: &str, measured: f64, bound: f64) {
    let verdict = if measured <= bound { "within" } else { "above" };
    println!(
        "{name:<52} {:>8.2} %   ≤ {:.0} %   {verdict}",
        100.0 * measured,
        100.0 * bound
    );
}

fn table(_: &mut Criterion) {
    let one = rayon::ThreadPoolBuilder::new().num_threads(1).build();
    let one = one.expect("a thread");
    one.install(figures);
    figures();
    one.install(scorers);
    scorers();
}

/// A policy that scores what is held every `every` steps.
struct Scorer {
    name: &'static str,
    every: usize,
    /// Multiply-adds of an event for each KV head, token and element, at `n` tokens under `g` query heads.
    work: fn(n: f64, g: f64) -> f64,
}

/// Multiply-adds follow from the formulas: a product of d elements for each term that they have.
const SCORERS: [Scorer; 9] = [
    Scorer {
        name: "knorm",
        every: 64,
        work: |_, _| 1.0,
    },
    Scorer {
        name: "keydiff",
        every: 64,
        work: |_, _| 3.0,
    },
    // A product with elements and magnitudes of pairs.
    Scorer {
        name: "tri-attention",
        every: 128,
        work: |_, g| 1.5 * g + 1.0,
    },
    Scorer {
        name: "lagkv",
        every: 128,
        work: |_, _| 8.0,
    },
    Scorer {
        name: "vase-dkv",
        every: 64,
        work: |_, _| 40.0,
    },
    // Logits of 8 queries, their outputs, and the outputs' products with values.
    Scorer {
        name: "dropkv",
        every: 64,
        work: |_, g| 24.0 * g,
    },
    Scorer {
        name: "vase-attnv",
        every: 64,
        work: |_, g| 64.0 * g,
    },
    Scorer {
        name: "snapkv",
        every: 64,
        work: |_, g| 32.0 * g,
    },
    // Keys with each other, and logits of 8 queries.
    Scorer {
        name: "r-kv",
        every: 128,
        work: |n, g| n + 8.0 * g,
    },
];

/// Eviction of each scorer and what it does between evictions, in every storage. Where an event has more multiply-adds than 3 % of those of attention, its share of them is the bound: as products of matrices
/// they are faster than attention's, which reads every key and value anew for each step.
fn scorers() {
    let (n, threads) = (2048, rayon::current_num_threads());
    let (window, steps) = (128, 256);
    let groups = SHAPE.query_heads as f64 / SHAPE.kv_heads as f64;
    for storage in ["f32", "f16", "int8", "int4"] {
        let with = |mut config: CacheConfig| {
            config.storage = storage.parse().expect("a preset");
            config.rotary = Some(Rotary::plain(1e4, SHAPE.head_dim));
            config
        };
        let mut caches = vec![filled(&with(named("full", 1)), n, DType::F32)];
        for scorer in &SCORERS {
            let mut config = with(named(scorer.name, n));
            if scorer.name == "snapkv" {
                config.evict_every = Some(scorer.every);
            }
            caches.push(filled(&config, n, DType::F32));
        }
        let times = seconds(&mut caches, window, 5);
        let full = &times[0];
        let attention: f64 = full.iter().sum();
        for (scorer, times) in SCORERS.iter().zip(&times[1..]) {
            // After the steps to warm up, which are whole periods, an event ends every period.
            let events = (1..=steps / scorer.every).map(|event| event * scorer.every - 1);
            let evicting: f64 = events.map(|at| times[at] - times[at - 1]).sum();
            let share = (scorer.work)(n as f64, groups) / (2.0 * groups * scorer.every as f64);
            let at = format!("{storage} n={n} threads={threads} {}", scorer.name);
            row(
                &format!("{at} eviction"),
                evicting / attention,
                share.max(0.03),
            );
            // In a period the row grows from its budget on, as the static cache does, which started a period ahead.
            let quiet: f64 = times[..scorer.every - 1].iter().sum();
            let beside: f64 = full[..scorer.every - 1].iter().sum();
            let longer = (n + window) as f64 / n as f64;
            row(
                &format!("{at} bookkeeping"),
                longer * quiet / beside - 1.0,
                0.05,
            );
        }
    }
}

fn figures() {
    let threads = rayon::current_num_threads();
    println!("{:<52} {:>10}   bound   verdict", "figure", "measured");
    for dtype in [DType::F32, DType::BF16] {
        for n in [1024, 4096] {
            let at = |what: &str| format!("{dtype:?} n={n} threads={threads} {what}");
            // After a window: static at n and growing, the same with bookkeeping, and held between n and n + W − 1 by eviction.
            let mut caches = [
                filled(&named("full", 1), n - WINDOW, dtype),
                filled(&every_window(1 << 30), n - WINDOW, dtype),
                filled(&every_window(n), n, dtype),
            ];
            let times = seconds(&mut caches, WINDOW, 15);
            let sum = |times: &[f64]| times.iter().sum::<f64>();
            let bookkeeping = sum(&times[1]) / sum(&times[0]) - 1.0;
            // The second window has the lengths of the first again.
            let step = sum(&times[2]) / (2.0 * sum(&times[0][..WINDOW])) - 1.0;
            // A step that evicts beside one of the same length that does not.
            let evicting: f64 = (1..=2)
                .map(|w| times[2][w * WINDOW - 1] - times[1][WINDOW - 1])
                .sum();
            let evicting = evicting / (2.0 * sum(&times[0][..WINDOW]));
            row(&at("lazy bookkeeping / attention"), bookkeeping, 0.05);
            row(&at("lazy eviction / attention"), evicting, 0.03);
            row(&at("lazy step / static, beyond 1"), step, 0.08);
            let tokens = caches[2].physical_len(0) * SHAPE.kv_heads;
            let filled_bytes = tokens * 2 * SHAPE.head_dim * dtype.size_in_bytes();
            let state = caches[2].state_bytes() as f64 / filled_bytes as f64;
            row(&at("tracking state / KV bytes"), state, 0.02);

            let keys = || random(8, n + 16).to_dtype(dtype).expect("a dtype");
            let (q, k, v) = (random(32, 1), keys(), keys());
            let mut bare = f64::INFINITY;
            let mut full = filled(&named("full", 1), n, dtype);
            let mut best = f64::INFINITY;
            let one = random(8, 1);
            // The full cache grows from n to n + 31 meanwhile.
            for _ in 0..31 {
                let started = Instant::now();
                black_box(attention::prefill(&q, &k, &v, SCALE, n + 15, None).expect("attention"));
                bare = bare.min(started.elapsed().as_secs_f64());
                let started = Instant::now();
                full.begin(1).expect("a step");
                black_box(full.attend(0, &q, &one, &one, SCALE).expect("attention"));
                best = best.min(started.elapsed().as_secs_f64());
            }
            // None, but for the difference of two measurements.
            row(
                &at("full cache / bare attention, beyond 1"),
                best / bare - 1.0,
                0.01,
            );
        }
    }
}

fn steps(c: &mut Criterion) {
    let n = 1024;
    let mut group = c.benchmark_group(format!("step held at n={n}, f32"));
    group.sample_size(20);
    for name in [
        "full",
        "streaming",
        "random",
        "tova",
        "h2o",
        "raas",
        "scissorhands",
        "lazy",
        "r-kv",
    ] {
        let mut cache = filled(&named(name, n), n, DType::F32);
        let fresh = cache.snapshot();
        let (q, k) = (random(32, 1), random(8, 1));
        let mut count = 0;
        group.bench_function(BenchmarkId::from_parameter(name), |b| {
            b.iter(|| {
                count += 1;
                if name == "full" && count % 64 == 0 {
                    cache.restore(&fresh).expect("the same cache");
                }
                cache.begin(1).expect("a step");
                black_box(cache.attend(0, &q, &k, &k, SCALE).expect("attention"))
            });
        });
    }
    group.finish();
}

criterion_group!(benches, table, steps);
criterion_main!(benches);
