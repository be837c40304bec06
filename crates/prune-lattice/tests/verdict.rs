//! What is said of the rows of an experiment.

use prune_lattice::{
    Cell, NoProgress,
    experiment::{
        ExperimentConfig, Metric, Outcome, Repair, Row, Stage, Treatment, compare, run, verdict,
    },
    prune::Method,
    rnn::TrainConfig,
    tasks::{Sizes, Task},
};

/// A row of a network that was pruned at once.
fn template() -> Row {
    let config = ExperimentConfig::default().with(|c| {
        c.tasks = vec![Task::Mod(2)];
        c.cells = vec![Cell::Tanh];
        c.methods = vec![Method::LatticeContext];
        c.sparsities = vec![0.5];
        c.seeds = vec![0];
        c.hidden = Some(vec![8]);
        c.sizes = Some(Sizes {
            train: 40,
            valid: 20,
            test: 20,
        });
        c.training = Some(TrainConfig::default().with(|c| c.epochs = 1));
        c.finetune_epochs = 0;
    });
    let rows = run(&config, &NoProgress).unwrap();
    let found = rows
        .into_iter()
        .find(|r| r.method == Method::LatticeContext);
    Row {
        stage: Stage::OneShot,
        repair: Repair::None,
        ..found.unwrap()
    }
}

/// Rows with given accuracies for each method and network.
fn rows_with(template: &Row, accuracies: &[(Treatment, &[f64])]) -> Vec<Row> {
    let rows = accuracies.iter().flat_map(|(treatment, values)| {
        values.iter().zip(0..).map(move |(&a, seed)| Row {
            method: treatment.method,
            repair: treatment.repair,
            seed,
            network: Some(seed),
            accuracy: Some(a),
            ..template.clone()
        })
    });
    rows.collect()
}

const fn plain(method: Method) -> Treatment {
    Treatment::new(method, Repair::None)
}

const L: Treatment = plain(Method::LatticeContext);
const S: Treatment = plain(Method::Strength);
const R: Treatment = plain(Method::RandomNeurons);
const RANDOM_REFIT: Treatment = Treatment::new(Method::Random, Repair::Refit);
const SPAN_MERGE: Treatment = Treatment::new(Method::Span, Repair::Merge);
const LATTICE_MERGE: Treatment = Treatment::new(Method::LatticeContext, Repair::Merge);
const LOW: &[f64] = &[0.5, 0.6];
const MID: &[f64] = &[0.7, 0.7];
const HIGH: &[f64] = &[0.9, 0.8];

#[test]
fn the_verdict_says_in_words_when_order_does_not_beat_strength_or_chance() {
    let template = template();
    let says = |accuracies: &[(Treatment, &[f64])], words: &str| {
        let lines = verdict(&rows_with(&template, accuracies));
        assert!(lines[0].contains(words), "{lines:?}");
    };
    says(
        &[(L, HIGH), (S, MID), (R, LOW)],
        "order beats both chance and plain neuron strength",
    );
    says(
        &[(L, MID), (S, HIGH), (R, LOW)],
        "beats chance but not plain neuron strength",
    );
    says(
        &[(L, LOW), (S, MID), (R, HIGH)],
        "order does not beat chance or plain neuron strength",
    );
    // One network up, one down: no claim.
    says(
        &[(L, &[0.7, 0.7]), (S, &[0.8, 0.6]), (R, &[0.6, 0.8])],
        "order does not beat chance or plain neuron strength",
    );
    says(
        &[(L, &[0.9]), (S, &[0.1])],
        "a single network supports no verdict; it is ahead of strength in 1 of 1",
    );
    let c = compare(&rows_with(&template, &[(L, HIGH), (S, MID)]));
    assert_eq!(c.len(), 1);
    assert_eq!((c[0].networks, c[0].outcome), (2, Outcome::Better));
    assert!((c[0].advantage - 0.15).abs() < 1e-12 && (c[0].range.0 - 0.1).abs() < 1e-12);
}

#[test]
fn claims_are_held_against_random_weights_refitted_and_span_merged() {
    let template = template();
    let rows = rows_with(
        &template,
        &[
            (L, LOW),
            (LATTICE_MERGE, MID),
            (RANDOM_REFIT, LOW),
            (SPAN_MERGE, HIGH),
        ],
    );
    let lines = verdict(&rows);
    let line = |words: &str| {
        let found = lines.iter().find(|l| l.starts_with(words));
        found.unwrap_or_else(|| panic!("{words}: {lines:?}"))
    };
    assert!(line("lattice-context + merge, one-shot").contains(
        "it beats random + refit, but not span + merge (random + refit: better in 1, worse in 0 of 1; span + merge: better in \
         0, worse in 1 of 1"
    ));
    assert!(
        line("lattice-context, one-shot")
            .contains("it does not beat random + refit or span + merge")
    );
    assert!(line("span + merge, one-shot").contains("it beats random + refit (random + refit"));
}

#[test]
fn several_draws_on_one_network_are_one_comparison_by_their_mean() {
    let template = template();
    let mut rows = rows_with(
        &template,
        &[(L, &[0.7, 0.7]), (R, &[0.5, 0.7]), (R, &[0.7, 0.9])],
    );
    let c = compare(&rows);
    assert_eq!((c.len(), c[0].networks), (1, 2));
    // 0.7 against 0.6 and 0.8.
    assert!((c[0].range.0 + 0.1).abs() < 1e-12 && (c[0].range.1 - 0.1).abs() < 1e-12);
    rows.iter_mut().for_each(|r| r.network = None);
    let c = compare(&rows);
    assert_eq!((c[0].networks, c[0].outcome), (1, Outcome::Unclear));
    assert!(c[0].advantage.abs() < 1e-12);
}

#[test]
fn cells_are_told_apart_and_each_task_is_judged_by_its_own_metric() {
    let template = template();
    let of_cell = |cell: Cell, value: f64| Row {
        cell,
        ..rows_with(&template, &[(RANDOM_REFIT, &[value])])[0].clone()
    };
    let lines = verdict(&[of_cell(Cell::Lstm, 0.9), of_cell(Cell::Tanh, 0.1)]);
    for words in [
        "mod2 with lstm at 50 %, without training (accuracy): random + refit 90.0 %",
        "mod2 with tanh at 50 %, without training (accuracy): random + refit 10.0 %",
    ] {
        assert!(lines.iter().any(|l| l == words), "{lines:?}");
    }
    // Decisions at every step by the area under the curve, whatever the accuracy; texts by bits; regression by the loss.
    type Change = fn(&mut Row, f64);
    let cases: [(Change, Metric, f64); 3] = [
        (|r, v| r.auc = Some(v), Metric::Auc, 0.25),
        (|r, v| r.bits = Some(v), Metric::Bits, -0.25),
        (
            |r, v| (r.accuracy, r.loss) = (None, Some(v)),
            Metric::Loss,
            -0.25,
        ),
    ];
    for (change, metric, advantage) in cases {
        let mut rows = rows_with(&template, &[(L, &[0.0, 0.0]), (S, &[1.0, 1.0])]);
        for row in &mut rows {
            change(row, if row.method == L.method { 0.75 } else { 0.5 });
        }
        let c = compare(&rows);
        assert_eq!((c[0].metric, c[0].advantage), (metric, advantage));
    }
}

#[test]
fn refitted_weights_that_validation_does_not_prefer_are_named() {
    let template = template();
    let with = |repair: Repair, validation: f64| Row {
        repair,
        validation: Some(validation),
        ..template.clone()
    };
    let said = |refit: f64| {
        let lines = verdict(&[with(Repair::None, 0.5), with(Repair::Refit, refit)]);
        lines
            .iter()
            .any(|l| l.contains("should be kept: lattice-context in 1 of 1"))
    };
    assert!(said(0.6) && !said(0.4));
}
