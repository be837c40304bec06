//! A naive second implementation of attention, and seeded random tensors.

use candle_core::{Device, Tensor};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Seeded uniform numbers in [-1, 1).
pub(crate) fn uniform(rng: &mut ChaCha8Rng, len: usize) -> Vec<f32> {
    (0..len).map(|_| rng.random_range(-1.0..1.0)).collect()
}

/// A seeded generator.
pub(crate) fn rng(seed: u64) -> ChaCha8Rng {
    ChaCha8Rng::seed_from_u64(seed)
}

/// A random tensor `[b, h, t, d]`.
pub(crate) fn tensor(rng: &mut ChaCha8Rng, shape: [usize; 4]) -> Tensor {
    let data = uniform(rng, shape.iter().product());
    Tensor::from_vec(data, shape.to_vec(), &Device::Cpu).unwrap()
}

/// Elements in row-major order.
pub(crate) fn flat(tensor: &Tensor) -> Vec<f32> {
    tensor
        .to_dtype(candle_core::DType::F32)
        .unwrap()
        .flatten_all()
        .unwrap()
        .to_vec1()
        .unwrap()
}

/// Attention by its definition, in f64: `visible(query token, key)` says who sees whom.
pub(crate) fn naive(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    scale: f64,
    visible: impl Fn(usize, usize) -> bool,
) -> Vec<f32> {
    let (b, hq, t, d) = q.dims4().unwrap();
    let (_, hkv, n, _) = k.dims4().unwrap();
    let (q, k, v) = (flat(q), flat(k), flat(v));
    let mut out = Vec::with_capacity(q.len());
    for head in 0..b * hq {
        let row = head / hq * hkv + head % hq / (hq / hkv);
        for i in 0..t {
            let query = &q[(head * t + i) * d..][..d];
            let scores: Vec<f64> = (0..n)
                .map(|j| {
                    let key = &k[(row * n + j) * d..][..d];
                    let dot: f64 = query.iter().zip(key).map(|(a, b)| f64::from(a * b)).sum();
                    if visible(i, j) {
                        dot * scale
                    } else {
                        f64::NEG_INFINITY
                    }
                })
                .collect();
            let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let weights: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
            let sum: f64 = weights.iter().sum();
            out.extend((0..d).map(|c| {
                let mixed: f64 = (0..n)
                    .map(|j| weights[j] * f64::from(v[(row * n + j) * d + c]))
                    .sum();
                (mixed / sum) as f32
            }));
        }
    }
    out
}

/// Largest absolute difference.
pub(crate) fn distance(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter()
        .zip(b)
        .map(|(x, y)| (x - y).abs())
        .fold(0.0, f32::max)
}
