//! What a plan costs once units are scored: 32 layers with 32 heads and 14,336 neurons, the widths of a model of eight
//! billion parameters. Counted in units, so that "elem/s" reads as units per second; the bound is sorting their scores.

use std::hint::black_box;

use criterion::{BatchSize, Criterion, SamplingMode, Throughput, criterion_group, criterion_main};
use prune_structured::stats::Part;
use prune_structured::{Allocation, Ranking};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

const LAYERS: usize = 32;
const HEADS: usize = 32;
const NEURONS: usize = 14_336;
const HIDDEN: u64 = 4096;

fn rankings() -> Vec<Ranking> {
    let mut rng = ChaCha8Rng::seed_from_u64(0);
    let mut ranking = |layer, part, units, cost| {
        let scores: Vec<f64> = (0..units).map(|_| rng.random()).collect();
        let mut ranking = Ranking::units(layer, part, &scores, cost, 1);
        ranking.protected = 1;
        ranking.energy = scores.iter().sum::<f64>() / ranking.total() as f64;
        // The error of leaving out the steps behind, were scores errors.
        let mut errors = vec![0.0; units + 1];
        for step in (0..units).rev() {
            errors[step] = errors[step + 1] + ranking.steps()[step].score;
        }
        ranking.errors = Some(errors);
        ranking
    };
    (0..LAYERS)
        .flat_map(|layer| {
            [
                ranking(layer, Part::Attention, HEADS, 4 * 128 * HIDDEN),
                ranking(layer, Part::Mlp, NEURONS, 3 * HIDDEN),
            ]
        })
        .collect()
}

fn plan(c: &mut Criterion) {
    let rankings = rankings();
    let units = LAYERS * (HEADS + NEURONS);
    let mut group = c.benchmark_group("plan");
    group.sampling_mode(SamplingMode::Flat).sample_size(10);
    group.throughput(Throughput::Elements(units as u64));
    let allocations = Allocation::NAMES.iter().filter(|&&name| name != "searched");
    for &name in allocations {
        let allocation = Allocation::named(name).expect("a known name");
        group.bench_function(name, |b| {
            b.iter(|| {
                let keep = allocation
                    .keep(&rankings, 0.3, 0)
                    .expect("a ratio in reach");
                let kept = rankings.iter().zip(keep).map(|(r, steps)| r.kept(steps));
                black_box(kept.collect::<Vec<_>>())
            });
        });
    }
    let scores: Vec<f64> = rankings
        .iter()
        .flat_map(Ranking::steps)
        .map(|s| s.score)
        .collect();
    group.bench_function("bound: sorting the scores", |b| {
        b.iter_batched(
            || scores.clone(),
            |mut scores| scores.sort_by(f64::total_cmp),
            BatchSize::PerIteration,
        );
    });
}

criterion_group!(benches, plan);
criterion_main!(benches);
