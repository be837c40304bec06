//! The explicit backward pass against candle's autograd and finite differences.

use super::{
    graph::GraphRnn,
    input::{Input, InputKind},
    loss::cross_entropy,
    model::{ReadOut, Rnn, RnnConfig},
    tape::{State, Tape},
};
use crate::{cell::Cell, params::ParamSet, seed};
use candle_core::{Device, Tensor};
use rand::Rng;

const STEPS: usize = 5;
const BATCH: usize = 3;
const CLASSES: usize = 4;

struct Case {
    rnn: Rnn,
    symbols: Vec<u32>,
    vectors: Vec<f32>,
    targets: Vec<u32>,
}

impl Case {
    fn new(cell: Cell, input: InputKind, read_out: ReadOut) -> Self {
        let mut rng = seed::rng(5, "gradients");
        let mut rnn = Rnn::new(
            RnnConfig::new(cell, input, [6, 5], CLASSES).with(|c| c.read_out = read_out),
            2,
        )
        .unwrap();
        rnn.params_mut()
            .iter_mut()
            .flat_map(|p| &mut p.data)
            .for_each(|v| *v += rng.random_range(-0.2..0.2));
        let vocab = input.vocab().unwrap_or(1) as u32;
        let symbols = (0..STEPS * BATCH)
            .map(|_| rng.random_range(0..vocab))
            .collect();
        let vectors = (0..STEPS * BATCH * input.width())
            .map(|_| rng.random_range(-1.0..1.0))
            .collect();
        let targets = (0..STEPS * BATCH)
            .map(|_| rng.random_range(0..CLASSES as u32))
            .collect();
        Self {
            rnn,
            symbols,
            vectors,
            targets,
        }
    }

    fn input(&self) -> Input<'_> {
        if self.rnn.config().input.vocab().is_some() {
            Input::Symbols(&self.symbols)
        } else {
            Input::Vectors(&self.vectors)
        }
    }

    /// Mean loss over all steps, or over the last ones at different times when `ragged`.
    fn loss(&self, rnn: &Rnn, rows: Option<&[usize]>, gradients: Option<&mut ParamSet>) -> f64 {
        let (mut tape, mut logits) = (Tape::new(), Vec::new());
        tape.forward(rnn, self.input(), STEPS, &mut State::zeros(rnn, BATCH))
            .unwrap();
        tape.read_out(rnn, rows, &mut logits);
        let targets: Vec<u32> = match rows {
            None => self.targets.clone(),
            Some(rows) => rows.iter().map(|&r| self.targets[r]).collect(),
        };
        let scale = 1.0 / targets.len() as f32;
        let sums = cross_entropy(&mut logits, CLASSES, &targets, scale);
        if let Some(gradients) = gradients {
            tape.backward(rnn, self.input(), rows, &logits, gradients);
        }
        sums.loss / targets.len() as f64
    }
}

const INPUTS: [InputKind; 3] = [
    InputKind::OneHot { vocab: 4 },
    InputKind::Embedding { vocab: 6, dim: 3 },
    InputKind::Dense { dim: 3 },
];

#[test]
fn gradients_agree_with_candles_autograd_for_every_parameter() {
    for &cell in Cell::ALL {
        for input in INPUTS {
            // Both read-outs with every cell, in turns.
            let read_out = ReadOut::ALL[usize::from(input.vocab().is_none())];
            let case = Case::new(cell, input, read_out);
            let mut gradients = case.rnn.params().zeros_like();
            case.loss(&case.rnn, None, Some(&mut gradients));
            let graph = GraphRnn::new(&case.rnn, &Device::Cpu).unwrap();
            let x = match case.input() {
                Input::Symbols(s) => Tensor::from_slice(s, (STEPS, BATCH), &Device::Cpu).unwrap(),
                Input::Vectors(v) => {
                    Tensor::from_slice(v, (STEPS, BATCH, input.width()), &Device::Cpu).unwrap()
                }
            };
            let logits = graph
                .forward(&x)
                .unwrap()
                .reshape((STEPS * BATCH, CLASSES))
                .unwrap();
            let total = logits.exp().unwrap().sum_keepdim(1).unwrap().log().unwrap();
            let targets =
                Tensor::from_slice(&case.targets, (STEPS * BATCH, 1), &Device::Cpu).unwrap();
            let own = logits.gather(&targets, 1).unwrap();
            let store = (total - own)
                .unwrap()
                .mean_all()
                .unwrap()
                .backward()
                .unwrap();
            for ((name, var), g) in graph.vars().zip(gradients.iter()) {
                let theirs: Vec<f32> = store
                    .get(var)
                    .unwrap()
                    .flatten_all()
                    .unwrap()
                    .to_vec1()
                    .unwrap();
                let far = g
                    .data
                    .iter()
                    .zip(&theirs)
                    .map(|(a, b)| (a - b).abs())
                    .fold(0.0, f32::max);
                assert!(far < 3e-6, "{cell} {input:?} {name}: {far}");
                assert!(
                    theirs.iter().any(|v| v.abs() > 1e-6),
                    "{cell} {name} gets no gradient"
                );
            }
        }
    }
}

#[test]
fn gradients_agree_with_finite_differences_when_sequences_end_at_different_steps() {
    let rows = [BATCH, 4 * BATCH + 1, 2 * BATCH + 2];
    for &cell in Cell::ALL {
        let case = Case::new(cell, INPUTS[1], ReadOut::Linear);
        let mut gradients = case.rnn.params().zeros_like();
        case.loss(&case.rnn, Some(&rows), Some(&mut gradients));
        // A ReLU has kinks, which a short step seldom meets.
        let step = if cell == Cell::Relu { 1e-3 } else { 5e-3 };
        let mut rng = seed::rng(6, "probe");
        let names: Vec<String> = gradients.iter().map(|g| g.name.clone()).collect();
        for (k, name) in names.iter().enumerate() {
            for _ in 0..6 {
                let e = rng.random_range(0..gradients.slot(k).len());
                let probe = |by: f32| {
                    let mut rnn = case.rnn.clone();
                    rnn.params_mut().slot_mut(k)[e] += by;
                    case.loss(&rnn, Some(&rows), None)
                };
                let slope = (probe(step) - probe(-step)) / (2.0 * f64::from(step));
                let exact = f64::from(gradients.slot(k)[e]);
                assert!(
                    (slope - exact).abs() < 4e-4 + 0.02 * exact.abs(),
                    "{cell} {name}[{e}]: {slope} {exact}"
                );
            }
        }
    }
}
