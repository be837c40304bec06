//! Kernels for masks made of blocks: the same results as the dense network with masked weights.

use prune_lattice::{
    Cell, Error,
    mask::{Block, Mask, MaskSet},
    order::bits::BitMatrix,
    prune::{Method, PruneConfig, prune},
    rnn::{
        BlockInput, BlockMatrix, BlockRnn, BlockSource, BlockWork, Input, InputKind, ReadOut, Rnn,
        RnnConfig, State, Tape,
    },
};

const BLOCKS: [Block; 3] = [
    Block { rows: 8, cols: 4 },
    Block { rows: 8, cols: 1 },
    Block { rows: 4, cols: 1 },
];

/// Numbers that look random.
fn hash(k: usize) -> u64 {
    (k as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 20
}

/// About `share` percent of the blocks of each gate.
fn block_mask(gates: usize, rows: usize, cols: usize, block: Block, share: u64) -> BitMatrix {
    let (down, across) = block.grid(rows, cols);
    BitMatrix::from_fn(gates * rows, cols, |row, j| {
        let (gate, i) = (row / rows, row % rows);
        let b = (gate * down + i / block.rows) * across + j / block.cols;
        hash(b) % 100 < share
    })
}

/// Small integers: every order of summation gives the same sum.
fn integers(count: usize, largest: i64) -> Vec<f32> {
    let width = 2 * largest as u64 + 1;
    (0..count)
        .map(|k| ((hash(k + 77) % width) as i64 - largest) as f32)
        .collect()
}

fn source<'a>(
    weights: &'a [f32],
    rows: usize,
    cols: usize,
    keep: Option<&'a BitMatrix>,
) -> BlockSource<'a> {
    BlockSource {
        name: "w",
        weights,
        rows,
        cols,
        keep,
    }
}

#[test]
fn products_equal_those_of_the_masked_dense_matrix_exactly() {
    for (gates, rows, cols) in [(1, 8, 8), (3, 13, 11), (4, 24, 24), (2, 37, 70), (1, 5, 1)] {
        let w = integers(gates * rows * cols, 9);
        let x = integers(cols, 5);
        let mut input = BlockInput::new();
        // What a longer vector leaves behind must not matter.
        input.set(&integers(cols + 40, 5));
        input.set(&x);
        let mut masks = vec![(BLOCKS[0], None)];
        for block in BLOCKS {
            for share in [0, 10, 50, 100] {
                masks.push((block, Some(block_mask(gates, rows, cols, block, share))));
            }
        }
        for (block, mask) in masks {
            let keep = mask.as_ref();
            let matrix = BlockMatrix::new(&source(&w, rows, cols, keep), block).unwrap();
            let mut y = integers(gates * rows, 3);
            let expected: Vec<f32> = (0..gates * rows)
                .map(|i| {
                    let kept = (0..cols).filter(|&j| keep.is_none_or(|k| k.get(i, j)));
                    y[i] + kept.map(|j| w[i * cols + j] * x[j]).sum::<f32>()
                })
                .collect();
            matrix.add_product(&input, &mut y);
            assert_eq!(y, expected, "{gates}x{rows}x{cols} {block:?}");
        }
    }
}

#[test]
fn products_of_8_bits_are_exact_where_weights_and_inputs_are_codes() {
    for (gates, rows, cols) in [(1, 8, 8), (3, 13, 11), (4, 24, 24), (2, 37, 70)] {
        let mut w = integers(gates * rows * cols, 127);
        let x: Vec<f32> = integers(cols, 127).iter().map(|v| v / 127.0).collect();
        let mut input = BlockInput::new();
        input.set(&x);
        input.quantise(Some(1.0));
        for block in BLOCKS {
            for share in [30, 100] {
                let keep = block_mask(gates, rows, cols, block, share);
                // The largest weight of every row that keeps one is 127, so that a code of 1 stands for 1.
                for i in 0..gates * rows {
                    if let Some(j) = keep.row_ones(i).next() {
                        w[i * cols + j] = 127.0;
                    }
                }
                let whole = share == 100;
                let kept = (!whole).then_some(&keep);
                let floats = BlockMatrix::new(&source(&w, rows, cols, kept), block).unwrap();
                let matrix = floats.clone().quantised();
                assert!(matrix.bytes() < floats.bytes());
                let (mut y, mut expected) = (vec![0.0; gates * rows], vec![0.0; gates * rows]);
                matrix.add_product(&input, &mut y);
                floats.add_product(&input, &mut expected);
                for (y, e) in y.iter().zip(&expected) {
                    assert!((y - e).abs() <= 2e-6 * e.abs() + 1e-3, "{y} {e}");
                }
            }
        }
    }
}

#[test]
fn a_mask_that_cuts_a_block_is_an_error_that_names_the_first_one() {
    let w = integers(2 * 16 * 16, 9);
    let mut keep = block_mask(2, 16, 16, BLOCKS[0], 100);
    keep.set(16 + 9, 6, false);
    let found = BlockMatrix::new(&source(&w, 16, 16, Some(&keep)), BLOCKS[0]);
    match found {
        Err(Error::PartialBlock {
            tensor,
            at,
            kept,
            of,
            ..
        }) => assert_eq!((tensor.as_str(), at, kept, of), ("w", (24, 4), 31, 32)),
        other => panic!("{other:?}"),
    }
    let odd = Block { rows: 16, cols: 1 };
    assert!(matches!(
        BlockMatrix::new(&source(&w, 16, 16, Some(&keep)), odd),
        Err(Error::Setting { .. })
    ));
    assert!(matches!(
        BlockMatrix::new(&source(&w, 16, 70_000, None), BLOCKS[0]),
        Err(Error::Shape { .. })
    ));
    let nan = vec![f32::NAN; 256];
    assert!(matches!(
        BlockMatrix::new(&source(&nan, 16, 16, None), BLOCKS[0]),
        Err(Error::NonFinite { .. })
    ));
}

#[test]
fn the_diagonal_of_each_gate_may_be_kept_beside_the_blocks() {
    let (gates, n) = (3, 20);
    let w = integers(gates * n * n, 9);
    let x = integers(n, 5);
    let mut input = BlockInput::new();
    input.set(&x);
    for block in BLOCKS {
        let mut keep = block_mask(gates, n, n, block, 30);
        (0..gates * n).for_each(|i| keep.set(i, i % n, true));
        let matrix = BlockMatrix::new(&source(&w, n, n, Some(&keep)), block).unwrap();
        let mut y = vec![0.0; gates * n];
        matrix.add_product(&input, &mut y);
        for (i, y) in y.iter().enumerate() {
            let expected: f32 = keep.row_ones(i).map(|j| w[i * n + j] * x[j]).sum();
            assert_eq!(*y, expected);
        }
    }
}

fn network(cell: Cell, input: InputKind, hidden: &[usize]) -> Rnn {
    let config = RnnConfig::new(cell, input, hidden, 3).with(|c| c.read_out = ReadOut::Relu);
    Rnn::new(config, 5).unwrap()
}

/// Logits of every step, by the block kernels and by the dense engine on the masked weights.
fn compare(rnn: &Rnn, masks: &MaskSet, network: &BlockRnn, steps: usize) -> f32 {
    let symbols: Vec<u32> = (0..steps).map(|t| (hash(t) % 7) as u32).collect();
    let width = rnn.config().input.width();
    let vectors: Vec<f32> = (0..steps * width)
        .map(|k| (k as f32 * 0.37).sin())
        .collect();
    let input = |from: usize, to: usize| match rnn.config().input.vocab() {
        Some(_) => Input::Symbols(&symbols[from..to]),
        None => Input::Vectors(&vectors[from * width..to * width]),
    };
    let mut masked = rnn.clone();
    masks.apply(masked.params_mut()).unwrap();
    let (mut tape, mut logits) = (Tape::new(), Vec::new());
    let mut state = State::zeros(&masked, 1);
    tape.forward(&masked, input(0, steps), steps, &mut state)
        .unwrap();
    tape.read_out(&masked, None, &mut logits);
    let (mut own, mut work) = (State::zeros(rnn, 1), BlockWork::new());
    let mut farthest = 0f32;
    for t in 0..steps {
        network.step(input(t, t + 1), &mut own, &mut work).unwrap();
        for (a, b) in work.logits().iter().zip(&logits[3 * t..]) {
            farthest = farthest.max((a - b).abs());
        }
    }
    farthest
}

#[test]
fn networks_under_block_masks_run_as_the_masked_dense_network_and_close_to_it_in_8_bits() {
    let kinds = [
        InputKind::OneHot { vocab: 7 },
        InputKind::Embedding { vocab: 7, dim: 10 },
        InputKind::Dense { dim: 9 },
    ];
    for (k, &cell) in Cell::ALL.iter().enumerate() {
        for method in [Method::Block8x4, Method::Block8x1, Method::Block4x1] {
            let rnn = network(cell, kinds[k % 3], &[24, 18]);
            let diagonal = method == Method::Block8x4;
            let config = PruneConfig::new(method, 0.6).with(|c| {
                c.keep_diagonal = diagonal;
                c.scope = prune_lattice::prune::Scope::Both;
            });
            let (masks, _) = prune(&rnn, &config).unwrap();
            let block = method.block().unwrap();
            let floats = BlockRnn::new(&rnn, &masks, block).unwrap();
            let far = compare(&rnn, &masks, &floats, 40);
            assert!(far < 2e-5, "{cell} {method}: {far}");
            let dense = BlockRnn::new(&rnn, &MaskSet::default(), block).unwrap();
            assert!(floats.bytes() < dense.bytes());
            assert!(compare(&rnn, &MaskSet::default(), &dense, 40) < 2e-5);
            let bytes = floats.bytes();
            let integers = floats.quantised();
            let far = compare(&rnn, &masks, &integers, 40);
            assert!(far < 0.05, "{cell} {method}, 8 bits: {far}");
            assert!(integers.bytes() < bytes);
        }
    }
}

#[test]
fn a_scattered_mask_and_a_state_of_two_sequences_are_refused() {
    let rnn = network(Cell::Gru, InputKind::Dense { dim: 4 }, &[16]);
    let (masks, _) = prune(&rnn, &PruneConfig::new(Method::Magnitude, 0.5)).unwrap();
    let found = BlockRnn::new(&rnn, &masks, BLOCKS[0]);
    assert!(
        matches!(&found, Err(Error::PartialBlock { tensor, .. }) if tensor.ends_with("weight_hh_l0")),
        "{found:?}"
    );
    let mut wrong = MaskSet::default();
    wrong.insert("rnn.weight_hh_l0", Mask::of_matrix(BitMatrix::ones(3, 3)));
    assert!(BlockRnn::new(&rnn, &wrong, BLOCKS[0]).is_err());
    let dense = BlockRnn::new(&rnn, &MaskSet::default(), BLOCKS[0]).unwrap();
    let (mut two, mut work) = (State::zeros(&rnn, 2), BlockWork::new());
    let x = [0.5; 8];
    assert!(dense.step(Input::Vectors(&x), &mut two, &mut work).is_err());
    let mut one = State::zeros(&rnn, 1);
    assert!(dense.step(Input::Vectors(&x), &mut one, &mut work).is_err());
    assert!(
        dense
            .step(Input::Vectors(&x[..4]), &mut one, &mut work)
            .is_ok()
    );
}

#[test]
#[should_panic(expected = "columns")]
fn a_vector_of_another_width_is_not_multiplied() {
    let w = integers(8 * 12, 9);
    let matrix = BlockMatrix::new(&source(&w, 8, 12, None), BLOCKS[0]).unwrap();
    let mut x = BlockInput::new();
    x.set(&integers(11, 5));
    matrix.add_product(&x, &mut [0.0; 8]);
}
