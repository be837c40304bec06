//! What attention allocates, counted by the allocator.

mod allocator;

use allocator::peak;
use candle_core::{DType, Device, Tensor};
use kv_lazy::{Budget, CacheConfig, CacheSet, LayerShape};

const SHAPE: LayerShape = LayerShape {
    query_heads: 8,
    kv_heads: 2,
    head_dim: 16,
    sliding_window: None,
};

fn random(heads: usize, tokens: usize) -> Tensor {
    Tensor::randn(0f32, 1.0, (1, heads, tokens, 16), &Device::Cpu).unwrap()
}

fn step(cache: &mut CacheSet, (q, k): &(Tensor, Tensor)) {
    cache.begin_prompt(q.dim(2).unwrap()).unwrap();
    cache.attend(0, q, k, k, 0.25).unwrap();
}

/// One test, because the counter is the whole process's.
#[test]
fn memory_of_attention_is_linear_in_the_tokens_with_column_sums_and_small_for_chunks() {
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(2)
        .build()
        .unwrap();
    let config = CacheConfig::new("h2o".parse().unwrap(), Budget::Tokens(1 << 20));
    let columns = |tokens: usize| {
        let input = (random(8, tokens), random(2, tokens));
        let mut cache = CacheSet::new(&[SHAPE], 1, DType::F32, &Device::Cpu, &config).unwrap();
        pool.install(|| peak(|| step(&mut cache, &input)))
    };
    let (short, long) = (columns(1024), columns(4096));
    // Outputs, keys, values, 16 partial sums per KV head, and two blocks' weights per thread.
    let per_token = 4 * (8 * 16 + 2 * 2 * 16 + 2 * 17) + 2 * 2 * 2 * 32 * 4;
    assert!(long < 2 * 4096 * per_token, "{long}");
    assert!(long < 6 * short, "{short} {long}");

    // A chunk after many tokens: nothing as large as what is cached.
    let mut cache = CacheSet::full(&[SHAPE], 1, DType::F16, &Device::Cpu).unwrap();
    step(&mut cache, &(random(8, 16_384), random(2, 16_384)));
    let held = cache.bytes();
    for tokens in [4, 64] {
        let input = (random(8, tokens), random(2, tokens));
        // Storage has grown for the first; the second finds room.
        step(&mut cache, &input);
        let extra = pool.install(|| peak(|| step(&mut cache, &input)));
        assert!(extra < held / 2, "{tokens}: {extra} of {held}");
    }
}
