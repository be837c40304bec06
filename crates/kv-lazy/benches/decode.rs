//! Decode attention against the machine's read bandwidth and arithmetic, and prefill against its matrix product.
//!
//! A decode step must read every cached key and value once; `stream` reads as many bytes from as many threads and does nothing
//! with them. With G query heads to a KV head and s bytes to an element it also must do 2G/s operations on every byte: `fma` is how
//! many the machine does where nothing is read, and `widen` what is left of it where the instructions that make floats of the elements take as long
//! as multiply-adds. The lowest is the bound, measured in turn with the figure itself, so that noise
//! hits all alike. Prefill of T tokens costs 2·T²·d multiply-adds per query head under a causal mask; `gemm` does as many in
//! candle's matrix product.

use candle_core::{DType, Device, Tensor};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use kv_lazy::{Budget, CacheConfig, CacheSet, LayerShape, attention};
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;
use std::hint::black_box;
use std::time::Instant;

const KV_HEADS: usize = 8;
const HEAD_DIM: usize = 128;
/// Share of the read bandwidth that decode attention is to reach at n ≥ 4096.
const GOAL: f64 = 0.6;

fn random(heads: usize, tokens: usize, d: usize) -> Tensor {
    Tensor::randn(0.0f32, 1.0, (1, heads, tokens, d), &Device::Cpu).expect("a CPU tensor")
}

fn stream(data: &[u64]) -> u64 {
    let part = data.len().div_ceil(rayon::current_num_threads());
    data.par_chunks(part)
        .map(|part| {
            let mut lanes = [0u64; 16];
            for chunk in part.chunks_exact(16) {
                lanes
                    .iter_mut()
                    .zip(chunk)
                    .for_each(|(sum, x)| *sum = sum.wrapping_add(*x));
            }
            lanes.iter().fold(0, |a, b| a ^ b)
        })
        .reduce(|| 0, |a, b| a ^ b)
}

/// Twelve chains of fused multiply-adds in registers.
struct Chains {
    rounds: usize,
}

impl WithSimd for Chains {
    /// Operations done, and a result that must not be optimised away.
    type Output = (usize, f32);

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> (usize, f32) {
        let (a, b) = (simd.splat_f32s(black_box(0.5)), simd.splat_f32s(0.25));
        let mut chains = [b; 12];
        for _ in 0..self.rounds {
            for x in &mut chains {
                *x = simd.mul_add_f32s(*x, a, b);
            }
        }
        let sum = chains.into_iter().fold(b, |sum, x| simd.add_f32s(sum, x));
        let operations = 2 * chains.len() * S::F32_LANES * self.rounds;
        (operations, simd.reduce_sum_f32s(sum))
    }
}

/// Operations per second of all threads.
fn fma() -> f64 {
    let started = Instant::now();
    let done = rayon::broadcast(|_| {
        let (operations, sum) = Arch::new().dispatch(Chains { rounds: 100_000 });
        black_box(sum);
        operations
    });
    done.iter().sum::<usize>() as f64 / started.elapsed().as_secs_f64()
}

/// A full cache of `n` tokens under `group` query heads per KV head.
fn filled(group: usize, n: usize, storage: &str) -> CacheSet {
    let shape = LayerShape {
        query_heads: group * KV_HEADS,
        kv_heads: KV_HEADS,
        head_dim: HEAD_DIM,
        sliding_window: None,
    };
    let mut config = CacheConfig::new("full".parse().expect("a policy"), Budget::Tokens(1));
    config.storage = storage.parse().expect("a preset");
    let mut cache = CacheSet::new(&[shape], 1, DType::F32, &Device::Cpu, &config).expect("valid");
    // Without attention, which over a long prompt would take longer than all that is measured.
    cache.begin_prompt(n).expect("a step");
    let k = random(KV_HEADS, n, HEAD_DIM);
    cache.extend(0, &k, &k).expect("keys and values");
    cache
}

/// Storage formats, the time of a step that each is to reach at most beside f16, and instructions that widen a vector: a shift and
/// a logical operation for codes.
const STORAGE: [(&str, f64, f64); 6] = [
    ("f32", f64::INFINITY, 0.0),
    ("f16", f64::INFINITY, 1.0),
    ("bf16", f64::INFINITY, 1.0),
    ("int8", 0.65, 2.0),
    ("k8v4", 0.6, 2.0),
    ("int4", 0.5, 2.0),
];
/// Query heads that a widened vector serves: there are no registers for more.
const TILE: usize = 4;

/// Bandwidth, arithmetic and decode attention in turn, the best of many rounds each.
fn table(_: &mut Criterion) {
    println!(
        "{:<22} {:>8} {:>8} {:>8} {:>8} {:>8} {:>8}   bound and verdict, {} threads",
        "GB/s",
        "attend",
        "stream",
        "fma",
        "widen",
        "share",
        "of f16",
        rayon::current_num_threads()
    );
    for group in [1, 4, 8] {
        for n in [4096, 8192, 16384] {
            let mut f16 = f64::NAN;
            for (name, most, widening) in STORAGE {
                let mut cache = filled(group, n, name);
                let bytes = cache.bytes();
                let data = vec![1u64; bytes / 8];
                let q = random(group * KV_HEADS, 1, HEAD_DIM);
                let k = random(KV_HEADS, 1, HEAD_DIM);
                let (mut read, mut attend, mut operations) = (f64::INFINITY, f64::INFINITY, 0f64);
                for _ in 0..40 {
                    let started = Instant::now();
                    black_box(stream(black_box(&data)));
                    read = read.min(started.elapsed().as_secs_f64());
                    operations = operations.max(fma());
                    let started = Instant::now();
                    cache.begin(1).expect("a step");
                    black_box(cache.attend(0, &q, &k, &k, 0.088).expect("attention"));
                    attend = attend.min(started.elapsed().as_secs_f64());
                }
                if name == "f16" {
                    f16 = attend;
                }
                let per_second = |seconds: f64| bytes as f64 / seconds / 1e9;
                // Two multiply-adds for each element of keys and values and each query head.
                let work = 4.0 * (group * KV_HEADS * HEAD_DIM * n) as f64;
                let compute = bytes as f64 / (work / operations) / 1e9;
                let widened = widening * group.div_ceil(TILE) as f64;
                let widen = compute * group as f64 / (group as f64 + widened);
                let (figure, stream) = (per_second(attend), per_second(read));
                let verdict = if figure >= GOAL * stream {
                    "within".into()
                } else {
                    let bound = widen.min(stream);
                    format!("below; {:.0} % of the bound", 100.0 * figure / bound)
                };
                let share = attend / f16;
                let beside = match most.is_finite() {
                    true if share <= most => format!(", ≤ {most} of f16: within"),
                    true => format!(", ≤ {most} of f16: above"),
                    false => String::new(),
                };
                println!(
                    "{:<22} {figure:>8.1} {stream:>8.1} {compute:>8.1} {widen:>8.1} {:>6.0} % {share:>8.2}   ≥ {:.0} %: {verdict}{beside}",
                    format!("{name} {group}:1 n={n}"),
                    100.0 * figure / stream,
                    100.0 * GOAL,
                );
            }
        }
    }
}

/// A step of four tokens, as speculative decoding verifies, beside two steps of one.
fn several(_: &mut Criterion) {
    let (group, n, tokens) = (4, 8192, 4);
    println!(
        "{:<22} {:>10} {:>12}   bound and verdict, {} threads",
        "seconds of a step",
        "one token",
        "four tokens",
        rayon::current_num_threads()
    );
    for (name, ..) in STORAGE {
        let mut cache = filled(group, n, name);
        let step = |t: usize| {
            let (q, k) = (
                random(group * KV_HEADS, t, HEAD_DIM),
                random(KV_HEADS, t, HEAD_DIM),
            );
            move |cache: &mut CacheSet| {
                let started = Instant::now();
                cache.begin(t).expect("a step");
                black_box(cache.attend(0, &q, &k, &k, 0.088).expect("attention"));
                started.elapsed().as_secs_f64()
            }
        };
        let (one, four) = (step(1), step(tokens));
        let mut best = [f64::INFINITY; 2];
        for _ in 0..40 {
            best[0] = best[0].min(one(&mut cache));
            best[1] = best[1].min(four(&mut cache));
        }
        let share = best[1] / best[0];
        let verdict = if share <= 2.0 { "within" } else { "above" };
        println!(
            "{:<22} {:>10.6} {:>12.6}   {share:.2} ≤ 2 steps of one: {verdict}",
            format!("{name} {group}:1 n={n}"),
            best[0],
            best[1]
        );
    }
}

fn decode(c: &mut Criterion) {
    let (group, n) = (4, 4096);
    let mut bench = c.benchmark_group(format!("decode {group}:1 n={n}"));
    bench.sample_size(20);
    for (name, ..) in STORAGE {
        let mut cache = filled(group, n, name);
        bench.throughput(Throughput::Bytes(cache.bytes() as u64));
        let q = random(group * KV_HEADS, 1, HEAD_DIM);
        let k = random(KV_HEADS, 1, HEAD_DIM);
        let filled = cache.snapshot();
        let mut steps = 0;
        bench.bench_function(BenchmarkId::from_parameter(name), |b| {
            b.iter(|| {
                steps += 1;
                if steps % 512 == 0 {
                    cache.restore(&filled).expect("the same cache");
                }
                cache.begin(1).expect("a step");
                black_box(cache.attend(0, &q, &k, &k, 0.088).expect("attention"))
            });
        });
    }
    bench.finish();
}

fn prefill(c: &mut Criterion) {
    for d in [8, 32, 64, 128] {
        let mut group = c.benchmark_group(format!("prefill d={d}"));
        group.sample_size(10);
        for t in [128, 512, 2048] {
            let heads = 8;
            group.throughput(Throughput::Elements((heads * 2 * t * t * d) as u64));
            let (q, k) = (random(heads, t, d), random(heads / 2, t, d));
            group.bench_function(BenchmarkId::new("attention", t), |b| {
                b.iter(|| attention::prefill(&q, &k, &k, 0.1, 0, None).expect("attention"));
            });
            let (a, b) = (random(heads, t, d), random(heads, d, t));
            group.bench_function(BenchmarkId::new("gemm", t), |bench| {
                bench.iter(|| black_box(a.matmul(&b).expect("product")));
            });
            group.bench_function(BenchmarkId::new("gemm and softmax", t), |bench| {
                bench.iter(|| {
                    let s = candle_nn::ops::softmax_last_dim(&a.matmul(&b).expect("product"));
                    black_box(s.expect("softmax").matmul(&a).expect("product"))
                });
            });
        }
        group.finish();
    }
}

criterion_group!(benches, table, several, decode, prefill);
criterion_main!(benches);
