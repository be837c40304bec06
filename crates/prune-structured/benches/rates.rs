//! Calibration beside the rate of its matrix products alone, and rewriting beside the rate at
//! which the system copies the same file.
//!
//! One block of a model of a billion parameters: hidden 2048, 5632 neurons, 32 heads of 64 over 4
//! key/value heads. Calibration is counted in floating-point operations of the block's seven
//! linears, so "elem/s" reads as FLOP/s in both rows; everything else that calibration does
//! (reading and widening weights, attention, norms, statistics) only costs time.

use std::fs::{self, File};
use std::hint::black_box;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use causal_lm::{Decoder, LinearName, Windows, synthetic};
use criterion::{BatchSize, Criterion, SamplingMode, Throughput, criterion_group, criterion_main};
use prune_structured::{Calibration, Collect, NoProgress, Plan, Recipe, Settings, write};
use tensor_io::{Checkpoint, Config, WriteOptions};

const WINDOW: usize = 512;
const WINDOWS: usize = 8;

/// The block as a checkpoint in bf16.
fn model(dir: &Path) -> Checkpoint {
    let fields = serde_json::json!({
        "model_type": "llama", "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 1,
        "num_attention_heads": 32, "num_key_value_heads": 4, "vocab_size": 512, "max_position_embeddings": 2048,
    });
    let config = Config::new(fields.as_object().expect("an object").clone());
    let (dst, options) = (dir.join("model"), WriteOptions::default());
    synthetic::write(&config, DType::BF16, &dst, &options, synthetic::random(0))
        .expect("temporary folder");
    Checkpoint::open(dst).expect("just written")
}

fn windows() -> Windows {
    let text: Vec<u32> = (0..WINDOW * WINDOWS)
        .map(|i| (i * 31 % 509) as u32)
        .collect();
    Windows::cut(&text, WINDOW, None).expect("long enough")
}

fn calibration(c: &mut Criterion) {
    let dir = tempfile::tempdir().expect("temporary folder");
    let checkpoint = model(dir.path());
    let decoder = Decoder::new(&checkpoint, DType::F32, &Device::Cpu).expect("a supported model");
    let windows = windows();
    let shapes: Vec<[usize; 2]> = LinearName::ALL
        .into_iter()
        .filter_map(|name| decoder.config().linear_shape(0, name))
        .collect();
    let tokens = WINDOW * WINDOWS;
    let flops: usize = shapes
        .iter()
        .map(|[out, input]| 2 * tokens * out * input)
        .sum();

    let mut group = c.benchmark_group("calibration");
    group.sampling_mode(SamplingMode::Flat).sample_size(10);
    group.throughput(Throughput::Elements(flops as u64));
    group.bench_function("moments of one block", |b| {
        b.iter(|| {
            Calibration::run(&decoder, &windows, &Collect::default(), &NoProgress).expect("finite")
        });
    });
    let operands: Vec<(Tensor, Tensor)> = shapes
        .iter()
        .map(|&[out, input]| {
            let random =
                |rows| Tensor::randn(0f32, 1.0, (rows, input), &Device::Cpu).expect("memory");
            (random(causal_lm::BATCH_TOKENS), random(out))
        })
        .collect();
    group.bench_function("bound: its matrix products alone", |b| {
        b.iter(|| {
            for (x, weight) in &operands {
                for _ in 0..tokens / causal_lm::BATCH_TOKENS {
                    black_box(
                        x.matmul(&weight.t().expect("a matrix"))
                            .expect("shapes fit"),
                    );
                }
            }
        });
    });
}

fn rewriting(c: &mut Criterion) {
    let dir = tempfile::tempdir().expect("temporary folder");
    let checkpoint = model(dir.path());
    let decoder = Decoder::new(&checkpoint, DType::F32, &Device::Cpu).expect("a supported model");
    let calibration = Calibration::run(&decoder, &windows(), &Collect::default(), &NoProgress)
        .expect("finite activations");
    let recipe = Recipe::named("flap", 0).expect("a known name");
    let plan =
        Plan::make(&decoder, &calibration, &recipe, 0.2, &NoProgress).expect("a ratio in reach");
    let dst = dir.path().join("pruned");
    let settings = Settings::new(&calibration);
    let remove = || drop(fs::remove_dir_all(&dst));
    let prune = |()| write(&decoder, &plan, &dst, &settings, &NoProgress).expect("removed");
    let bytes = prune(()).bytes;

    let mut group = c.benchmark_group("rewriting");
    group.sampling_mode(SamplingMode::Flat).sample_size(10);
    group.throughput(Throughput::Bytes(bytes));
    group.bench_function("slice, compensate and write", |b| {
        b.iter_batched(remove, prune, BatchSize::PerIteration);
    });
    remove();
    prune(());
    let plain = dir.path().join("plain");
    let copy = |()| {
        fs::copy(dst.join("model.safetensors"), &plain).expect("temporary folder");
        File::open(&plain)
            .and_then(|file| file.sync_all())
            .expect("temporary folder");
    };
    group.bench_function("bound: copy of the result by the system, and sync", |b| {
        b.iter_batched(
            || drop(fs::remove_file(&plain)),
            copy,
            BatchSize::PerIteration,
        );
    });
}

criterion_group!(benches, calibration, rewriting);
criterion_main!(benches);
