//! Calibration, refitting and merging as a user sees them.

use prune_lattice::{
    Cancelled, Cell, Error, NoProgress,
    calibration::{Calibration, RecordConfig, record},
    data::{Dataset, Examples, Inputs, Sequences, Targets},
    mask::{MaskSet, hard_remove, restrict_masks},
    prune::{Method, PruneConfig, PruneContext, Scope, prune_in, rank_neurons_in, scores_in},
    repair::{MergeConfig, RefitConfig, merge, merge_in, merge_passes, predict, refit},
    rnn::{Input, InputKind, ReadOut, Rnn, RnnConfig, Role, State, Tape, evaluate},
    wiring::Wiring,
};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

const DIM: usize = 5;
const LENGTH: usize = 30;

fn network(cell: Cell, hidden: &[usize]) -> Rnn {
    let shape = RnnConfig::new(cell, InputKind::Dense { dim: DIM }, hidden, 3);
    Rnn::new(shape, 4).unwrap()
}

fn vectors(count: usize) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(8);
    (0..count).map(|_| rng.random_range(-1.0..1.0)).collect()
}

/// Sequences of different lengths.
fn examples(count: usize) -> Examples {
    let lengths: Vec<usize> = (0..count).map(|k| LENGTH - k % 7).collect();
    let inputs = Inputs::Vectors {
        dim: DIM,
        values: vectors(lengths.iter().sum::<usize>() * DIM),
    };
    let classes = (0..count as u32).map(|k| k % 3).collect();
    Examples::Sequences(Sequences::new(inputs, &lengths, Targets::Classes(classes)).unwrap())
}

fn calibrate(rnn: &Rnn) -> Calibration {
    record(rnn, &examples(40), &RecordConfig::default(), &NoProgress).unwrap()
}

/// Logits over 200 steps of two sequences.
fn logits(rnn: &Rnn) -> Vec<f32> {
    let x = vectors(2 * 200 * DIM);
    let (mut tape, mut out) = (Tape::new(), Vec::new());
    let mut state = State::zeros(rnn, 2);
    tape.forward(rnn, Input::Vectors(&x), 200, &mut state)
        .unwrap();
    tape.read_out(rnn, None, &mut out);
    out
}

fn farthest(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    let pairs = a.iter().zip(b);
    pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

fn change(rnn: &mut Rnn, role: Role, f: impl Fn(&mut [f32])) {
    let at = rnn.roles().iter().position(|&r| r == role).unwrap();
    f(&mut rnn.params_mut().iter_mut().nth(at).unwrap().data);
}

/// Neuron `to` of layer 0 gets the weights of neuron `from`, so that their states are equal (`scale` 1) or a multiple.
fn copy_neuron(rnn: &mut Rnn, from: usize, to: usize, scale: f32) {
    let (cell, n) = (rnn.config().cell, rnn.config().hidden[0]);
    for (role, cols) in [
        (Role::InputWeight(0), DIM),
        (Role::RecurrentWeight(0), n),
        (Role::Bias(0), 1),
    ] {
        change(rnn, role, |w| {
            for g in 0..cell.gates() {
                for j in 0..cols {
                    w[(g * n + to) * cols + j] = scale * w[(g * n + from) * cols + j];
                }
            }
        });
    }
    if cell == Cell::Gru {
        change(rnn, Role::CandidateBias(0), |b| b[to] = b[from]);
    }
}

#[test]
fn moments_do_not_depend_on_the_batch_and_padding_does_not_count() {
    let rnn = network(Cell::Gru, &[6, 4]);
    let all = calibrate(&rnn);
    let steps: usize = (0..40).map(|k| LENGTH - k % 7).sum();
    assert_eq!(all.input.count(), steps as u64);
    assert_eq!(all.layers[1].after.count(), steps as u64);
    assert_eq!(all.read_out.count(), 40);
    let by_seven = record(
        &rnn,
        &examples(40),
        &RecordConfig::default().with(|c| c.batch = 7),
        &NoProgress,
    )
    .unwrap();
    let parts = |c: &Calibration| {
        let layers = c
            .layers
            .iter()
            .flat_map(|l| [l.before.clone(), l.after.clone()]);
        layers
            .chain([c.input.clone(), c.read_out.clone()])
            .collect::<Vec<_>>()
    };
    for (a, b) in parts(&all).iter().zip(parts(&by_seven)) {
        assert_eq!((a.dim(), a.count()), (b.dim(), b.count()));
        for (x, y) in a.covariance().iter().zip(b.covariance()) {
            assert!((x - y).abs() < 1e-6);
        }
    }
    // Every sequence starts from zero, so h_{t-1} is shorter than h_t in the mean.
    let energy = |k: usize| -> f64 {
        let m = [&all.layers[0].before, &all.layers[0].after][k];
        (0..m.dim()).map(|i| m.second(i, i)).sum()
    };
    assert!(energy(0) < energy(1));
    let json = serde_json::to_string(&all).unwrap();
    assert_eq!(serde_json::from_str::<Calibration>(&json).unwrap(), all);
}

#[test]
fn a_text_is_recorded_in_one_run_and_recording_can_be_cancelled() {
    let shape = RnnConfig::new(Cell::Lstm, InputKind::OneHot { vocab: 4 }, [5], 4);
    let rnn = Rnn::new(shape, 2).unwrap();
    let text = Examples::Text((0..700).map(|k| k * k % 4).collect());
    let config = RecordConfig::default().with(|c| c.symbols = Some(600));
    let found = record(&rnn, &text, &config, &NoProgress).unwrap();
    assert_eq!((found.input.count(), found.read_out.count()), (600, 600));
    // One-hot inputs never occur together.
    assert_eq!(found.input.second(0, 1), 0.0);
    let total: f64 = found.input.mean().iter().sum();
    assert!((total - 1.0).abs() < 1e-12);
    let cancel = |_| Err(Cancelled);
    assert!(matches!(
        record(&rnn, &text, &config, &cancel),
        Err(Error::Cancelled(_))
    ));
}

#[test]
fn refitting_under_a_full_mask_returns_the_weights() {
    for &cell in Cell::ALL {
        let rnn = network(cell, &[8, 6]);
        let config = PruneConfig::new(Method::Dense, 0.0);
        // Dense masks prune nothing and are left out, so that the solver has to be given them.
        let (masks, _) = prune_in(&rnn, &PruneContext::default(), &config).unwrap();
        assert!(masks.is_empty());
        let mut full = MaskSet::default();
        for p in rnn.params().iter().filter(|p| p.name.contains("weight_")) {
            let keep = prune_lattice::order::bits::BitMatrix::ones(p.shape[0], p.shape[1]);
            full.insert(p.name.clone(), prune_lattice::mask::Mask::of_matrix(keep));
        }
        let mut again = rnn.clone();
        refit(&mut again, &full, &calibrate(&rnn), &RefitConfig::default()).unwrap();
        for (a, b) in again.params().iter().zip(rnn.params().iter()) {
            assert!(farthest(&a.data, &b.data) < 1e-4, "{cell} {}", a.name);
        }
    }
}

#[test]
fn refitting_never_raises_the_squared_error_on_the_calibration_and_stays_under_the_mask() {
    for cell in [Cell::Lstm, Cell::Gru, Cell::Relu] {
        let rnn = network(cell, &[16, 8]);
        let calibration = calibrate(&rnn);
        let context = PruneContext::default().calibrated(&calibration);
        for method in [
            Method::Magnitude,
            Method::Random,
            Method::Strength,
            Method::Span,
            Method::Block8x4,
            Method::Threshold,
        ] {
            for constant in [true, false] {
                let config = PruneConfig::new(method, 0.75).with(|c| c.scope = Scope::Both);
                let (masks, _) = prune_in(&rnn, &context, &config).unwrap();
                let mut fitted = rnn.clone();
                let how = RefitConfig::default().with(|c| c.constant = constant);
                let report = refit(&mut fitted, &masks, &calibration, &how).unwrap();
                assert_eq!(report.matrices.len(), 4);
                for m in &report.matrices {
                    assert!(
                        m.error <= m.error_masked + 1e-7,
                        "{cell} {method} {}: {} {}",
                        m.name,
                        m.error,
                        m.error_masked
                    );
                }
                assert!(
                    report
                        .matrices
                        .iter()
                        .any(|m| m.error < 0.9 * m.error_masked)
                );
                let mut masked = fitted.clone();
                masks.apply(masked.params_mut()).unwrap();
                assert_eq!(masked, fitted);
                if !constant {
                    for (a, b) in fitted.params().iter().zip(rnn.params().iter()) {
                        assert!(a.shape.len() == 2 || a.data == b.data, "{}", a.name);
                    }
                }
            }
        }
    }
}

#[test]
fn merging_is_exact_where_removed_neurons_are_copies_of_kept_ones() {
    for &cell in Cell::ALL {
        for read_out in ReadOut::ALL {
            let mut rnn = Rnn::new(
                network(cell, &[7, 5])
                    .config()
                    .clone()
                    .with(|c| c.read_out = *read_out),
                4,
            )
            .unwrap();
            let scale = match cell {
                Cell::Relu => 2.0,
                Cell::Tanh => -1.0,
                _ => 1.0,
            };
            copy_neuron(&mut rnn, 1, 4, scale);
            copy_neuron(&mut rnn, 6, 2, 1.0);
            let keep = vec![
                vec![true, true, false, true, false, true, true],
                vec![true; 5],
            ];
            let config = MergeConfig::default().with(|c| c.ridge = 1e-13);
            let small = merge(&rnn, &keep, &calibrate(&rnn), &config).unwrap();
            assert_eq!(small.config().hidden, [5, 5]);
            let far = farthest(&logits(&small), &logits(&rnn));
            assert!(far < 1e-5, "{cell} {read_out}: {far}");
            let removed = hard_remove(&rnn, &keep).unwrap();
            assert!(farthest(&logits(&removed), &logits(&rnn)) > 1e-3);
        }
    }
}

#[test]
fn merging_keeps_a_network_whose_neurons_are_all_kept_as_it_is() {
    for &cell in Cell::ALL {
        let rnn = network(cell, &[6, 5]);
        let keep = vec![vec![true; 6], vec![true; 5]];
        let same = merge(&rnn, &keep, &calibrate(&rnn), &MergeConfig::default()).unwrap();
        assert_eq!(same, rnn);
    }
}

#[test]
fn merging_equals_removing_where_nobody_reads_the_removed_neurons() {
    for &cell in Cell::ALL {
        let mut rnn = network(cell, &[6]);
        let keep = vec![vec![true, false, true, true, false, true]];
        let clear = |cols: usize, w: &mut [f32]| {
            for row in w.chunks_exact_mut(cols) {
                (row[1], row[4]) = (0.0, 0.0);
            }
        };
        change(&mut rnn, Role::RecurrentWeight(0), |w| clear(6, w));
        change(&mut rnn, Role::OutputWeight, |w| clear(6, w));
        let merged = merge(&rnn, &keep, &calibrate(&rnn), &MergeConfig::default()).unwrap();
        assert_eq!(merged, hard_remove(&rnn, &keep).unwrap());
    }
}

#[test]
fn merged_and_refitted_networks_are_closer_to_the_dense_one_than_pruned_ones() {
    for cell in [Cell::Lstm, Cell::Gru] {
        let rnn = network(cell, &[24]);
        let calibration = calibrate(&rnn);
        let context = PruneContext::default().calibrated(&calibration);
        let config = PruneConfig::new(Method::Span, 0.75);
        let keep = rank_neurons_in(&rnn, &context, &config).unwrap();
        assert_eq!(keep[0].iter().filter(|&&k| k).count(), 12);
        let dense = logits(&rnn);
        let square = |rnn: &Rnn| -> f32 {
            let pairs = logits(rnn).into_iter().zip(&dense);
            pairs.map(|(a, b)| (a - b).powi(2)).sum()
        };
        let merged = merge(&rnn, &keep, &calibration, &MergeConfig::default()).unwrap();
        let removed = hard_remove(&rnn, &keep).unwrap();
        assert!(square(&merged) < 0.2 * square(&removed), "{cell}");
        let (masks, _) = prune_in(&rnn, &context, &config).unwrap();
        let (mut masked, mut fitted) = (rnn.clone(), rnn.clone());
        masks.apply(masked.params_mut()).unwrap();
        refit(&mut fitted, &masks, &calibration, &RefitConfig::default()).unwrap();
        assert!(square(&fitted) < 0.5 * square(&masked), "{cell}");
    }
}

#[test]
fn more_passes_return_the_network_with_the_smallest_validation_loss() {
    let rnn = network(Cell::Gru, &[16]);
    let data = Dataset {
        train: examples(60),
        valid: examples(30),
        test: examples(30),
        input: rnn.config().input,
        outputs: 3,
    };
    let calibration = calibrate(&rnn);
    let keep = vec![(0..16).map(|k| k % 4 == 0).collect::<Vec<bool>>()];
    let loss = |rnn: &Rnn| evaluate(rnn, &data.valid).unwrap().loss;
    let with_passes = |passes| {
        let config = MergeConfig::default().with(|c| c.passes = passes);
        let context = PruneContext::default().calibrated(&calibration);
        merge_passes(&rnn, &keep, &context, &config, &data, &NoProgress).unwrap()
    };
    let (one, at) = with_passes(1);
    assert_eq!(at, 0);
    assert_eq!(
        one,
        merge(&rnn, &keep, &calibration, &MergeConfig::default()).unwrap()
    );
    let (three, _) = with_passes(3);
    assert_eq!(three.config().hidden, [4]);
    assert!(loss(&three) <= loss(&one));
}

#[test]
fn a_merged_network_has_the_connections_of_its_wiring_alone_and_uses_them() {
    let mut rnn = network(Cell::Lstm, &[12]);
    let wired = Wiring::bottom_up(&[4, 8]).unwrap().masks(&rnn).unwrap();
    wired.apply(rnn.params_mut()).unwrap();
    let calibration = calibrate(&rnn);
    let context = PruneContext::default()
        .calibrated(&calibration)
        .within(&wired);
    let keep = vec![(0..12).map(|x| x % 3 != 1).collect::<Vec<bool>>()];
    let small = merge_in(&rnn, &keep, &context, &MergeConfig::default()).unwrap();
    let masks = restrict_masks(&rnn, &wired, &keep).unwrap();
    assert!(masks.pruned() > 0);
    let mut masked = small.clone();
    masks.apply(masked.params_mut()).unwrap();
    assert_eq!(masked, small);
    // Without the wiring, the prediction would use all kept neurons.
    let free = merge(&rnn, &keep, &calibration, &MergeConfig::default()).unwrap();
    assert_ne!(free, small);
    let dense = logits(&rnn);
    let square = |rnn: &Rnn| -> f32 {
        let pairs = logits(rnn).into_iter().zip(&dense);
        pairs.map(|(a, b)| (a - b).powi(2)).sum()
    };
    assert!(square(&small) < 0.5 * square(&hard_remove(&rnn, &keep).unwrap()));
    // A row that reads nobody any more keeps the mean of what it read, in its bias.
    let keep = vec![(0..12).map(|x| x < 4).collect::<Vec<bool>>()];
    let cut = merge_in(&rnn, &keep, &context, &MergeConfig::default()).unwrap();
    let (out, bias) = ("out.weight", "out.bias");
    assert!(
        cut.params()
            .get(out)
            .unwrap()
            .data
            .iter()
            .all(|w| *w == 0.0)
    );
    assert_ne!(
        cut.params().get(bias).unwrap(),
        rnn.params().get(bias).unwrap()
    );
    // All connections: the same as without a wiring.
    let none = MaskSet::default();
    let context = PruneContext::default()
        .calibrated(&calibration)
        .within(&none);
    let config = MergeConfig::default();
    let keep = vec![(0..12).map(|x| x % 2 == 0).collect::<Vec<bool>>()];
    assert_eq!(
        merge_in(&rnn, &keep, &context, &config).unwrap(),
        merge(&rnn, &keep, &calibration, &config).unwrap()
    );
    assert!(merge_in(&rnn, &keep, &PruneContext::default(), &config).is_err());
}

#[test]
fn scores_that_are_given_choose_what_scores_of_the_same_call_choose() {
    let rnn = network(Cell::Gru, &[9, 6]);
    let calibration = calibrate(&rnn);
    let context = PruneContext::default().calibrated(&calibration);
    for &method in Method::ALL.iter().filter(|m| m.ranks_neurons()) {
        let at = |s: f64| PruneConfig::new(method, s);
        let scores = scores_in(&rnn, &context, &at(0.0)).unwrap();
        let scored = context.scored(&scores);
        for s in [0.3, 0.75] {
            let (masks, _) = prune_in(&rnn, &context, &at(s)).unwrap();
            assert_eq!(
                prune_in(&rnn, &scored, &at(s)).unwrap().0,
                masks,
                "{method}"
            );
            assert_eq!(
                rank_neurons_in(&rnn, &scored, &at(s)).unwrap(),
                rank_neurons_in(&rnn, &context, &at(s)).unwrap()
            );
        }
    }
    let other = network(Cell::Gru, &[9]);
    let scores = scores_in(&rnn, &context, &PruneConfig::new(Method::Span, 0.5)).unwrap();
    let scored = PruneContext::default().scored(&scores);
    assert!(matches!(
        prune_in(&other, &scored, &PruneConfig::new(Method::Span, 0.5)),
        Err(Error::Shape { .. })
    ));
    // A method that ranks no neurons has no use for them.
    assert!(prune_in(&other, &scored, &PruneConfig::new(Method::Magnitude, 0.5)).is_ok());
}

#[test]
fn flow_is_the_deviation_of_a_state_times_the_weights_that_read_it_those_outside_the_network_too() {
    let rnn = network(Cell::Gru, &[6, 4]);
    let calibration = calibrate(&rnn);
    let context = PruneContext::default().calibrated(&calibration);
    let config = PruneConfig::new(Method::Flow, 0.0);
    let value = |role: Role| -> Vec<f64> {
        let at = rnn.roles().iter().position(|&r| r == role).unwrap();
        let param = rnn.params().iter().nth(at).unwrap();
        param.data.iter().map(|&v| f64::from(v)).collect()
    };
    let deviation = |w: &[f64]| {
        let mean = w.iter().sum::<f64>() / w.len() as f64;
        (w.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / w.len() as f64).sqrt()
    };
    // Matrices that read a layer, and whether they are read-outs.
    let flow = |layer: usize, n: usize, readers: &[(Vec<f64>, bool)]| -> Vec<f64> {
        let w_hh = readers[0].0.len();
        let moments = &calibration.layers[layer].after;
        let of = |j: usize| {
            let squares = readers.iter().map(|(w, read_out)| {
                let column: f64 = w.iter().skip(j).step_by(n).map(|v| v * v).sum();
                let rows = match read_out {
                    true => w_hh as f64 / w.len() as f64,
                    false => 1.0,
                };
                rows * column / deviation(w).powi(2)
            });
            squares.sum::<f64>().sqrt() * moments.deviations()[j]
        };
        let flow: Vec<f64> = (0..n).map(of).collect();
        let largest = flow.iter().copied().fold(0.0, f64::max);
        flow.iter().map(|f| f / largest).collect()
    };
    let lower = vec![
        (value(Role::RecurrentWeight(0)), false),
        (value(Role::InputWeight(1)), false),
    ];
    let upper = vec![
        (value(Role::RecurrentWeight(1)), false),
        (value(Role::OutputWeight), true),
    ];
    let outside = vec![vectors(12), Vec::new()];
    let mut read = lower.clone();
    read.push((outside[0].iter().map(|&v| f64::from(v)).collect(), true));
    for (context, lower) in [(context, lower), (context.read_by(&outside), read)] {
        let found = scores_in(&rnn, &context, &config).unwrap().values;
        let expected = [flow(0, 6, &lower), flow(1, 4, &upper)].concat();
        for (a, b) in found.iter().zip(&expected) {
            assert!((a - b).abs() < 1e-9, "{found:?}, expected {expected:?}");
        }
    }
    for wrong in [vec![Vec::new()], vec![vectors(7), Vec::new()]] {
        assert!(matches!(
            scores_in(&rnn, &context.read_by(&wrong), &config),
            Err(Error::Shape { .. })
        ));
    }
}

#[test]
fn a_calibration_that_is_missing_or_of_another_network_is_an_error() {
    let rnn = network(Cell::Lstm, &[8]);
    let other = calibrate(&network(Cell::Lstm, &[7]));
    let config = PruneConfig::new(Method::Span, 0.5);
    assert!(matches!(
        prune_in(&rnn, &PruneContext::default(), &config),
        Err(Error::Setting {
            setting: "calibration",
            ..
        })
    ));
    let context = PruneContext::default().calibrated(&other);
    assert!(matches!(
        prune_in(&rnn, &context, &config),
        Err(Error::Shape { .. })
    ));
    let keep = vec![vec![true; 8]];
    assert!(matches!(
        merge(&rnn, &keep, &other, &MergeConfig::default()),
        Err(Error::Shape { .. })
    ));
    let own = calibrate(&rnn);
    assert!(merge(&rnn, &[vec![false; 8]], &own, &MergeConfig::default()).is_err());
    assert!(merge(&rnn, &[], &own, &MergeConfig::default()).is_err());
}

#[test]
fn states_that_never_vary_are_held_by_the_constant() {
    for bias in [0.1, 0.3, 0.5, 0.7, 0.9, 1.1, 1.3] {
        // All neurons the same, and each at a value of its own; the last two may also vary.
        for (apart, varying) in [(0.0, false), (0.07, false), (0.07, true)] {
            let mut rnn = network(Cell::Tanh, &[8]);
            let still = if varying { 6 } else { 8 };
            // Nothing reads the state before, which is zero at the first step.
            change(&mut rnn, Role::RecurrentWeight(0), |w| w.fill(0.0));
            change(&mut rnn, Role::InputWeight(0), |w| {
                w[..still * DIM].fill(0.0);
            });
            change(&mut rnn, Role::Bias(0), |b| {
                for (i, b) in b.iter_mut().enumerate() {
                    *b = bias + apart * i as f32;
                }
            });
            let calibration = calibrate(&rnn);
            let keep = vec![vec![true, true, true, false, false, true, true, true]];
            let small = merge(&rnn, &keep, &calibration, &MergeConfig::default()).unwrap();
            let far = farthest(&logits(&small), &logits(&rnn));
            assert!(far < 1e-5, "{bias} {apart} {varying}: {far}");
        }
    }
}

#[test]
fn a_ridge_that_is_no_share_is_an_error() {
    let rnn = network(Cell::Gru, &[6]);
    let calibration = calibrate(&rnn);
    let keep = [true, false, true, true, false, true];
    let refused = |found: Option<Error>, ridge: f64| {
        let ok = matches!(
            found,
            Some(Error::Setting {
                setting: "ridge",
                ..
            })
        );
        assert!(ok, "{ridge}: {found:?}");
    };
    for ridge in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, -1e-9] {
        let merging = MergeConfig::default().with(|c| c.ridge = ridge);
        let found = merge(&rnn, &[keep.to_vec()], &calibration, &merging);
        refused(found.err(), ridge);
        let found = predict(&calibration.layers[0].after, &keep, &merging);
        refused(found.err(), ridge);
        let fitting = RefitConfig::default().with(|c| c.ridge = ridge);
        let found = refit(
            &mut rnn.clone(),
            &MaskSet::default(),
            &calibration,
            &fitting,
        );
        refused(found.err(), ridge);
    }
}

#[test]
fn stored_moments_of_sizes_that_do_not_fit_are_refused() {
    let calibration = calibrate(&network(Cell::Gru, &[6]));
    let stored = serde_json::to_value(&calibration).unwrap();
    let read = |change: &dyn Fn(&mut serde_json::Value)| {
        let mut changed = stored.clone();
        change(&mut changed["layers"][0]["after"]);
        serde_json::from_value::<Calibration>(changed)
    };
    assert_eq!(read(&|_| ()).unwrap(), calibration);
    let shorter = |list: &mut serde_json::Value| list.as_array_mut().unwrap().truncate(5);
    let changes: [&dyn Fn(&mut serde_json::Value); 4] = [
        &|m| shorter(&mut m["second"]),
        &|m| shorter(&mut m["sum"]),
        &|m| m["dim"] = 7.into(),
        &|m| m["dim"] = (1u64 << 40).into(),
    ];
    for change in changes {
        let text = read(change).unwrap_err().to_string();
        assert!(text.contains("moments: expected shape"), "{text}");
    }
}
