//! f32 beside bf16 on this CPU: a batch of windows through one block, and decoding token by token.
//!
//! The block is that of a model of a billion parameters: hidden 2048, 5632 neurons, 32 heads of 64
//! over 4 key/value heads. Rates are tokens per second through this one block and a small head.

use candle_core::{DType, Device};
use causal_lm::{BATCH_TOKENS, Decoder, Hidden, Model, NoTap, Windows, synthetic};
use criterion::{Criterion, SamplingMode, Throughput, criterion_group, criterion_main};
use tensor_io::{Checkpoint, Config, WriteOptions};

const WINDOW: usize = 512;

fn precision(c: &mut Criterion) {
    let fields = serde_json::json!({
        "model_type": "llama", "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 1,
        "num_attention_heads": 32, "num_key_value_heads": 4, "vocab_size": 512, "max_position_embeddings": 2048,
    });
    let config = Config::new(fields.as_object().expect("an object").clone());
    let dir = tempfile::tempdir().expect("temporary folder");
    let (dst, options) = (dir.path().join("model"), WriteOptions::default());
    synthetic::write(&config, DType::BF16, &dst, &options, synthetic::random(0))
        .expect("temporary folder");
    let checkpoint = Checkpoint::open(dst).expect("just written");
    let text: Vec<u32> = (0..BATCH_TOKENS).map(|i| (i * 31 % 509) as u32).collect();
    let windows = Windows::cut(&text, WINDOW, None).expect("long enough");

    for dtype in [DType::F32, DType::BF16] {
        let decoder = Decoder::new(&checkpoint, dtype, &Device::Cpu).expect("a supported model");
        let block = decoder.block(0).expect("finite weights");
        let hidden = Hidden::embed(&decoder, &windows).expect("tokens in range");
        let mut group = c.benchmark_group(dtype.as_str());
        group.sampling_mode(SamplingMode::Flat).sample_size(10);
        group.throughput(Throughput::Elements(BATCH_TOKENS as u64));
        group.bench_function("batch of windows", |b| {
            b.iter(|| hidden.clone().advance(&block, &mut NoTap).expect("finite"));
        });
        let model = Model::load(&decoder).expect("finite weights");
        let mut cache = model.full_cache(1).expect("memory");
        model
            .forward(&[&text[..WINDOW]], &mut cache)
            .expect("finite");
        let prefilled = cache.snapshot();
        group.throughput(Throughput::Elements(16));
        group.bench_function("decoding after 512 tokens", |b| {
            b.iter(|| {
                cache.restore(&prefilled).expect("its own snapshot");
                for token in 0..16 {
                    model.forward(&[&[token]], &mut cache).expect("finite");
                }
            });
        });
        group.finish();
    }
}

criterion_group!(benches, precision);
criterion_main!(benches);
