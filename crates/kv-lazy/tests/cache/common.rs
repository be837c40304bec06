//! A naive second implementation of attention, and seeded random tensors.

use candle_core::{Device, Tensor};
use kv_lazy::policy::h2o::{self, Normalise};
use kv_lazy::policy::snapkv::{self, Pooling};
use kv_lazy::policy::{NAMES, Outlier, Threshold, lazy};
use kv_lazy::{Budget, CacheConfig, CacheSet, LayerShape, PolicyConfig, Prompt, Rotary};
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

/// Queries, keys and values of one step.
pub(crate) type Qkv = (Tensor, Tensor, Tensor);

/// Random steps `[batch, heads, tokens, d]` for a list of token counts.
pub(crate) fn steps(seed: u64, batch: usize, shape: LayerShape, tokens: &[usize]) -> Vec<Qkv> {
    let mut r = rng(seed);
    let LayerShape {
        query_heads,
        kv_heads,
        head_dim,
        ..
    } = shape;
    tokens
        .iter()
        .map(|&t| {
            let mut next = |heads| tensor(&mut r, [batch, heads, t, head_dim]);
            // Sharper queries, so that weights differ between tokens.
            (
                (next(query_heads) * 4.0).unwrap(),
                next(kv_heads),
                next(kv_heads),
            )
        })
        .collect()
}

/// Runs steps through layer 0 and returns the outputs.
pub(crate) fn run(cache: &mut CacheSet, steps: &[Qkv]) -> Vec<Vec<f32>> {
    steps
        .iter()
        .map(|(q, k, v)| {
            cache.begin(q.dim(2).unwrap()).unwrap();
            flat(&cache.attend(0, q, k, v, 0.5).unwrap())
        })
        .collect()
}

/// A policy by its name within `budget` tokens.
pub(crate) fn named(name: &str, budget: usize) -> CacheConfig {
    let mut config = CacheConfig::new(name.parse().unwrap(), Budget::Tokens(budget));
    config.rotary = Some(Rotary::plain(10_000.0, 8));
    config
}

/// `config` with something changed.
pub(crate) fn with(mut config: CacheConfig, change: impl FnOnce(&mut CacheConfig)) -> CacheConfig {
    change(&mut config);
    config
}

/// LazyEviction with its window and the weight from which a token is active.
pub(crate) fn lazy(window: usize, alpha: f32) -> PolicyConfig {
    let mut settings = lazy::Settings::default();
    settings.window = Some(window);
    settings.threshold = Threshold::Absolute(alpha);
    PolicyConfig::Lazy(settings)
}

/// Every policy that a cache can be built with, by its default settings, within `budget` tokens.
pub(crate) fn all_policies(budget: usize) -> Vec<CacheConfig> {
    let names = NAMES.iter().filter(|name| **name != "oracle");
    names.map(|name| named(name, budget)).collect()
}

/// Those policies, and combinations of them.
pub(crate) fn all_configurations(budget: usize) -> Vec<CacheConfig> {
    let named = |name: &str| named(name, budget);
    let mut mean = h2o::Settings::default();
    mean.recent = Some(4);
    mean.normalise = Normalise::Mean;
    let mut every = snapkv::Settings::default();
    every.window = Some(4);
    every.kernel = 3;
    every.pooling = Pooling::Max;
    every.every = Some(6);
    let mut all = all_policies(budget);
    all.extend([
        with(named("h2o"), |c| c.evict_every = Some(5)),
        with(named("tova"), |c| {
            (c.sinks, c.recent) = (2, 3);
            c.prompt = Some(Prompt::KeepBeside);
        }),
        with(named("lazy"), |c| c.prompt = Some(Prompt::CompressOnce(6))),
        with(named("raas"), |c| c.prefill = "snapkv".parse().ok()),
        with(named("h2o"), |c| c.prefill = "tova".parse().ok()),
        with(named("lazy"), |c| c.prefill = "tova".parse().ok()),
        with(named("random"), |c| c.guard_values = 3),
        with(named("streaming"), |c| c.guard_values = 2),
        with(named("keydiff"), |c| {
            (c.guard_values, c.guard_by) = (3, Outlier::Range);
        }),
        with(named("lagkv"), |c| c.prefill = "vase-attnv".parse().ok()),
        with(named("lazy"), |c| c.budget = Budget::Ratio(0.5)),
        CacheConfig::new(PolicyConfig::H2o(mean), Budget::Ratio(0.4)),
        CacheConfig::new(PolicyConfig::Snapkv(every), Budget::Tokens(budget)),
    ]);
    all
}
