//! Products of one vector with matrices made of blocks, and whole steps, beside the dense ones. The throughput is that of the
//! bytes that a product reads of its matrix.
//!
//! `cargo bench -p prune-lattice --bench blocks`

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use prune_lattice::{
    Cell,
    mask::{Block, MaskSet},
    order::bits::BitMatrix,
    prune::{Method, PruneConfig, prune},
    rnn::{
        BlockInput, BlockMatrix, BlockRnn, BlockSource, BlockWork, CompactRnn, Input, InputKind,
        Rnn, RnnConfig, State, Tape,
    },
};
use std::{hint::black_box, time::Duration};

const METHODS: [Method; 3] = [Method::Block8x4, Method::Block8x1, Method::Block4x1];

/// `[rows, cols]` with about a share of its blocks.
fn mask(rows: usize, cols: usize, block: Block, share: f64) -> BitMatrix {
    let (_, across) = block.grid(rows, cols);
    BitMatrix::from_fn(rows, cols, |i, j| {
        let b = i / block.rows * across + j / block.cols;
        let hash = (b as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
        (hash as f64) < share * f64::from(u32::MAX)
    })
}

fn matrices(c: &mut Criterion) {
    for (rows, cols) in [(512, 128), (1152, 384), (4096, 1024)] {
        let mut group = c.benchmark_group(format!("product {rows}x{cols}"));
        group
            .sample_size(30)
            .measurement_time(Duration::from_secs(1))
            .warm_up_time(Duration::from_millis(200));
        let weights: Vec<f32> = (0..rows * cols).map(|k| (k as f32 * 0.37).sin()).collect();
        let mut x = BlockInput::new();
        x.set(
            &(0..cols)
                .map(|k| (k as f32 * 0.71).cos())
                .collect::<Vec<f32>>(),
        );
        x.quantise(Some(1.0));
        let mut y = vec![0.0; rows];
        let mut bench = |name: &str, density: f64, matrix: &BlockMatrix| {
            group.throughput(Throughput::Bytes(matrix.bytes() as u64));
            group.bench_function(BenchmarkId::new(name, density), |b| {
                b.iter(|| matrix.add_product(black_box(&x), black_box(&mut y)));
            });
        };
        let all = BlockSource {
            name: "w",
            weights: &weights,
            rows,
            cols,
            keep: None,
        };
        let any = Block { rows: 8, cols: 4 };
        let dense = BlockMatrix::new(&all, any).expect("sizes fit");
        bench("dense f32", 1.0, &dense);
        bench("dense int8", 1.0, &dense.quantised());
        for method in METHODS {
            let block = method.block().expect("a method of blocks");
            for density in [1.0, 0.5, 0.33, 0.25, 0.1] {
                let keep = mask(rows, cols, block, density);
                let source = BlockSource {
                    keep: Some(&keep),
                    ..all
                };
                let matrix = BlockMatrix::new(&source, block).expect("whole blocks");
                bench(&format!("{method} f32"), density, &matrix);
                bench(&format!("{method} int8"), density, &matrix.quantised());
            }
        }
        group.finish();
    }
}

fn steps(c: &mut Criterion) {
    for (cell, hidden) in [(Cell::Lstm, 128), (Cell::Gru, 384), (Cell::Lstm, 1024)] {
        let shape = RnnConfig::new(cell, InputKind::Dense { dim: hidden }, [hidden], 1);
        let rnn = Rnn::new(shape, 1).expect("sizes above 0");
        let mut group = c.benchmark_group(format!("step of {cell} {hidden} to {hidden}"));
        group
            .sample_size(30)
            .measurement_time(Duration::from_secs(1))
            .warm_up_time(Duration::from_millis(200));
        let x: Vec<f32> = (0..hidden).map(|k| (k as f32 * 0.71).cos()).collect();
        let compact = CompactRnn::new(&rnn, &MaskSet::default()).expect("no masks");
        let mut state = State::zeros(compact.network(), 1);
        let (mut tape, mut logits) = (Tape::new(), Vec::new());
        group.bench_function("dense, engine of training", |b| {
            b.iter(|| {
                compact
                    .forward(&mut tape, Input::Vectors(&x), 1, &mut state)
                    .expect("input fits");
                compact.read_out(&tape, None, &mut logits);
            });
        });
        let mut bench = |name: String, network: &BlockRnn| {
            let (mut state, mut work) = (State::zeros(&rnn, 1), BlockWork::new());
            group.throughput(Throughput::Bytes(network.bytes() as u64));
            group.bench_function(name, |b| {
                b.iter(|| network.step(Input::Vectors(&x), &mut state, &mut work));
            });
        };
        let any = Block { rows: 8, cols: 4 };
        let dense = BlockRnn::new(&rnn, &MaskSet::default(), any).expect("no masks");
        bench("dense f32".into(), &dense);
        bench("dense int8".into(), &dense.quantised());
        for method in METHODS {
            for sparsity in [0.5, 0.75, 0.9] {
                let config = PruneConfig::new(method, sparsity)
                    .with(|c| c.scope = prune_lattice::prune::Scope::Both);
                let (masks, _) = prune(&rnn, &config).expect("blocks need nothing else");
                let block = method.block().expect("a method of blocks");
                let network = BlockRnn::new(&rnn, &masks, block).expect("whole blocks");
                bench(format!("{method} f32 at {sparsity}"), &network);
                bench(format!("{method} int8 at {sparsity}"), &network.quantised());
            }
        }
        group.finish();
    }
}

criterion_group!(benches, matrices, steps);
criterion_main!(benches);
