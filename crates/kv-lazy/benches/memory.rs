//! Memory and time of reading long prompts, at growing length, each figure beside its bound.
//!
//! A layer of 8 query heads over 2 KV heads of 64, f32 tensors. *Column sums* are what H2O needs of a prompt: all of its attention, of which nothing that is as long
//! as the prompt squared may ever be in memory. *Chunks* are what a prompt is read in otherwise: beside the cache they may take what a chunk takes, and the time of
//! a chunk grows with what is cached, no more. Peaks are counted by the allocator, tensors of the caller excluded.

#[path = "../tests/memory/allocator.rs"]
mod allocator;

use allocator::peak;
use candle_core::{DType, Device, Tensor};
use kv_lazy::{Budget, CacheConfig, CacheSet, LayerShape};
use std::time::Instant;

const SHAPE: LayerShape = LayerShape {
    query_heads: 8,
    kv_heads: 2,
    head_dim: 64,
    sliding_window: None,
};
const CHUNK: usize = 512;
const LENGTHS: [usize; 4] = [4096, 8192, 16_384, 32_768];

fn random(heads: usize, tokens: usize) -> Tensor {
    Tensor::randn(0f32, 1.0, (1, heads, tokens, 64), &Device::Cpu).expect("a CPU tensor")
}

fn cache(policy: &str, storage: &str) -> CacheSet {
    let mut config = CacheConfig::new(policy.parse().expect("a policy"), Budget::Tokens(1 << 20));
    config.storage = storage.parse().expect("a preset");
    CacheSet::new(&[SHAPE], 1, DType::F32, &Device::Cpu, &config).expect("valid")
}

fn read(cache: &mut CacheSet, q: &Tensor, k: &Tensor) {
    cache
        .begin_prompt(q.dim(2).expect("4 dimensions"))
        .expect("a step");
    cache.attend(0, q, k, k, 0.125).expect("attention");
}

fn verdict(within: bool) -> &'static str {
    if within { "within" } else { "above" }
}

/// Peak bytes and seconds of a whole prompt under H2O.
fn columns(n: usize) -> (usize, f64) {
    let (q, k) = (random(8, n), random(2, n));
    let mut cache = cache("h2o", "f32");
    let started = Instant::now();
    let most = peak(|| read(&mut cache, &q, &k));
    (most, started.elapsed().as_secs_f64())
}

/// Peak bytes beside the cache while the last chunk of `n` tokens is read, and its seconds.
fn last_chunk(n: usize, storage: &str) -> (usize, f64) {
    let mut cache = cache("full", storage);
    let k = random(2, n - 2 * CHUNK);
    // Without attention, which is not what is measured.
    cache.begin_prompt(n - 2 * CHUNK).expect("a step");
    cache.extend(0, &k, &k).expect("keys and values");
    let (q, k) = (random(8, CHUNK), random(2, CHUNK));
    // Storage has grown for the first; the second finds room.
    read(&mut cache, &q, &k);
    let held = cache.bytes();
    let started = Instant::now();
    let most = peak(|| read(&mut cache, &q, &k));
    let grown = cache.bytes().saturating_sub(held);
    (most.saturating_sub(grown), started.elapsed().as_secs_f64())
}

fn main() {
    let mib = |bytes: usize| bytes as f64 / (1 << 20) as f64;
    println!(
        "{:<28} {:>10} {:>10} {:>8}   bound",
        "figure", "MiB", "B/token", "s"
    );
    // Outputs, keys, values, positions and 16 partial sums, once more for what is in flight; two blocks of 32 queries' weights a thread.
    let threads = rayon::current_num_threads();
    let per_token = 2 * 4 * (8 * 64 + 2 * 2 * 64 + 2 * 17) + threads * 2 * 32 * 4;
    for n in LENGTHS {
        let (bytes, seconds) = columns(n);
        let each = bytes / n;
        println!(
            "{:<28} {:>10.1} {each:>10} {seconds:>8.2}   ≤ {per_token} B/token: {}",
            format!("column sums n={n}"),
            mib(bytes),
            verdict(each <= per_token),
        );
    }
    for storage in ["f16", "int8", "int4"] {
        let mut first = None;
        for n in LENGTHS {
            let (bytes, seconds) = last_chunk(n, storage);
            let (least, base) = *first.get_or_insert((n, seconds));
            // The chunk's tensors and the weights of its blocks; scores of a query over all tokens.
            let bound = CHUNK * 64 * 4 * (2 * 8 + 4 * 2) + 64 * n * 4;
            let ratio = seconds / base / (n as f64 / least as f64);
            println!(
                "{:<28} {:>10.1} {:>10} {seconds:>8.2}   ≤ {:.1} MiB: {}; time over n {ratio:.2}, ≤ 1.5: {}",
                format!("chunk of {CHUNK}, {storage} n={n}"),
                mib(bytes),
                bytes / n,
                mib(bound),
                verdict(bytes <= bound),
                verdict(ratio <= 1.5),
            );
        }
    }
}
