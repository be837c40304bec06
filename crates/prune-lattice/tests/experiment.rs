//! Tasks and the experiment driver as a user sees them.

use prune_lattice::{
    Cancelled, Cell, Error, NoProgress, Progress,
    calibration::{RecordConfig, record},
    data::{Augment, Examples, Inputs, Targets},
    experiment::{
        CONTROLS, ExperimentConfig, Outcome, PrunedNetwork, Ramp, Repair, Row, Stage, Trained,
        compare, measure_speed, run, run_model, train_dense, verdict,
    },
    order::Cut,
    prune::{
        Compete, LatticeConfig, Method, PruneConfig, PruneContext, Scope, rank_neurons_in,
        recurrence_of,
    },
    repair::{MergeConfig, merge_in},
    rnn::{InputKind, Rnn, RnnConfig, TrainConfig},
    tasks::{Sizes, Task, Vocabulary},
};
use std::{collections::BTreeSet, sync::Mutex};

const SMALL: Sizes = Sizes {
    train: 200,
    valid: 50,
    test: 60,
};

fn small() -> ExperimentConfig {
    ExperimentConfig::default().with(|c| {
        c.tasks = vec![Task::Mod(2), Task::Adding];
        c.cells = vec![Cell::Lstm, Cell::Tanh];
        c.methods = vec![
            Method::Dense,
            Method::LatticeContext,
            Method::Strength,
            Method::RandomNeurons,
        ];
        c.sparsities = vec![0.5];
        c.seeds = vec![0, 1];
        c.sizes = Some(SMALL);
        c.hidden = Some(vec![12]);
        c.training = Some(TrainConfig::default().with(|c| c.epochs = 1));
    })
}

/// Steps announced and done, and messages.
#[derive(Default)]
struct Seen {
    steps: Mutex<(u64, u64)>,
    messages: Mutex<Vec<String>>,
}

impl Progress for Seen {
    fn begin(&self, _stage: &str, steps: u64) {
        self.steps.lock().unwrap().0 += steps;
    }

    fn advance(&self, steps: u64) -> Result<(), Cancelled> {
        self.steps.lock().unwrap().1 += steps;
        Ok(())
    }

    fn message(&self, text: &str) {
        self.messages.lock().unwrap().push(text.into());
    }
}

/// Rows without the wall-clock times, which no seed determines.
fn timeless(mut rows: Vec<Row>) -> Vec<Row> {
    rows.iter_mut().for_each(|r| r.seconds = 0.0);
    rows
}

#[test]
fn rows_do_not_depend_on_the_number_of_threads() {
    let on = |threads| {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap();
        timeless(pool.install(|| run(&small(), &NoProgress)).unwrap())
    };
    let one = on(1);
    assert_eq!(one, on(3));
    assert!(one.iter().all(|r| r.loss.is_some_and(f64::is_finite)));
}

#[test]
fn controls_and_both_stages_are_always_there_and_progress_counts_to_the_end() {
    let seen = Seen::default();
    let rows = run(&small(), &seen).unwrap();
    for control in CONTROLS {
        for stage in [Stage::OneShot, Stage::FineTuned] {
            let of = rows
                .iter()
                .filter(|r| r.method == control && r.stage == stage)
                .count();
            // Plain and refitted.
            assert_eq!(of, 2 * 2 * 2 * 2, "{control} {stage:?}");
        }
    }
    assert_eq!(
        rows.iter()
            .filter(|r| r.stage == Stage::FromScratch)
            .count(),
        8
    );
    for r in &rows {
        assert_eq!(r.accuracy.is_some(), r.task == "mod2");
        assert_eq!(r.finetune_epochs > 0, r.stage == Stage::FineTuned);
        let expected = match r.method {
            Method::Dense => 0.0,
            Method::ZeroWhh => 1.0,
            // 8 of 12 neurons.
            _ if r.repair == Repair::Merge => 1.0 - 64.0 / 144.0,
            _ => 0.5,
        };
        let reached = r.reached.unwrap();
        assert!((reached.recurrent - expected).abs() < 1e-9);
        assert!(
            reached.total <= reached.recurrent_and_input
                && reached.recurrent_and_input <= reached.recurrent
        );
    }
    let Seen { steps, messages } = seen;
    let (announced, done) = steps.into_inner().unwrap();
    assert_eq!(announced, done);
    let messages = messages.into_inner().unwrap();
    assert!(
        messages
            .iter()
            .any(|m| m.starts_with("training mod2 tanh, seed 1, epoch 1: loss")),
        "{messages:?}"
    );
    let json = serde_json::to_string(&rows).unwrap();
    assert_eq!(serde_json::from_str::<Vec<Row>>(&json).unwrap(), rows);
    assert!(
        json.contains("\"method\":\"lattice-context\"") && json.contains("\"stage\":\"one-shot\"")
    );
    let config = serde_json::to_string(&small()).unwrap();
    assert_eq!(
        serde_json::from_str::<ExperimentConfig>(&config).unwrap(),
        small()
    );
}

#[test]
fn an_experiment_and_a_training_run_can_be_cancelled_inside_an_epoch() {
    let config = small().with(|c| {
        c.tasks = vec![Task::Mod(2)];
        c.training = Some(TrainConfig::default().with(|c| c.epochs = 1_000_000));
    });
    let calls = Mutex::new(0u64);
    let cancel = |_| {
        let mut calls = calls.lock().unwrap();
        *calls += 1;
        if *calls > 3 { Err(Cancelled) } else { Ok(()) }
    };
    assert!(matches!(run(&config, &cancel), Err(Error::Cancelled(_))));
}

#[test]
fn a_degenerate_order_becomes_a_row_that_says_so() {
    let config = small().with(|c| {
        c.tasks = vec![Task::Mod(2)];
        c.methods = vec![Method::LatticeReachability];
        c.lattice = LatticeConfig::default().with(|c| c.cuts = vec![Cut::Quantile(0.3)]);
        c.finetune_epochs = 0;
    });
    let rows = run(&config, &NoProgress).unwrap();
    let refused: Vec<&Row> = rows
        .iter()
        .filter(|r| r.method == Method::LatticeReachability)
        .collect();
    assert!(!refused.is_empty());
    for r in &refused {
        assert!(
            r.loss.is_none()
                && r.params.is_none()
                && r.error.as_deref().unwrap().starts_with("degenerate order")
        );
    }
    assert!(
        verdict(&rows)
            .iter()
            .any(|line| line.contains("degenerate order"))
    );
}

#[test]
fn a_network_from_a_file_is_pruned_once_by_methods_that_draw_nothing_and_supports_no_verdict() {
    let config = small().with(|c| {
        c.tasks = vec![Task::Mod(2)];
        c.seeds = vec![3, 4, 5];
        c.sparsities = vec![0.5, 0.75];
    });
    let trained = train_dense(&config, &Task::Mod(2), Cell::Lstm, 3, &NoProgress).unwrap();
    let seen = Seen::default();
    let visited = Mutex::new(0);
    let visit = |network: &PrunedNetwork<'_>| {
        let hidden = &network.rnn.config().hidden;
        let merged = network.row.repair == Repair::Merge;
        assert_eq!(*hidden == [12], !merged);
        assert!(!merged || network.keep.is_some());
        *visited.lock().unwrap() += 1;
        Ok(())
    };
    let rows = run_model("m", &trained, &config, &visit, &seen).unwrap();
    assert_eq!(visited.into_inner().unwrap(), rows.len());
    let (announced, done) = seen.steps.into_inner().unwrap();
    assert_eq!(announced, done);
    for &method in &config.all_methods() {
        let of: Vec<&Row> = rows.iter().filter(|r| r.method == method).collect();
        let seeds: BTreeSet<u64> = of.iter().map(|r| r.seed).collect();
        let expected: &[u64] = if method.is_random() { &[3, 4, 5] } else { &[3] };
        assert!(seeds.iter().eq(expected), "{method}: {seeds:?}");
        assert!(of.iter().all(|r| r.network.is_none()));
    }
    for c in compare(&rows) {
        assert_eq!((c.networks, c.outcome), (1, Outcome::Unclear), "{c:?}");
    }
    let lines = verdict(&rows);
    assert!(
        lines[0].contains("a single network supports no verdict"),
        "{lines:?}"
    );
    // Rows of trained networks say which network they are of.
    let rows = run(&config.clone().with(|c| c.seeds = vec![3]), &NoProgress).unwrap();
    assert!(rows.iter().all(|r| r.network == Some(3)));
}

#[test]
fn a_merged_row_says_what_the_smaller_network_lacks_and_how_it_is_connected() {
    let config = small().with(|c| {
        c.tasks = vec![Task::Mod(2)];
        c.methods = vec![Method::Span];
        c.sparsities = vec![0.75];
        c.seeds = vec![0];
        c.finetune_epochs = 0;
    });
    let trained = train_dense(&config, &Task::Mod(2), Cell::Lstm, 0, &NoProgress).unwrap();
    let Trained { rnn, data, .. } = &trained;
    let rows = run_model("m", &trained, &config, &|_| Ok(()), &NoProgress).unwrap();
    let of = |repair: Repair| {
        let same = |r: &&Row| r.method == Method::Span && r.repair == repair;
        rows.iter().find(same).unwrap()
    };
    let calibration = record(rnn, &data.train, &RecordConfig::default(), &NoProgress).unwrap();
    let context = PruneContext::default().calibrated(&calibration);
    let prune = PruneConfig::new(Method::Span, 0.75);
    let keep = rank_neurons_in(rnn, &context, &prune).unwrap();
    let small = merge_in(rnn, &keep, &context, &MergeConfig::default()).unwrap();
    let merged = of(Repair::Merge);
    let reached = merged.reached.unwrap();
    let (whole, left) = (rnn.params().count(), small.params().count());
    assert_eq!(merged.params, Some(left));
    assert!((reached.total - (1.0 - left as f64 / whole as f64)).abs() < 1e-12);
    // 6 of 12 neurons: a quarter of W_hh, half of W_ih [48, 2].
    assert_eq!(reached.recurrent, 0.75);
    let both = 1.0 - (4 * 36 + 4 * 6 * 2) as f64 / (4 * 144 + 4 * 12 * 2) as f64;
    assert!((reached.recurrent_and_input - both).abs() < 1e-12);
    assert_eq!(merged.neurons, Some(vec![6]));
    let layer = recurrence_of(&small, config.lattice.aggregate).unwrap()[0];
    assert_eq!(merged.spectral_radius, [layer.spectral_radius]);
    assert_eq!(merged.dead, Some(layer.dead));
    // Under the mask of W_hh alone the other six neurons have no recurrent connections, and W_ih is whole.
    let masked = of(Repair::None);
    assert_eq!(masked.dead, Some(6));
    assert!(masked.reached.unwrap().recurrent_and_input < both && masked.neurons.is_none());
    assert_ne!(of(Repair::Refit).spectral_radius, masked.spectral_radius);
}

#[test]
fn options_of_pruning_repair_and_training_reach_the_rows() {
    let config = small().with(|c| {
        c.tasks = vec![Task::Mod(2)];
        c.cells = vec![Cell::Lstm];
        c.hidden = Some(vec![16]);
        c.methods = vec![
            Method::Magnitude,
            Method::Block8x4,
            Method::Span,
            Method::Ws,
        ];
        c.seeds = vec![0];
        c.gradual = Some(Ramp {
            until: 0.5,
            every: 2,
        });
    });
    let rows = run(&config, &NoProgress).unwrap();
    let gradual: Vec<&Row> = rows.iter().filter(|r| r.stage == Stage::Gradual).collect();
    let methods: Vec<Method> = gradual.iter().map(|r| r.method).collect();
    assert_eq!(
        methods,
        [Method::Magnitude, Method::Block8x4, Method::Threshold]
    );
    for row in gradual {
        assert_eq!(row.reached.unwrap().recurrent, 0.5, "{}", row.method);
        assert_eq!(row.finetune_epochs, 1);
    }
    for row in rows.iter().filter(|r| r.stage == Stage::OneShot) {
        // Blocks that have a kernel are also run in 8 bits, close to the floats.
        assert_eq!(row.int8.is_some(), row.method == Method::Block8x4);
        if let (Some(int8), Some(loss)) = (row.int8, row.loss) {
            assert!((int8.loss - loss).abs() < 0.05, "{} {loss}", int8.loss);
        }
        assert_eq!(row.exact.is_some(), row.repair != Repair::Merge);
        assert!(row.validation.is_some());
    }
    let with = |change: fn(&mut ExperimentConfig)| {
        let config = config.clone().with(|c| c.gradual = None).with(change);
        run(&config, &NoProgress).unwrap()
    };
    // W_ih is pruned too; without W_hh is still without W_hh alone, and no graph is drawn for W_ih.
    let both = with(|c| c.scope = Scope::Both);
    for row in both.iter().filter(|r| r.stage == Stage::OneShot) {
        let reached = row.reached.unwrap();
        match row.method {
            Method::Magnitude => assert_eq!(reached.recurrent_and_input, 0.5),
            Method::ZeroWhh => {
                assert!(reached.recurrent == 1.0 && reached.recurrent_and_input < 1.0)
            }
            _ => {}
        }
    }
    assert!(both.iter().all(|r| r.method != Method::Ws));
    let of = |rows: &[Row], method: Method, repair: Repair| -> Row {
        let same = |r: &&Row| (r.method, r.repair, r.stage) == (method, repair, Stage::OneShot);
        rows.iter().find(same).unwrap().clone()
    };
    type Change = fn(&mut ExperimentConfig);
    let changes: [(Change, Method, Repair); 9] = [
        (|c| c.refit.ridge = 0.5, Method::Magnitude, Repair::Refit),
        (
            |c| c.refit.constant = false,
            Method::Magnitude,
            Repair::Refit,
        ),
        (|c| c.merge.ridge = 0.5, Method::Span, Repair::Merge),
        (
            |c| c.compete = Compete::Global,
            Method::Magnitude,
            Repair::None,
        ),
        (
            |c| c.densities = Some(vec![0.1, 0.3, 0.7, 0.9]),
            Method::Magnitude,
            Repair::None,
        ),
        (|c| c.keep_diagonal = true, Method::Block8x4, Repair::None),
        (|c| c.weigh_inputs = true, Method::Magnitude, Repair::None),
        (|c| c.rewire = 1.0, Method::Ws, Repair::None),
        (|c| c.epochs = Some(3), Method::Magnitude, Repair::None),
    ];
    for (change, method, repair) in changes {
        let (before, after) = (of(&rows, method, repair), of(&with(change), method, repair));
        assert_ne!(before.loss, after.loss, "{method} {repair}");
    }
    let images = config.clone().with(|c| c.augment = Some(Augment::Affine));
    assert!(matches!(
        run(&images, &NoProgress),
        Err(Error::Setting {
            setting: "augmentation",
            ..
        })
    ));
}

#[test]
fn every_task_has_a_name_that_parses_and_splits_of_the_sizes_asked_for() {
    let names = "reber embedded-reber row-digits mod2 mod3 tomita1 tomita2 tomita3 tomita4 tomita5 tomita6 tomita7 adding char-grammar";
    for name in names.split(' ') {
        let task: Task = name.parse().unwrap();
        assert_eq!(task.to_string(), name);
        let data = task.generate(SMALL, 5).unwrap();
        assert_eq!(data, task.generate(SMALL, 5).unwrap());
        assert_ne!(data, task.generate(SMALL, 6).unwrap());
        for (split, size) in [(&data.train, 200), (&data.valid, 50), (&data.test, 60)] {
            match split {
                Examples::Sequences(s) => {
                    assert_eq!(s.len(), size);
                    if let Inputs::Symbols(symbols) = s.inputs() {
                        assert!(
                            symbols
                                .iter()
                                .all(|&c| (c as usize) < data.input.vocab().unwrap())
                        );
                    }
                    match s.targets() {
                        Targets::Classes(c) => {
                            assert!(c.iter().all(|&c| (c as usize) < data.outputs))
                        }
                        _ => assert_eq!(data.outputs, 1),
                    }
                }
                Examples::Text(t) => assert_eq!(t.len(), size),
            }
        }
    }
    for bad in ["tomita8", "tomita", "mod4", "digits", "csv:x"] {
        assert!(
            matches!(
                bad.parse::<Task>(),
                Err(Error::UnknownName { kind: "task", .. })
            ),
            "{bad}"
        );
    }
}

#[test]
fn a_text_file_is_cut_into_three_parts_and_missing_files_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("text.txt");
    std::fs::write(&file, "abcab".repeat(40)).unwrap();
    let data = Task::Text(file.clone()).generate(SMALL, 0).unwrap();
    assert_eq!(data.input, InputKind::OneHot { vocab: 3 });
    let lengths = [&data.train, &data.valid, &data.test].map(|s| match s {
        Examples::Text(t) => t.len(),
        Examples::Sequences(_) => 0,
    });
    assert_eq!(lengths, [180, 10, 10]);
    let absent = dir.path().join("absent.txt");
    assert!(
        matches!(Task::Text(absent.clone()).generate(SMALL, 0), Err(Error::Io { file, .. }) if file == absent)
    );
    assert!(
        matches!(Task::Mnist(absent.clone()).generate(SMALL, 0), Err(Error::Io { file, .. }) if file == absent)
    );
    let vocab = dir.path().join("vocab.json");
    std::fs::write(&vocab, r#"{"a": 0, "b": 2}"#).unwrap();
    assert!(matches!(Vocabulary::load(&vocab), Err(Error::Data { .. })));
    std::fs::write(&vocab, r#"{"a": 1, "b": 0}"#).unwrap();
    assert_eq!(
        Vocabulary::load(&vocab).unwrap().encode("abba").unwrap(),
        [1, 0, 0, 1]
    );
    assert!(matches!(
        Vocabulary::load(&vocab).unwrap().encode("abc"),
        Err(Error::UnknownName {
            kind: "character",
            ..
        })
    ));
}

#[test]
fn speed_is_measured_for_the_dense_the_masked_and_the_smaller_network() {
    let rnn = Rnn::new(
        RnnConfig::new(Cell::Lstm, InputKind::OneHot { vocab: 5 }, vec![16], 5),
        0,
    )
    .unwrap();
    let row = measure_speed(&rnn, &PruneConfig::new(Method::Strength, 0.75), 2, 0.005).unwrap();
    assert!(row.dense > 0.0 && row.compact > 0.0 && row.removed > 0.0);
    assert_eq!(row.products, (4 * 16 * 16, 4 * 8 * 8));
    assert!(row.params.2 < row.params.1 && row.params.1 < row.params.0);
    let scattered = measure_speed(&rnn, &PruneConfig::new(Method::Magnitude, 0.75), 1, 0.005);
    assert!(matches!(
        scattered,
        Err(Error::Setting {
            setting: "method",
            ..
        })
    ));
}

#[shared_data::needed("data/mnist")]
#[test]
fn row_mnist_is_learned_from_idx_files() {
    let folder = std::path::Path::new(shared_data::path!("data/mnist"));
    let dir = tempfile::tempdir().unwrap();
    for name in [
        "train10k-images-idx3-ubyte",
        "train10k-labels-idx1-ubyte",
        "t10k-images-idx3-ubyte",
        "t10k-labels-idx1-ubyte",
    ] {
        let unzipped = std::process::Command::new("gzip")
            .arg("-dc")
            .arg(folder.join(name).with_extension("gz"))
            .output()
            .unwrap();
        assert!(unzipped.status.success(), "gzip -dc {name}");
        std::fs::write(dir.path().join(name), unzipped.stdout).unwrap();
    }
    let task = Task::Mnist(dir.path().into());
    let config = ExperimentConfig::default().with(|c| {
        c.tasks = vec![task];
        c.cells = vec![Cell::Lstm];
        c.methods = vec![Method::Dense];
        c.sparsities = vec![0.5];
        c.seeds = vec![0];
        c.sizes = Some(Sizes {
            train: 4000,
            valid: 300,
            test: 500,
        });
        c.hidden = Some(vec![32]);
        c.training = Some(TrainConfig::default().with(|c| {
            c.epochs = 6;
            c.learning_rate = 5e-3;
        }));
        c.finetune_epochs = 0;
    });
    let rows = run(&config, &NoProgress).unwrap();
    let dense = rows[0].accuracy_dense.unwrap();
    assert!(dense > 0.8, "{dense}");
}
