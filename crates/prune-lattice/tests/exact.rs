//! Removals that change nothing: certificates, and neurons that are equal for ever.

use prune_lattice::{
    Cell, Error, NoProgress,
    calibration::{RecordConfig, record},
    data::{Examples, Inputs, Sequences, Targets},
    exact::{
        Counts, ExactConfig, Finding, dead_neurons, equal_neurons, equitable_partition, find,
        live_neurons, quotient, remove,
    },
    repair::{MergeConfig, merge},
    rnn::{Input, InputKind, Rnn, RnnConfig, State, Tape},
};

const STEPS: usize = 60;
const DIM: usize = 4;

fn network(cell: Cell, hidden: &[usize]) -> Rnn {
    Rnn::new(
        RnnConfig::new(cell, InputKind::Dense { dim: DIM }, hidden, 3),
        7,
    )
    .unwrap()
}

fn change(rnn: &mut Rnn, name: &str, f: impl Fn(usize, usize, &mut f32)) {
    let p = rnn
        .params_mut()
        .iter_mut()
        .find(|p| p.name == name)
        .unwrap();
    let cols = p.shape.get(1).copied().unwrap_or(1);
    for (e, w) in p.data.iter_mut().enumerate() {
        f(e / cols, e % cols, w);
    }
}

/// Inputs between 0 and 1.
fn inputs() -> Vec<f32> {
    (0..STEPS * DIM)
        .map(|k| (k as f32 * 0.77).sin().abs())
        .collect()
}

fn logits(rnn: &Rnn) -> Vec<f32> {
    let (mut tape, mut out) = (Tape::new(), Vec::new());
    let mut state = State::zeros(rnn, 1);
    tape.forward(rnn, Input::Vectors(&inputs()), STEPS, &mut state)
        .unwrap();
    tape.read_out(rnn, None, &mut out);
    out
}

fn farthest(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).fold(0.0, |m, (a, b)| m.max((a - b).abs()))
}

#[test]
fn dead_relu_neurons_are_certified_also_where_they_excite_each_other_and_go_without_a_trace() {
    let mut rnn = network(Cell::Relu, &[12]);
    // 2, 5 and 9: not excited by any input or other neuron, 2 and 5 excite themselves and each other.
    let dead = |i: usize| matches!(i, 2 | 5 | 9);
    change(&mut rnn, "rnn.weight_ih_l0", |i, _, w| {
        if dead(i) {
            *w = -w.abs();
        }
    });
    change(&mut rnn, "rnn.bias_l0", |i, _, w| {
        if dead(i) {
            *w = -0.01;
        }
    });
    change(&mut rnn, "rnn.weight_hh_l0", |i, j, w| {
        if dead(i) {
            *w = if dead(j) { w.abs() } else { -w.abs() };
        }
    });
    // 3 lacks nothing but a bias: its input of zero leaves it above zero.
    change(&mut rnn, "rnn.bias_l0", |i, _, w| {
        if i == 3 {
            *w = 0.05;
        }
    });
    let found = dead_neurons(&rnn, Some((0.0, 1.0))).unwrap();
    let expected: Vec<bool> = (0..12).map(dead).collect();
    assert!(
        found[0].iter().zip(&expected).all(|(f, e)| *f || !e),
        "{found:?}"
    );
    let (mut tape, mut state) = (Tape::new(), State::zeros(&rnn, 1));
    tape.forward(&rnn, Input::Vectors(&inputs()), STEPS, &mut state)
        .unwrap();
    for row in tape.top().chunks_exact(12) {
        for (x, h) in row.iter().enumerate() {
            assert!(!found[0][x] || *h == 0.0);
        }
    }
    let config = ExactConfig::default().input_range(0.0, 1.0);
    let findings = find(&rnn, &config).unwrap();
    assert_eq!(findings[0][2], Some(Finding::Dead));
    let small = remove(&rnn, &findings).unwrap();
    assert!(small.config().hidden[0] <= 9);
    assert!(farthest(&logits(&rnn), &logits(&small)) < 1e-6);
    // Inputs may also be negative: nothing is certain any more.
    let found = dead_neurons(&rnn, Some((-1.0, 1.0))).unwrap();
    assert!(!found[0][2] && !found[0][5] && !found[0][9]);
    assert!(matches!(
        dead_neurons(&rnn, None),
        Err(Error::Setting { .. })
    ));
    // Without a range nothing is certified, and other findings are still found.
    let unknown = find(&rnn, &ExactConfig::default()).unwrap();
    assert!(unknown[0].iter().all(|f| *f != Some(Finding::Dead)));
    let counts = Counts::of(&findings);
    assert!(counts.dead >= 3 && counts.unheard == 0, "{counts:?}");
    let tanh = network(Cell::Tanh, &[3]);
    assert!(matches!(
        dead_neurons(&tanh, None),
        Err(Error::Setting { .. })
    ));
}

#[test]
fn a_neuron_is_dead_above_only_if_every_live_neuron_below_inhibits_it() {
    let mut rnn = network(Cell::Relu, &[6, 4]);
    change(&mut rnn, "rnn.weight_ih_l1", |i, _, w| {
        if i == 1 {
            *w = -w.abs();
        }
    });
    change(&mut rnn, "rnn.weight_hh_l1", |i, _, w| {
        if i == 1 {
            *w = -w.abs();
        }
    });
    change(&mut rnn, "rnn.bias_l1", |i, _, w| {
        if i == 1 {
            *w = 0.0;
        }
    });
    let found = dead_neurons(&rnn, Some((0.0, 1.0))).unwrap();
    assert!(found[1][1]);
    change(&mut rnn, "rnn.weight_ih_l1", |i, j, w| {
        if (i, j) == (1, 3) {
            *w = 0.5;
        }
    });
    let found = dead_neurons(&rnn, Some((0.0, 1.0))).unwrap();
    assert!(!found[1][1]);
}

#[test]
fn neurons_without_a_path_to_an_output_are_removed_and_those_without_an_input_are_reported() {
    for &cell in Cell::ALL {
        let mut rnn = network(cell, &[8, 6]);
        // In layer 0: 1 and 4 are read by each other only; 6 reads nothing but itself.
        let unheard = |x: usize| matches!(x, 1 | 4);
        change(&mut rnn, "rnn.weight_hh_l0", |r, j, w| {
            let i = r % 8;
            if (unheard(j) && !unheard(i)) || (i == 6 && j != 6) {
                *w = 0.0;
            }
        });
        change(&mut rnn, "rnn.weight_ih_l0", |r, _, w| {
            if r % 8 == 6 {
                *w = 0.0;
            }
        });
        // Above zero, so that it is not dead where states are cut at zero.
        change(&mut rnn, "rnn.bias_l0", |r, _, w| {
            if r % 8 == 6 {
                *w = 0.2;
            }
        });
        change(&mut rnn, "rnn.weight_ih_l1", |_, j, w| {
            if unheard(j) {
                *w = 0.0;
            }
        });
        let live = live_neurons(&rnn);
        let found: Vec<(bool, bool)> = live[0].iter().map(|l| (l.fed, l.heard)).collect();
        let expected: Vec<(bool, bool)> = (0..8).map(|x| (x != 6, !unheard(x))).collect();
        assert_eq!(found, expected, "{cell}");
        assert!(live[1].iter().all(|l| l.fed && l.heard));
        let config = ExactConfig::default().input_range(-1.0, 1.0);
        let findings = find(&rnn, &config).unwrap();
        assert_eq!(findings[0][6], Some(Finding::Unfed), "{cell}");
        let small = remove(&rnn, &findings).unwrap();
        assert_eq!(small.config().hidden, [6, 6]);
        assert!(farthest(&logits(&rnn), &logits(&small)) < 1e-6, "{cell}");
    }
}

#[test]
fn states_that_do_not_vary_on_the_calibration_are_found_and_merging_moves_them_into_biases() {
    let mut rnn = network(Cell::Tanh, &[10]);
    // 4 is tanh of its bias at every step.
    change(&mut rnn, "rnn.weight_ih_l0", |i, _, w| {
        if i == 4 {
            *w = 0.0;
        }
    });
    change(&mut rnn, "rnn.weight_hh_l0", |i, _, w| {
        if i == 4 {
            *w = 0.0;
        }
    });
    let values = Inputs::Vectors {
        dim: DIM,
        values: inputs(),
    };
    let examples = Sequences::new(values, &[STEPS], Targets::Classes(vec![0])).unwrap();
    let calibration = record(
        &rnn,
        &Examples::Sequences(examples),
        &RecordConfig::default(),
        &NoProgress,
    )
    .unwrap();
    let config = ExactConfig::default().calibrated(&calibration);
    let findings = find(&rnn, &config).unwrap();
    assert_eq!(findings[0][4], Some(Finding::ConstantOnCalibration));
    assert!(
        findings[0]
            .iter()
            .enumerate()
            .all(|(x, f)| x == 4 || f.is_none())
    );
    // Not certain for other inputs, so that exact removal leaves it alone.
    assert_eq!(remove(&rnn, &findings).unwrap().config().hidden, [10]);
    let keep = vec![(0..10).map(|x| x != 4).collect::<Vec<bool>>()];
    let small = merge(&rnn, &keep, &calibration, &MergeConfig::default()).unwrap();
    // The first step reads h = 0, not the constant; after that both networks are the same up to its trace.
    let (dense, small) = (logits(&rnn), logits(&small));
    assert!(farthest(&dense[3 * 40..], &small[3 * 40..]) < 1e-3);
}

#[test]
fn copies_of_neurons_are_found_as_classes_and_their_quotient_is_the_same_network() {
    for &cell in Cell::ALL {
        let mut rnn = network(cell, &[9, 5]);
        let classes = equitable_partition(&rnn, 1e-6).unwrap();
        assert_eq!(
            classes,
            [(0..9).collect::<Vec<_>>(), (0..5).collect()],
            "{cell}"
        );
        // 7 reads what 2 reads, whatever is read from the two of them.
        for name in [
            "rnn.weight_ih_l0",
            "rnn.weight_hh_l0",
            "rnn.bias_l0",
            "rnn.bias_hn_l0",
        ] {
            let Some(p) = rnn.params_mut().iter_mut().find(|p| p.name == name) else {
                continue;
            };
            let cols = p.shape.get(1).copied().unwrap_or(1);
            for g in 0..p.shape[0] / 9 {
                let from = (g * 9 + 2) * cols;
                p.data.copy_within(from..from + cols, (g * 9 + 7) * cols);
            }
        }
        let classes = equitable_partition(&rnn, 1e-6).unwrap();
        assert_eq!(classes[0], [0, 1, 2, 3, 4, 5, 6, 2, 7], "{cell}");
        let small = quotient(&rnn, &classes).unwrap();
        assert_eq!(small.config().hidden, [8, 5]);
        assert!(farthest(&logits(&rnn), &logits(&small)) < 1e-5, "{cell}");
        assert_eq!(equal_neurons(&rnn, 1e-6).unwrap(), 1);
        assert!(quotient(&rnn, &classes[..1]).is_err());
        assert!(equitable_partition(&rnn, 0.0).is_err());
    }
}
