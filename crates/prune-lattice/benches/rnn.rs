//! Training step of the flat engine beside candle's autograd, and inference: dense, on the block a mask leaves, removed.
//!
//! `cargo bench -p prune-lattice --bench rnn`

use candle_core::{Device, Tensor};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use prune_lattice::{
    Cell, NoProgress,
    data::{Dataset, Examples, Inputs, Sequences, Targets},
    mask::{MaskSet, hard_remove},
    prune::{Method, PruneConfig, prune, rank_neurons},
    rnn::{
        CompactRnn, Input, InputKind, Rnn, RnnConfig, State, Tape, TrainConfig, graph::GraphRnn,
        train,
    },
};
use std::time::Duration;

const STEPS: usize = 20;
const BATCH: usize = 32;

fn network(cell: Cell, hidden: Vec<usize>) -> Rnn {
    Rnn::new(
        RnnConfig::new(cell, InputKind::OneHot { vocab: 7 }, hidden, 2),
        1,
    )
    .expect("sizes above 0")
}

/// One batch of 32 strings of 20 symbols: forward, backward, Adam (one batch per epoch, validation of one string).
fn training(c: &mut Criterion) {
    let mut group = c.benchmark_group("training step, 32 x 20 symbols");
    group
        .sample_size(10)
        .measurement_time(Duration::from_secs(3))
        .warm_up_time(Duration::from_millis(300));
    group.throughput(Throughput::Elements((STEPS * BATCH) as u64));
    let split = |count: usize| {
        let symbols = (0..count * STEPS).map(|k| (k * k % 7) as u32).collect();
        let classes = (0..count).map(|k| (k % 2) as u32).collect();
        let s = Sequences::new(
            Inputs::Symbols(symbols),
            &vec![STEPS; count],
            Targets::Classes(classes),
        );
        Examples::Sequences(s.expect("lengths fit"))
    };
    let data = Dataset {
        train: split(BATCH),
        valid: split(1),
        test: split(1),
        input: InputKind::OneHot { vocab: 7 },
        outputs: 2,
    };
    for cell in [Cell::Tanh, Cell::Gru, Cell::Lstm] {
        for hidden in [32, 128] {
            let mut rnn = network(cell, vec![hidden]);
            let config = TrainConfig::default().with(|c| {
                c.epochs = 1;
                c.patience = None;
            });
            group.bench_function(format!("flat {cell}-{hidden}"), |b| {
                b.iter(|| {
                    train(&mut rnn, &data, &config, &MaskSet::default(), &NoProgress)
                        .expect("a stable step")
                });
            });
            let graph = GraphRnn::new(&rnn, &Device::Cpu).expect("copying works");
            let symbols: Vec<u32> = (0..STEPS * BATCH).map(|k| (k * k % 7) as u32).collect();
            let x = Tensor::from_vec(symbols, (STEPS, BATCH), &Device::Cpu).expect("shape fits");
            group.bench_function(
                format!("candle autograd {cell}-{hidden}, without optimiser"),
                |b| {
                    b.iter(|| {
                        let logits = graph.forward(&x)?.get(STEPS - 1)?;
                        let loss = (logits.exp()?.sum(1)?.log()? - logits.get_on_dim(1, 0)?)?
                            .mean_all()?;
                        Ok::<_, prune_lattice::Error>(loss.backward()?)
                    });
                },
            );
        }
    }
    group.finish();
}

fn inference(c: &mut Criterion) {
    let rnn = network(Cell::Lstm, vec![256, 256]);
    for batch in [1, 32] {
        let mut group = c.benchmark_group(format!("step of LSTM 2x256, batch {batch}"));
        group
            .sample_size(20)
            .measurement_time(Duration::from_secs(2))
            .warm_up_time(Duration::from_millis(300));
        group.throughput(Throughput::Elements(batch as u64));
        let symbols = vec![3; batch];
        let mut bench = |name: String, network: &CompactRnn| {
            let mut state = State::zeros(network.network(), batch);
            let (mut tape, mut logits) = (Tape::new(), Vec::new());
            group.bench_function(name, |b| {
                b.iter(|| {
                    network
                        .forward(&mut tape, Input::Symbols(&symbols), 1, &mut state)
                        .expect("input fits");
                    network.read_out(&tape, None, &mut logits);
                });
            });
        };
        let none = MaskSet::default();
        bench(
            "dense".into(),
            &CompactRnn::new(&rnn, &none).expect("no masks"),
        );
        for sparsity in [0.5, 0.75, 0.9] {
            let config = PruneConfig::new(Method::LatticeContext, sparsity);
            let (masks, _) = prune(&rnn, &config).expect("an order");
            bench(
                format!("block under a {sparsity} mask"),
                &CompactRnn::new(&rnn, &masks).expect("masks fit"),
            );
            let small = hard_remove(&rnn, &rank_neurons(&rnn, &config).expect("an order"))
                .expect("flags fit");
            bench(
                format!("neurons removed at {sparsity}"),
                &CompactRnn::new(&small, &none).expect("no masks"),
            );
        }
        let (masks, _) =
            prune(&rnn, &PruneConfig::new(Method::Magnitude, 0.9)).expect("magnitude always works");
        bench(
            "scattered 0.9 mask (gains nothing)".into(),
            &CompactRnn::new(&rnn, &masks).expect("masks fit"),
        );
        group.finish();
    }
}

criterion_group!(benches, training, inference);
criterion_main!(benches);
