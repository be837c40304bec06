//! Decode attention against the machine's read bandwidth, and prefill against its matrix product.
//!
//! A decode step must read every cached key and value once; `stream` reads as many bytes from as many threads and does nothing
//! with them, so the two throughputs side by side are the figure and its bound. Prefill of T tokens costs 2·T²·d multiply-adds per query
//! head under a causal mask; `gemm` does as many in candle's matrix product.

use candle_core::{DType, Device, Tensor};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use kv_lazy::{CacheSet, LayerShape, attention};
use rayon::prelude::*;
use std::hint::black_box;

const SHAPE: LayerShape = LayerShape {
    query_heads: 32,
    kv_heads: 8,
    head_dim: 128,
    sliding_window: None,
};

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

fn decode(c: &mut Criterion) {
    for n in [1024, 4096, 16384] {
        let mut group = c.benchmark_group(format!("decode n={n}"));
        group.sample_size(30);
        for (name, dtype) in [
            ("f32", DType::F32),
            ("f16", DType::F16),
            ("bf16", DType::BF16),
        ] {
            let bytes = 2 * SHAPE.kv_heads * SHAPE.head_dim * n * dtype.size_in_bytes();
            group.throughput(Throughput::Bytes(bytes as u64));
            let data = vec![1u64; bytes / 8];
            group.bench_function(BenchmarkId::new("stream", name), |b| {
                b.iter(|| black_box(stream(black_box(&data))));
            });
            let mut cache = CacheSet::full(&[SHAPE], 1, dtype, &Device::Cpu).expect("valid");
            // The queries of the prompt do not matter: in steps, so that filling is quick.
            for _ in 0..n / 256 {
                cache.begin_prompt(256).expect("a step");
                let (q, k) = (random(32, 256, 128), random(8, 256, 128));
                cache.attend(0, &q, &k, &k, 0.088).expect("attention");
            }
            let (q, k) = (random(32, 1, 128), random(8, 1, 128));
            let filled = cache.snapshot();
            let mut steps = 0;
            group.bench_function(BenchmarkId::new("attend", name), |b| {
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
        group.finish();
    }
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

criterion_group!(benches, decode, prefill);
criterion_main!(benches);
