//! Training: gradients that lead somewhere, masks that hold, pruning while training.

use prune_lattice::{
    Cell, Error, NoProgress,
    data::{Dataset, Examples, Inputs, Sequences, Targets},
    mask::MaskSet,
    prune::{Method, PruneConfig, prune},
    rnn::{Decay, Gradual, InputKind, ReadOut, Rnn, RnnConfig, TrainConfig, evaluate, train},
    wiring::Wiring,
};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

fn first_is_last(count: usize, seed: u64) -> Examples {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let (mut symbols, mut lengths, mut classes) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..count {
        let n = rng.random_range(3..9);
        let s: Vec<u32> = (0..n).map(|_| rng.random_range(0..3)).collect();
        classes.push(u32::from(s[0] == s[n - 1]));
        symbols.extend(s);
        lengths.push(n);
    }
    Examples::Sequences(
        Sequences::new(
            Inputs::Symbols(symbols),
            &lengths,
            Targets::Classes(classes),
        )
        .unwrap(),
    )
}

fn memory_task() -> Dataset {
    Dataset {
        train: first_is_last(1500, 1),
        valid: first_is_last(300, 2),
        test: first_is_last(300, 3),
        input: InputKind::OneHot { vocab: 3 },
        outputs: 2,
    }
}

#[test]
fn every_cell_learns_a_task_that_needs_memory_and_pruned_weights_stay_zero_in_fine_tuning() {
    let data = memory_task();
    for &cell in Cell::ALL {
        let mut rnn = Rnn::new(RnnConfig::new(cell, data.input, vec![20], 2), 1).unwrap();
        let config = TrainConfig::default().with(|c| {
            c.epochs = 30;
            c.learning_rate = 5e-3;
        });
        train(&mut rnn, &data, &config, &MaskSet::default(), &NoProgress).unwrap();
        let dense = evaluate(&rnn, &data.test).unwrap().accuracy.unwrap();
        assert!(dense > 0.95, "{cell}: {dense}");
        let (masks, report) = prune(&rnn, &PruneConfig::new(Method::LatticeContext, 0.5)).unwrap();
        assert_eq!(report.sparsity.recurrent, 0.5);
        train(
            &mut rnn,
            &data,
            &config.with(|c| c.epochs = 2),
            &masks,
            &NoProgress,
        )
        .unwrap();
        let mut again = rnn.clone();
        masks.apply(again.params_mut()).unwrap();
        assert_eq!(rnn, again, "{cell}: a pruned weight came back");
    }
}

#[test]
fn training_is_the_same_for_the_same_seed() {
    let data = memory_task();
    let run = |seed| {
        let mut rnn = Rnn::new(RnnConfig::new(Cell::Gru, data.input, vec![8], 2), 1).unwrap();
        let config = TrainConfig::default().with(|c| {
            c.epochs = 2;
            c.seed = seed;
        });
        train(&mut rnn, &data, &config, &MaskSet::default(), &NoProgress).unwrap();
        rnn
    };
    assert_eq!(run(4), run(4));
    assert_ne!(run(4), run(5));
}

#[test]
fn a_diverging_run_is_an_error() {
    let data = memory_task();
    let mut rnn = Rnn::new(RnnConfig::new(Cell::Relu, data.input, vec![8], 2), 1).unwrap();
    let config = TrainConfig::default().with(|c| {
        c.epochs = 50;
        c.learning_rate = 1e30;
        c.clip = 1e30;
    });
    assert!(matches!(
        train(&mut rnn, &data, &config, &MaskSet::default(), &NoProgress),
        Err(Error::Diverged { .. })
    ));
}

#[test]
fn gradual_pruning_ends_at_its_sparsity_and_lets_weights_come_back() {
    let data = memory_task();
    let shape = RnnConfig::new(Cell::Lstm, data.input, [16], 2);
    let mut rnn = Rnn::new(shape, 1).unwrap();
    let prune = PruneConfig::new(Method::Magnitude, 0.75);
    // 47 updates an epoch.
    let config = TrainConfig::default().with(|c| {
        c.epochs = 3;
        c.patience = None;
        c.gradual = Some(Gradual::new(10, 100, 10, prune.clone()));
    });
    let report = train(&mut rnn, &data, &config, &MaskSet::default(), &NoProgress).unwrap();
    assert_eq!(report.masks.pruned(), 4 * 16 * 16 * 3 / 4);
    let mut masked = rnn.clone();
    report.masks.apply(masked.params_mut()).unwrap();
    assert_eq!(masked, rnn);
    // Three epochs are 141 updates.
    for (start, stop, every) in [(10, 10, 5), (5, 20, 0), (10, 142, 10)] {
        let config = config
            .clone()
            .with(|c| c.gradual = Some(Gradual::new(start, stop, every, prune.clone())));
        assert!(matches!(
            train(&mut rnn, &data, &config, &MaskSet::default(), &NoProgress),
            Err(Error::Setting {
                setting: "gradual pruning",
                ..
            })
        ));
    }
}

#[test]
fn early_stopping_returns_no_weights_from_before_the_final_sparsity() {
    let data = memory_task();
    let shape = RnnConfig::new(Cell::Lstm, data.input, [16], 2);
    let mut rnn = Rnn::new(shape, 1).unwrap();
    // The last masks come with the last update, and cost more than the training before them gained.
    let prune = PruneConfig::new(Method::Random, 0.9);
    let config = TrainConfig::default().with(|c| {
        c.epochs = 4;
        c.patience = Some(1);
        c.target_loss = Some(f64::INFINITY);
        c.gradual = Some(Gradual::new(100, 188, 88, prune));
    });
    let report = train(&mut rnn, &data, &config, &MaskSet::default(), &NoProgress).unwrap();
    assert_eq!((report.epochs.len(), report.best), (4, 3));
    let kept = (0.1f64 * 256.0).round() as usize * 4;
    assert_eq!(report.masks.pruned(), 4 * 256 - kept);
    let zeros = |rnn: &Rnn| {
        let w = &rnn.params().get("rnn.weight_hh_l0").unwrap().data;
        w.iter().filter(|w| **w == 0.0).count()
    };
    assert_eq!(zeros(&rnn), 4 * 256 - kept);
}

#[test]
fn densities_of_gates_fall_to_their_values_and_budgets_count_what_the_wiring_has() {
    let data = memory_task();
    let shape = RnnConfig::new(Cell::Gru, data.input, [12], 2);
    let rnn = Rnn::new(shape, 1).unwrap();
    let run = |prune: PruneConfig, masks: &MaskSet| {
        let mut rnn = rnn.clone();
        let config = TrainConfig::default().with(|c| {
            c.epochs = 2;
            c.patience = None;
            c.gradual = Some(Gradual::new(0, 60, 20, prune));
        });
        train(&mut rnn, &data, &config, masks, &NoProgress)
            .unwrap()
            .masks
    };
    let name = "rnn.weight_hh_l0";
    let by_gate = PruneConfig::new(Method::Magnitude, 0.5).with(|c| {
        c.densities = Some(vec![0.25, 0.5, 1.0]);
    });
    let masks = run(by_gate, &MaskSet::default());
    let keep = masks.get(name).unwrap().keep();
    let of_gate = |g: usize| -> usize {
        (g * 12..(g + 1) * 12)
            .map(|i| keep.row_ones(i).count())
            .sum()
    };
    assert_eq!([of_gate(0), of_gate(1), of_gate(2)], [36, 72, 144]);
    // 6 + 6 neurons, bottom-up: three of four blocks exist.
    let wired = Wiring::bottom_up(&[6, 6]).unwrap().masks(&rnn).unwrap();
    let masks = run(PruneConfig::new(Method::Magnitude, 0.5), &wired);
    let keep = masks.get(name).unwrap().keep();
    let kept: usize = (0..36).map(|i| keep.row_ones(i).count()).sum();
    assert_eq!(kept, 3 * 108 / 2);
    // The other masks of the wiring stay.
    assert_eq!(masks.get("out.weight"), wired.get("out.weight"));
}

#[test]
fn shards_of_a_batch_change_nothing_but_rounding_and_not_with_the_number_of_threads() {
    let data = memory_task();
    let run = |shards: usize, threads: usize| {
        let shape = RnnConfig::new(Cell::Gru, data.input, [8], 2);
        let mut rnn = Rnn::new(shape, 1).unwrap();
        let config = TrainConfig::default().with(|c| {
            c.epochs = 1;
            c.shards = shards;
            c.warmup = 20;
            c.decay = Decay::Cosine;
            c.l1 = 1e-5;
        });
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap();
        pool.install(|| train(&mut rnn, &data, &config, &MaskSet::default(), &NoProgress))
            .unwrap();
        rnn
    };
    let whole = run(1, 1);
    let three = run(3, 1);
    assert_eq!(three, run(3, 2));
    for (a, b) in whole.params().iter().zip(three.params().iter()) {
        let far = a.data.iter().zip(&b.data).map(|(a, b)| (a - b).abs());
        assert!(far.fold(0.0, f32::max) < 2e-3, "{}", a.name);
    }
}

#[test]
fn a_short_run_of_a_training_is_not_all_warm_up() {
    let data = memory_task();
    let long = TrainConfig::default().with(|c| {
        c.epochs = 30;
        c.warmup = 100;
        c.decay = Decay::Cosine;
    });
    assert_eq!(long.over(30, &data.train), long);
    let short = long.over(1, &data.train);
    assert_eq!((short.updates(&data.train), short.warmup), (47, 4));
    assert_eq!(
        short,
        long.with(|c| {
            c.epochs = 1;
            c.warmup = 4;
        })
    );
}

/// At every step, whether the number seen two steps before was positive.
fn delayed_sign(count: usize, seed: u64) -> Examples {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let lengths: Vec<usize> = (0..count).map(|k| 40 + k % 5).collect();
    let (mut values, mut targets, mut counted) = (Vec::new(), Vec::new(), Vec::new());
    for &n in &lengths {
        let x: Vec<f32> = (0..n).map(|_| rng.random_range(-1.0..1.0)).collect();
        targets.extend((0..n).map(|t| f32::from(u8::from(t >= 2 && x[t - 2] > 0.0))));
        counted.extend((0..n).map(|t| t >= 2));
        values.extend(x);
    }
    Examples::Sequences(
        Sequences::new(
            Inputs::Vectors { dim: 1, values },
            &lengths,
            Targets::Binary { targets, counted },
        )
        .unwrap(),
    )
}

#[test]
fn decisions_at_every_step_are_learned_in_windows_with_the_state_carried() {
    let data = Dataset {
        train: delayed_sign(200, 1),
        valid: delayed_sign(40, 2),
        test: delayed_sign(40, 3),
        input: InputKind::Dense { dim: 1 },
        outputs: 1,
    };
    for read_out in [ReadOut::Linear, ReadOut::Relu] {
        let shape = RnnConfig::new(Cell::Lstm, data.input, [16], 1).with(|c| c.read_out = read_out);
        let mut rnn = Rnn::new(shape, 1).unwrap();
        let config = TrainConfig::default().with(|c| {
            c.epochs = 12;
            c.window = 15;
            c.learning_rate = 1e-2;
        });
        train(&mut rnn, &data, &config, &MaskSet::default(), &NoProgress).unwrap();
        let found = evaluate(&rnn, &data.test).unwrap();
        let steps: usize = (0..40).map(|k| 38 + k % 5).sum();
        assert_eq!(found.targets, steps);
        assert!(found.auc.unwrap() > 0.97, "{read_out}: {found:?}");
        assert!(found.accuracy.unwrap() > 0.9);
    }
}

#[test]
fn sequences_whose_values_are_no_vectors_are_refused() {
    let new = |dim: usize, count: usize, lengths: &[usize]| {
        let values = vec![0.5; count];
        let targets = Targets::Classes(vec![0; lengths.len()]);
        Sequences::new(Inputs::Vectors { dim, values }, lengths, targets)
    };
    assert!(new(3, 12, &[1, 3]).is_ok());
    let (none, one, two): (&[usize], &[usize], &[usize]) = (&[], &[4], &[1, 3]);
    for (dim, count, lengths) in [(3, 13, two), (0, 0, none), (0, 4, one), (5, 4, none)] {
        let found = new(dim, count, lengths);
        let Err(Error::Setting {
            setting: "sequences",
            reason,
        }) = &found
        else {
            panic!("{dim} {count}: {found:?}")
        };
        assert!(
            reason.contains(&format!("no vectors of {dim} components")),
            "{reason}"
        );
    }
    // Lengths that do not fit a number.
    assert!(new(1, 4, &[usize::MAX, 5]).is_err());
}
