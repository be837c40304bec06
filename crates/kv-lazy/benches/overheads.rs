//! What eviction costs beside attention itself, each figure beside its bound.
//!
//! One layer of an 8B model (32 query heads, 8 KV heads of 128), f32 and bf16. The static cache is the full one at the same length. Steps of all
//! configurations are interleaved and the fastest of each kept, so that a busy machine disturbs them alike; criterion's own
//! figures per step follow.

use candle_core::{DType, Device, Tensor};
use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use kv_lazy::policy::LazySettings;
use kv_lazy::{Budget, CacheConfig, CacheSet, LayerShape, PolicyConfig, Prompt, attention};
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
    let config = CacheConfig::new(policy, Budget::Tokens(budget));
    match name {
        "full" => config,
        _ => CacheConfig {
            prompt: Some(Prompt::Evictable),
            ..config
        },
    }
}

fn lazy(budget: usize) -> CacheConfig {
    let settings = LazySettings {
        window: Some(WINDOW),
        ..LazySettings::default()
    };
    CacheConfig::new(PolicyConfig::Lazy(settings), Budget::Tokens(budget))
}

/// Seconds per step over two windows: the fastest of several rounds for each step.
fn seconds(caches: &mut [CacheSet], rounds: usize) -> Vec<f64> {
    let (q, k) = (random(32, 1), random(8, 1));
    let fresh: Vec<_> = caches.iter().map(CacheSet::snapshot).collect();
    let steps = 2 * WINDOW;
    let mut best = vec![vec![f64::INFINITY; steps]; caches.len()];
    for _ in 0..rounds {
        for (cache, fresh) in caches.iter_mut().zip(&fresh) {
            cache.restore(fresh).expect("the same cache");
        }
        for step in 0..steps {
            for (cache, best) in caches.iter_mut().zip(&mut best) {
                let started = Instant::now();
                cache.begin(1).expect("a step");
                black_box(cache.attend(0, &q, &k, &k, SCALE).expect("attention"));
                best[step] = best[step].min(started.elapsed().as_secs_f64());
            }
        }
    }
    best.iter()
        .map(|steps| steps.iter().sum::<f64>() / steps.len() as f64)
        .collect()
}

fn table(_: &mut Criterion) {
    println!("{:<46} {:>9} {:>9}", "figure", "measured", "bound");
    let row = |name: String, measured: f64, bound: &str| {
        println!("{name:<46} {:>8.2} % {bound:>9}", 100.0 * measured);
    };
    for dtype in [DType::F32, DType::BF16] {
        for n in [1024, 4096] {
            let at = format!("{dtype:?} n={n}");
            // Static at n … n + 2W; the same with bookkeeping; held at n … n + W − 1 by eviction, and static at that length.
            let mut caches = [
                filled(&named("full", 1), n, dtype),
                filled(&lazy(1 << 30), n, dtype),
                filled(&lazy(n), n, dtype),
            ];
            let times = seconds(&mut caches, 15);
            let per_token = times[0] / (n + WINDOW) as f64;
            let sawtooth = per_token * (n as f64 + WINDOW as f64 / 2.0);
            let bookkeeping = times[1] / times[0] - 1.0;
            let step = times[2] / sawtooth - 1.0;
            row(
                format!("{at} lazy bookkeeping / attention"),
                bookkeeping,
                "≤ 5 %",
            );
            row(
                format!("{at} lazy eviction / attention"),
                step - bookkeeping,
                "≤ 3 %",
            );
            row(format!("{at} lazy step / static, beyond 1"), step, "≤ 8 %");
            let tokens = caches[2].physical_len(0) * SHAPE.kv_heads;
            let filled_bytes = tokens * 2 * SHAPE.head_dim * dtype.size_in_bytes();
            let share = |bytes: usize| bytes as f64 / filled_bytes as f64;
            let state = caches[2].state_bytes();
            row(
                format!("{at} tracking state / KV bytes"),
                share(state),
                "≤ 2 %",
            );
            let positions = caches[2].position_bytes();
            row(format!("{at} positions / KV bytes"), share(positions), "");

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
            row(
                format!("{at} full cache / bare attention, beyond 1"),
                best / bare - 1.0,
                "0 %",
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
