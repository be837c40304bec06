//! What a sweep through nine levels costs beside one level, and beside the products it cannot do
//! without; what candidates that share blocks save beside candidates that do not.
//!
//! The sweep goes over 2,048 neurons and 512 outputs down to half of them, in the paper's rounds of
//! 16. It is counted in floating-point operations: H B, factoring and inverting H, and the updates
//! of every round, so "elem/s" reads as FLOP/s. Searching is counted in tokens of candidates.

use std::hint::black_box;
use std::time::Duration;

use candle_core::{DType, Device, Tensor};
use causal_lm::{Decoder, Windows, synthetic};
use criterion::{BatchSize, Criterion, SamplingMode, Throughput, criterion_group, criterion_main};
use prune_structured::obs::{Problem, Rounds, Units, sweep};
use prune_structured::tyr::{Data, Options, Run, Sharing, Stage, Start, search};
use prune_structured::{NoProgress, Recipe};
use tensor_io::{Checkpoint, Config, WriteOptions};

const COLUMNS: usize = 2048;
const OUTPUTS: usize = 512;
const ROUND: usize = 16;

fn sweeping(c: &mut Criterion) {
    let random = |rows| Tensor::randn(0f32, 1.0, (rows, COLUMNS), &Device::Cpu).expect("memory");
    let (x, weight) = (random(2 * COLUMNS), random(OUTPUTS));
    let gram = x.t().and_then(|t| t.matmul(&x)).expect("shapes fit");
    let problem = Problem::new(&weight, &gram, 0.01, 0).expect("shapes fit");
    let units = Units::single(COLUMNS, 1);
    let (n, m) = (COLUMNS as u64, OUTPUTS as u64);
    let once = 2 * n * n * m + n * n * n;
    let rounds = (n / 2..n).step_by(ROUND);
    let updates: u64 = rounds.map(|left| (left * left + 2 * m * left) * 16).sum();

    let mut group = c.benchmark_group("sweep");
    group.sampling_mode(SamplingMode::Flat).sample_size(10);
    group.throughput(Throughput::Elements(once + updates));
    let nine: Vec<usize> = (8..=16).map(|sixteenth| sixteenth * COLUMNS / 16).collect();
    for (name, levels) in [("one level", &nine[..1]), ("nine levels", &nine)] {
        group.bench_function(name, |b| {
            b.iter_batched(
                || problem.clone(),
                |problem| sweep(problem, &units, Rounds::PAPER, levels).expect("positive definite"),
                BatchSize::PerIteration,
            );
        });
    }
    group.throughput(Throughput::Elements(2 * n * n * n));
    let wide = faer::Mat::<f64>::from_fn(COLUMNS, COLUMNS, |i, j| (i * j % 7) as f64);
    group.bench_function("bound: a square product in f64", |b| {
        b.iter(|| black_box(&wide * &wide));
    });
}

/// A model of eight blocks whose search takes seconds.
fn searching(c: &mut Criterion) {
    let dir = tempfile::tempdir().expect("temporary folder");
    let fields = serde_json::json!({
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 8,
        "num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 256, "max_position_embeddings": 128,
    });
    let config = Config::new(fields.as_object().expect("an object").clone());
    let (model, options) = (dir.path().join("model"), WriteOptions::default());
    synthetic::write(&config, DType::F32, &model, &options, synthetic::random(0))
        .expect("temporary folder");
    let checkpoint = Checkpoint::open(&model).expect("just written");
    let decoder = Decoder::new(&checkpoint, DType::F32, &Device::Cpu).expect("a supported model");
    let text: Vec<u32> = (0..64 * 64).map(|i| (i * 31 % 251) as u32).collect();
    let windows = Windows::cut(&text, 64, None).expect("long enough");
    let recipe = Recipe::named("tyr", 0).expect("a known name");

    let stage = |tokens, survivors| Stage { tokens, survivors };
    let sizes = |sharing| {
        let mut options = Options::default();
        (options.iterations, options.generations, options.offspring) = (1, 4, 32);
        options.stages = vec![stage(512, 8), stage(1024, 2), stage(2048, 1)];
        options.sharing = sharing;
        options
    };
    let data = Data {
        calibration: &windows,
        search: &windows,
    };
    let run = |sharing| {
        let folder = tempfile::tempdir().expect("temporary folder");
        let options = sizes(sharing);
        let run = Run {
            options: &options,
            dir: folder.path(),
        };
        let start = Start::Uniform(0.25);
        search(&decoder, &data, &recipe, start, run, &NoProgress)
            .expect("a search of sensible size")
    };
    let mut group = c.benchmark_group("search");
    group.sampling_mode(SamplingMode::Flat).sample_size(10);
    group.throughput(Throughput::Elements(
        run(Sharing::Prefixes).candidate_tokens,
    ));
    for (name, sharing) in [
        ("candidates restarted where they differ", Sharing::Prefixes),
        ("candidates run alone", Sharing::Nothing),
    ] {
        // Comparing candidates alone, without the supernet.
        group.bench_function(name, |b| {
            b.iter_custom(|runs| {
                let seconds: f64 = (0..runs).map(|_| run(sharing).seconds).sum();
                Duration::from_secs_f64(seconds)
            });
        });
    }
}

criterion_group!(benches, sweeping, searching);
criterion_main!(benches);
