//! Compressors against the machine's matrix product.
//!
//! SparseGPT and GPTQ cost about `2n³/3 + mn²/2` multiply-adds for `m × n` weights; `gemm` does as many in one f64
//! product with the same n, so the two rates side by side are the figure and its bound. Wanda and rounding pass over
//! the weights: their figure is bytes of f64 weights per second.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use faer::{Accum, Mat, Par};
use lowrank_eora::compress::{Compressor, Inputs};
use std::hint::black_box;

/// Reproducible values in [-1, 1).
fn matrix(rows: usize, cols: usize) -> Mat<f64> {
    Mat::from_fn(rows, cols, |i, j| {
        let x = ((i * cols + j) as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        (x >> 11) as f64 / (1u64 << 52) as f64 - 1.0
    })
}

fn compress(c: &mut Criterion) {
    for (m, n) in [(2048, 2048), (4096, 1024)] {
        let w = matrix(m, n);
        let x = matrix(n, 2 * n);
        let h = &x * x.transpose();
        let flops = 2 * (2 * n * n * n / 3 + m * n * n / 2);
        let mut group = c.benchmark_group(format!("{m}x{n}"));
        group.sample_size(10);
        group.throughput(Throughput::Elements(flops as u64));
        let depth = flops / (2 * m * n);
        let (a, b) = (matrix(m, depth), matrix(depth, n));
        let mut product = Mat::zeros(m, n);
        group.bench_function("gemm", |bench| {
            bench.iter(|| {
                let par = Par::rayon(0);
                faer::linalg::matmul::matmul(&mut product, Accum::Replace, &a, &b, 1.0, par);
                black_box(&product);
            });
        });
        let mut run = |names: &[&str], throughput: Throughput| {
            group.throughput(throughput);
            for name in names {
                let compressor: Compressor = name.parse().expect("a name");
                group.bench_function(BenchmarkId::from_parameter(name), |bench| {
                    bench.iter(|| {
                        let inputs = Some(Inputs::Gram(h.as_ref()));
                        black_box(compressor.compress(w.as_ref(), inputs).expect("valid"))
                    });
                });
            }
        };
        run(
            &["sparsegpt-50", "sparsegpt-2:4", "gptq-int4-g128"],
            Throughput::Elements(flops as u64),
        );
        run(
            &["wanda-50", "wanda-2:4", "rtn-int4-g128"],
            Throughput::Bytes((8 * m * n) as u64),
        );
        group.finish();
    }
}

criterion_group!(benches, compress);
criterion_main!(benches);
