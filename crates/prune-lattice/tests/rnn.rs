//! Networks: the flat engine against candle, checkpoints, removal of neurons.

mod common;

use candle_core::{Device, Tensor};
use common::{INPUTS, network};
use prune_lattice::data::Inputs;
use prune_lattice::{
    Cell, Error,
    mask::{hard_remove, neuron_masks},
    prune::{Method, PruneConfig, prune},
    rnn::{CheckpointNames, CompactRnn, Input, InputKind, Rnn, State, Tape, graph::GraphRnn},
};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::collections::HashMap;

/// Inputs of 6 steps and 3 sequences for the engine and for candle.
fn inputs(kind: InputKind) -> (Inputs, Tensor) {
    let mut rng = ChaCha8Rng::seed_from_u64(21);
    match kind.vocab() {
        Some(vocab) => {
            let s: Vec<u32> = (0..18).map(|_| rng.random_range(0..vocab as u32)).collect();
            let t = Tensor::from_slice(&s, (6, 3), &Device::Cpu).unwrap();
            (Inputs::Symbols(s), t)
        }
        None => {
            let dim = kind.width();
            let x: Vec<f32> = (0..18 * dim).map(|_| rng.random_range(-1.0..1.0)).collect();
            let t = Tensor::from_slice(&x, (6, 3, dim), &Device::Cpu).unwrap();
            (Inputs::Vectors { dim, values: x }, t)
        }
    }
}

fn view(inputs: &Inputs) -> Input<'_> {
    match inputs {
        Inputs::Symbols(s) => Input::Symbols(s),
        Inputs::Vectors { values, .. } => Input::Vectors(values),
    }
}

fn logits(rnn: &Rnn, input: Input<'_>, steps: usize, batch: usize) -> Vec<f32> {
    let (mut tape, mut out) = (Tape::new(), Vec::new());
    tape.forward(rnn, input, steps, &mut State::zeros(rnn, batch))
        .unwrap();
    tape.read_out(rnn, None, &mut out);
    out
}

#[test]
fn the_flat_forward_agrees_with_candle_for_every_cell_and_input() {
    for &cell in Cell::ALL {
        for kind in INPUTS {
            let rnn = network(cell, kind, &[7, 5], 4);
            let (x, t) = inputs(kind);
            let flat = logits(&rnn, view(&x), 6, 3);
            let graph = GraphRnn::new(&rnn, &Device::Cpu)
                .unwrap()
                .forward(&t)
                .unwrap();
            let graph: Vec<f32> = graph.flatten_all().unwrap().to_vec1().unwrap();
            assert!(
                flat.iter().zip(&graph).all(|(a, b)| (a - b).abs() < 2e-5),
                "{cell} {kind:?}"
            );
        }
    }
}

#[test]
fn a_sequence_read_in_pieces_gives_the_same_states() {
    for &cell in Cell::ALL {
        let kind = INPUTS[0];
        let rnn = network(cell, kind, &[7, 5], 4);
        let (Inputs::Symbols(s), _) = inputs(kind) else {
            unreachable!()
        };
        let whole = logits(&rnn, Input::Symbols(&s), 6, 3);
        let (mut tape, mut state, mut out) = (Tape::new(), State::zeros(&rnn, 3), Vec::new());
        let mut pieces = Vec::new();
        for (from, to) in [(0, 2), (2, 3), (3, 6)] {
            tape.forward(
                &rnn,
                Input::Symbols(&s[from * 3..to * 3]),
                to - from,
                &mut state,
            )
            .unwrap();
            tape.read_out(&rnn, None, &mut out);
            pieces.extend_from_slice(&out);
        }
        assert!(
            whole.iter().zip(&pieces).all(|(a, b)| (a - b).abs() < 1e-5),
            "{cell}"
        );
    }
}

#[test]
fn renumbered_block_inference_agrees_with_the_masked_network() {
    for &cell in Cell::ALL {
        for method in [
            Method::Strength,
            Method::Magnitude,
            Method::ZeroWhh,
            Method::Dense,
        ] {
            let kind = INPUTS[0];
            let rnn = network(cell, kind, &[16, 12], 4);
            let (masks, _) = prune(&rnn, &PruneConfig::new(method, 0.8)).unwrap();
            let mut masked = rnn.clone();
            masks.apply(masked.params_mut()).unwrap();
            let (x, _) = inputs(kind);
            let expected = logits(&masked, view(&x), 6, 3);
            let compact = CompactRnn::new(&rnn, &masks).unwrap();
            let (mut tape, mut out) = (Tape::new(), Vec::new());
            compact
                .forward(&mut tape, view(&x), 6, &mut State::zeros(&rnn, 3))
                .unwrap();
            compact.read_out(&tape, None, &mut out);
            assert!(
                out.iter().zip(&expected).all(|(a, b)| (a - b).abs() < 1e-5),
                "{cell} {method}"
            );
            let (block, dense) = compact.recurrent_products();
            match method {
                Method::Strength => assert!(block * 4 <= dense, "{block} of {dense}"),
                Method::ZeroWhh => assert_eq!(block, 0),
                Method::Dense => assert_eq!(block, dense),
                _ => {}
            }
        }
    }
}

#[test]
fn removing_neurons_equals_masking_them_everywhere() {
    for &cell in Cell::ALL {
        for kind in INPUTS {
            let rnn = network(cell, kind, &[9, 6], 4);
            let keep = vec![
                vec![true, false, true, true, false, false, true, true, false],
                vec![false, true, true, false, true, true],
            ];
            let masks = neuron_masks(&rnn, &keep).unwrap();
            let mut masked = rnn.clone();
            masks.apply(masked.params_mut()).unwrap();
            let small = hard_remove(&rnn, &keep).unwrap();
            assert_eq!(small.config().hidden, [5, 4]);
            assert_eq!(
                small.params().count(),
                rnn.params().count() - masks.pruned()
            );
            let (x, _) = inputs(kind);
            let (a, b) = (
                logits(&masked, view(&x), 6, 3),
                logits(&small, view(&x), 6, 3),
            );
            assert!(
                a.iter().zip(&b).all(|(a, b)| (a - b).abs() < 1e-5),
                "{cell} {kind:?}"
            );
        }
    }
    let rnn = network(Cell::Lstm, INPUTS[0], &[4], 2);
    assert!(matches!(
        hard_remove(&rnn, &[vec![false; 4]]),
        Err(Error::Setting { .. })
    ));
    assert!(matches!(
        hard_remove(&rnn, &[vec![true; 3]]),
        Err(Error::Shape { .. })
    ));
}

/// Whether the first symbol comes back at the end: needs memory.

#[test]
fn checkpoints_round_trip_and_accept_pytorch_names() {
    let dir = tempfile::tempdir().unwrap();
    for cell in [Cell::Lstm, Cell::Gru] {
        let rnn = network(cell, INPUTS[1], &[6, 4], 5);
        let file = dir.path().join("model.safetensors");
        rnn.save(&file).unwrap();
        assert_eq!(Rnn::load(&file, &CheckpointNames::default()).unwrap(), rnn);
    }
    // PyTorch writes two biases per layer.
    let rnn = network(Cell::Gru, INPUTS[2], &[4], 2);
    let mut t = rnn.params().to_tensors().unwrap();
    let joined: Vec<f32> = t.remove("rnn.bias_l0").unwrap().to_vec1().unwrap();
    let candidate: Vec<f32> = t.remove("rnn.bias_hn_l0").unwrap().to_vec1().unwrap();
    let mut hh = vec![0.25f32; 8];
    hh.extend(candidate);
    let ih: Vec<f32> = joined
        .iter()
        .enumerate()
        .map(|(k, b)| if k < 8 { b - 0.25 } else { *b })
        .collect();
    t.insert(
        "rnn.bias_ih_l0".into(),
        Tensor::from_vec(ih, 12, &Device::Cpu).unwrap(),
    );
    t.insert(
        "rnn.bias_hh_l0".into(),
        Tensor::from_vec(hh, 12, &Device::Cpu).unwrap(),
    );
    let names = CheckpointNames::default().with(|c| c.dense_input = true);
    let back = Rnn::from_tensors(&t, &names).unwrap();
    for (a, b) in back.params().iter().zip(rnn.params().iter()) {
        assert!(
            a.data
                .iter()
                .zip(&b.data)
                .all(|(a, b)| (a - b).abs() < 1e-6),
            "{}",
            a.name
        );
    }
}

#[test]
fn bad_checkpoints_are_typed_errors() {
    let names = CheckpointNames::default();
    let tensors = || {
        network(Cell::Lstm, INPUTS[0], &[6], 5)
            .params()
            .to_tensors()
            .unwrap()
    };
    assert!(matches!(
        Rnn::from_tensors(&HashMap::new(), &names),
        Err(Error::MissingTensor { .. })
    ));
    let mut t = tensors();
    t.remove("out.weight");
    assert!(
        matches!(Rnn::from_tensors(&t, &names), Err(Error::MissingTensor { name }) if name == "out.weight")
    );
    let mut t = tensors();
    t.insert(
        "rnn.weight_hh_l0".into(),
        Tensor::zeros((24, 7), candle_core::DType::F32, &Device::Cpu).unwrap(),
    );
    assert!(
        matches!(Rnn::from_tensors(&t, &names), Err(Error::Shape { tensor, .. }) if tensor == "rnn.weight_hh_l0")
    );
    let mut t = tensors();
    t.insert(
        "out.bias".into(),
        Tensor::from_slice(&[0f32, 1., f32::NAN, 0., 0.], 5, &Device::Cpu).unwrap(),
    );
    assert!(
        matches!(Rnn::from_tensors(&t, &names), Err(Error::NonFinite { tensor, index: 2, .. }) if tensor == "out.bias")
    );
    let t = network(Cell::Tanh, INPUTS[0], &[6], 5)
        .params()
        .to_tensors()
        .unwrap();
    assert!(matches!(
        Rnn::from_tensors(&t, &names),
        Err(Error::Setting { .. })
    ));
    let names = names.with(|c| c.cell = Some(Cell::Gru));
    assert!(matches!(
        Rnn::from_tensors(&tensors(), &names),
        Err(Error::Shape { .. })
    ));
    assert!("gruu".parse::<Cell>().is_err());
    assert!("tensorflow".parse::<prune_lattice::GateLayout>().is_err());
    assert!("lattice".parse::<Method>().is_err());
}

#[test]
fn inputs_that_do_not_fit_are_typed_errors() {
    let rnn = network(Cell::Lstm, INPUTS[0], &[6], 5);
    let mut state = State::zeros(&rnn, 1);
    let mut tape = Tape::new();
    assert!(matches!(
        tape.forward(&rnn, Input::Symbols(&[1, 5]), 2, &mut state),
        Err(Error::Setting { .. })
    ));
    assert!(matches!(
        tape.forward(&rnn, Input::Symbols(&[1]), 2, &mut state),
        Err(Error::Shape { .. })
    ));
    assert!(matches!(
        tape.forward(&rnn, Input::Vectors(&[1.0; 5]), 1, &mut state),
        Err(Error::Setting { .. })
    ));
    let dense = network(Cell::Lstm, INPUTS[2], &[6], 5);
    let x = [0.0, 1.0, f32::INFINITY, 0.0];
    assert!(matches!(
        tape.forward(&dense, Input::Vectors(&x), 1, &mut State::zeros(&dense, 1)),
        Err(Error::NonFinite { index: 2, .. })
    ));
}
