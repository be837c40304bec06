//! Pruning of recurrent networks by order, beside the controls that tell whether order matters.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use eval_report::{
    Axis, Column, DENSE, Figure, Plot, ROUNDS, Reference, Rounds, Row, Section, Series,
    mean_over_seeds,
};
use prune_lattice::data::{Dataset, Examples};
use prune_lattice::experiment::{
    self, ExperimentConfig, OrderSummary, Repair, Stage, Trained, measure_speed, verdict,
};
use prune_lattice::hasse::Diagram;
use prune_lattice::order::{Cut, Poset, thresholds};
use prune_lattice::prune::{Method, PruneConfig, Sparsity, influence_of, layers_of};
use prune_lattice::rnn::{CheckpointNames, Rnn, TrainConfig};
use prune_lattice::tasks::Vocabulary;
use serde_json::json;

use super::perplexity::file_name;
use crate::settings::Settings;

/// Mean out-degree of the order that is drawn: about one class of several neurons and many of one.
const PICTURE_DEGREE: f64 = 1.0;
/// Classes of an order that a picture can show.
const PICTURE_CLASSES: usize = 200;
/// Characters of a text that a checkpoint is fine-tuned on.
const FINETUNE_CHARACTERS: usize = 60_000;
/// Seconds for each network in each round of the speed comparison.
const SPEED_SECONDS: f64 = 0.1;

/// What to train, prune and measure.
#[derive(Debug, Clone)]
pub struct Config {
    /// Tasks, cells, methods, sparsities and seeds.
    pub experiment: ExperimentConfig,
    /// A trained character network in place of the tasks.
    pub checkpoint: Option<CheckpointConfig>,
}

impl Config {
    /// An experiment on tasks, with `count` networks of each task and cell seeded from `seed` on.
    pub fn new(experiment: ExperimentConfig, seed: u64, count: u64) -> Self {
        // The dense network is always there to be compared with.
        let methods = [&[Method::Dense], &experiment.methods[..]].concat();
        Self {
            experiment: experiment.with(|config| {
                config.methods = methods;
                config.seeds = (seed..seed.saturating_add(count)).collect();
            }),
            checkpoint: None,
        }
    }
}

/// A trained network and the text that it is tested on.
#[derive(Debug, Clone)]
pub struct CheckpointConfig {
    /// safetensors file.
    pub weights: PathBuf,
    /// JSON with the id of each character.
    pub vocab: PathBuf,
    /// Text: 90 % for fine-tuning, 5 % validation, 5 % test.
    pub text: PathBuf,
}

/// Train, prune by every method, evaluate at once and after fine-tuning.
///
/// # Errors
/// Files that cannot be used, settings out of range, a diverging run.
pub fn run(common: &Settings, config: &Config) -> Result<Vec<Section>> {
    let bar = common.bar("pruning", 1);
    let (rows, first, name) = match &config.checkpoint {
        Some(checkpoint) => {
            let trained = open(checkpoint)?;
            let name = file_name(&checkpoint.weights);
            let Trained {
                rnn,
                data,
                training,
            } = &trained;
            let rows = experiment::run_model(&name, rnn, data, &config.experiment, training, &bar)?;
            (rows, trained, name)
        }
        None => {
            let rows = experiment::run(&config.experiment, &bar)?;
            let experiment = &config.experiment;
            let (task, cell) = experiment
                .tasks
                .first()
                .zip(experiment.cells.first())
                .context("--task and --cell name nothing to run")?;
            let seed = experiment.seeds.first().copied().unwrap_or_default();
            let trained = experiment::train_dense(experiment, task, *cell, seed, &bar)?;
            (rows, trained, task.to_string())
        }
    };
    bar.finish();
    let mut sections = vec![overview(&rows, config)];
    let mut groups: Vec<(String, String)> = Vec::new();
    for row in &rows {
        let group = (row.task.clone(), row.cell.to_string());
        if !groups.contains(&group) {
            groups.push(group);
        }
    }
    for (task, cell) in groups {
        let of_group: Vec<&experiment::Row> = rows
            .iter()
            .filter(|row| row.task == task && row.cell.name() == cell)
            .collect();
        sections.push(task_section(&task, &cell, &of_group)?);
    }
    sections.push(speed_section(&first.rnn, &name)?);
    sections.extend(picture(&first.rnn, &name)?);
    Ok(sections)
}

fn open(config: &CheckpointConfig) -> Result<Trained> {
    let rnn = Rnn::load(&config.weights, &CheckpointNames::default())?;
    let text =
        std::fs::read_to_string(&config.text).with_context(|| config.text.display().to_string())?;
    let symbols = Vocabulary::load(&config.vocab)?
        .encode(&text)
        .with_context(|| config.text.display().to_string())?;
    let at = |share: f64| (symbols.len() as f64 * share) as usize;
    let data = Dataset {
        train: Examples::Text(symbols[..at(0.9).min(FINETUNE_CHARACTERS)].to_vec()),
        valid: Examples::Text(symbols[at(0.9)..at(0.95)].to_vec()),
        test: Examples::Text(symbols[at(0.95)..].to_vec()),
        input: rnn.config().input,
        outputs: rnn.config().outputs,
    };
    let training = TrainConfig::default().with(|c| {
        c.learning_rate = 1e-3;
        c.batch = 32;
        c.window = 64;
    });
    Ok(Trained {
        rnn,
        data,
        training,
    })
}

/// What was run and what the rows say in words.
fn overview(rows: &[experiment::Row], config: &Config) -> Section {
    let experiment = &config.experiment;
    let prose = "One network for each task, cell and seed; every method prunes that same network, and each result is \
        tested at once and again after fine-tuning under its mask. Refitting solves the weights under a mask again, merging \
        folds removed neurons into the kept ones; both are least squares on states of the training split, without training. \
        Test data decide nothing. A mask makes nothing faster: see the table of speeds.";
    Section {
        title: "Pruning by order".into(),
        prose: prose.into(),
        remarks: verdict(rows),
        ..Section::default()
    }
    .fact("seeds", json!(experiment.seeds))
    .fact("fine-tuning epochs", experiment.finetune_epochs)
    .fact("pruned", json!(experiment.scope))
}

/// What a task is judged by.
#[derive(Clone, Copy)]
enum Quality {
    /// Share of right answers.
    Accuracy,
    /// Bits per character of a text.
    Bits,
    /// Squared error.
    Loss,
}

impl Quality {
    fn of(self, row: &Row) -> Option<f64> {
        match self {
            Quality::Accuracy => row.accuracy,
            Quality::Bits => row.extra.get("bits")?.as_f64(),
            Quality::Loss => row.nll,
        }
    }

    fn column(self) -> Column {
        match self {
            Quality::Accuracy => Column::Accuracy,
            Quality::Bits => Column::Extra("bits".into()),
            Quality::Loss => Column::Nll,
        }
    }
}

fn task_section(task: &str, cell: &str, rows: &[&experiment::Row]) -> Result<Section> {
    let mut cells: Vec<(Method, Repair, u64, Stage)> = Vec::new();
    for row in rows {
        let cell = (row.method, row.repair, row.sparsity.to_bits(), row.stage);
        if !cells.contains(&cell) {
            cells.push(cell);
        }
    }
    let of_cell = |(method, repair, sparsity, stage): (Method, Repair, u64, Stage)| {
        let same = |r: &&experiment::Row| {
            (r.method, r.repair, r.sparsity.to_bits(), r.stage) == (method, repair, sparsity, stage)
        };
        let runs: Vec<&experiment::Row> = rows.iter().copied().filter(same).collect();
        cell_row(&runs, task, cell)
    };
    let rows = cells
        .into_iter()
        .map(of_cell)
        .collect::<Result<Vec<Row>>>()?;
    let quality = if rows.iter().any(|row| row.extra.contains_key("bits")) {
        Quality::Bits
    } else if rows.iter().any(|row| row.accuracy.is_some()) {
        Quality::Accuracy
    } else {
        Quality::Loss
    };
    let dense = rows
        .iter()
        .find(|row| row.method == DENSE)
        .and_then(|row| quality.of(row))
        .map(|y| Reference {
            name: DENSE.into(),
            y,
        });
    let plot = |stage: &'static str, title: &str| {
        let of_stage = |row: &Row| row.extra.get("stage").is_some_and(|s| s == stage);
        let rows: Vec<Row> = rows
            .iter()
            .filter(|row| of_stage(row) && row.sparsity.is_some_and(|s| s > 0.0))
            .cloned()
            .map(|mut row| {
                // A curve for each method and repair.
                if let Some(repair) = row.extra.get("repair").and_then(|r| r.as_str())
                    && repair != Repair::None.name()
                {
                    row.method = format!("{} + {repair}", row.method);
                }
                row
            })
            .collect();
        let (y, field) = match quality {
            Quality::Accuracy => (Axis::linear("accuracy"), "accuracy"),
            Quality::Bits => (Axis::linear("bits per character"), "bits"),
            Quality::Loss => (Axis::log("loss"), "nll"),
        };
        Plot {
            title: format!("{task}, {title}"),
            x: Axis::linear("sparsity of the pruned weights"),
            y,
            series: Series::by_method(&rows, |row| row.sparsity, field, |row| quality.of(row)),
            reference: dense.clone(),
        }
    };
    Ok(Section {
        title: format!("{task}, {cell}"),
        prose: String::new(),
        columns: vec![
            Column::Method,
            Column::Sparsity,
            Column::Extra("repair".into()),
            Column::Extra("stage".into()),
            quality.column(),
            Column::Extra("AUC".into()),
            Column::FinetuneEpochs,
            Column::Extra("of W_hh".into()),
            Column::Extra("of W_hh and W_ih".into()),
            Column::Extra("of all".into()),
            Column::Extra("order".into()),
            Column::Seconds,
        ],
        plots: vec![
            plot("one-shot", "right after pruning"),
            plot("fine-tuned", "after fine-tuning"),
        ],
        rows,
        ..Section::default()
    })
}

/// One cell of the table: the mean over seeds.
fn cell_row(runs: &[&experiment::Row], task: &str, cell: &str) -> Result<Row> {
    let rows: Vec<Row> = runs.iter().map(|run| seed_row(run, task, cell)).collect();
    let mut row = mean_over_seeds(&rows)?;
    let reached: Vec<Sparsity> = runs.iter().filter_map(|run| run.reached).collect();
    if !reached.is_empty() {
        let mut mean = |name: &str, share: fn(&Sparsity) -> f64| {
            let mean = reached.iter().map(share).sum::<f64>() / reached.len() as f64;
            let text = format!("{:.1} %", 100.0 * mean);
            row.extra.insert(name.into(), json!(text));
        };
        mean("of W_hh", |s| s.recurrent);
        mean("of W_hh and W_ih", |s| s.recurrent_and_input);
        mean("of all", |s| s.total);
    }
    let orders: Vec<&OrderSummary> = runs.iter().filter_map(|run| run.order.as_ref()).collect();
    if !orders.is_empty() {
        let range = |ends: fn(&OrderSummary) -> (usize, usize)| {
            let low = orders.iter().map(|order| ends(order).0).min();
            let high = orders.iter().map(|order| ends(order).1).max();
            match (low.unwrap_or(0), high.unwrap_or(0)) {
                (low, high) if low == high => low.to_string(),
                (low, high) => format!("{low}–{high}"),
            }
        };
        let text = format!(
            "{} of {} cuts, {} classes, {} irreducible",
            range(|order| {
                let counted = order.cuts - order.degenerate_cuts;
                (counted, counted)
            }),
            range(|order| (order.cuts, order.cuts)),
            range(|order| order.classes),
            range(|order| order.irreducible)
        );
        row.extra.insert("order".into(), json!(text));
    }
    Ok(row)
}

/// What one network gave.
fn seed_row(row: &experiment::Row, task: &str, cell: &str) -> Row {
    let stage = match row.stage {
        Stage::OneShot => "one-shot",
        Stage::FineTuned => "fine-tuned",
        Stage::FromScratch => "from scratch",
    };
    let mut out = Row {
        model: Some(format!("{task} {cell}")),
        sparsity: Some(row.sparsity),
        accuracy: row.accuracy,
        accuracy_dense: row.accuracy_dense,
        nll: row.loss,
        params: row.params.map(|n| n as u64),
        params_dense: Some(row.params_dense as u64),
        finetune_epochs: Some(row.finetune_epochs as u64),
        seconds: row.seconds,
        notes: row.error.iter().cloned().collect(),
        ..Row::new("lattice", row.method.name())
    };
    out.extra.insert("stage".into(), json!(stage));
    out.extra.insert("repair".into(), json!(row.repair));
    if let Some(auc) = row.auc {
        out.extra.insert("AUC".into(), json!(auc));
    }
    if let Some(bits) = row.bits {
        out.extra.insert("bits".into(), json!(bits));
    }
    if row.method == Method::Dense || row.method.is_lattice() {
        out
    } else {
        out.control()
    }
}

/// Steps per second of the dense network, of the block that a mask leaves, and of the network without the neurons.
fn speed_section(rnn: &Rnn, name: &str) -> Result<Section> {
    let mut rows = Vec::new();
    for batch in [1, 32] {
        for sparsity in [0.5, 0.75, 0.9] {
            let config = PruneConfig::new(Method::Strength, sparsity);
            let second = Duration::from_secs(1);
            let (mut dense, mut compact) = (Rounds::default(), Rounds::default());
            let mut removed = Rounds::default();
            let mut counts = (0, 0, 0);
            for _ in 0..ROUNDS {
                let speed = measure_speed(rnn, &config, batch, SPEED_SECONDS)?;
                dense.add(speed.dense, second);
                compact.add(speed.compact, second);
                removed.add(speed.removed, second);
                counts = speed.params;
            }
            for (method, times, params) in [
                ("masked, on its block", compact, counts.1),
                ("neurons removed", removed, counts.2),
            ] {
                let mut row = Row {
                    model: Some(name.into()),
                    sparsity: Some(sparsity),
                    params: Some(params as u64),
                    params_dense: Some(counts.0 as u64),
                    ..Row::new("lattice", method)
                };
                times.fill_beside(&dense, &mut row);
                row.extra.insert("batch".into(), json!(batch));
                rows.push(row);
            }
        }
    }
    Ok(Section {
        title: "Speed".into(),
        prose: format!(
            "Steps per second of {name} on one thread, all sequences of a batch together, read-out included. Neurons are \
             ranked by strength; the speed depends on how many stay, not on which."
        ),
        columns: vec![
            Column::Method,
            Column::Extra("batch".into()),
            Column::Sparsity,
            Column::ParamsOverDense,
            Column::TokensPerSecond,
            Column::Speedup,
        ],
        rows,
        ..Section::default()
    })
}

/// The order of a network at one cut, where it is small enough to be seen.
fn picture(rnn: &Rnn, name: &str) -> Result<Option<Section>> {
    let base = PruneConfig::new(Method::LatticeReachability, 0.5);
    let influence = influence_of(&layers_of(rnn), rnn.config().cell, &base.lattice)?;
    let threshold = thresholds(&influence, &[Cut::Degree(PICTURE_DEGREE)])?[0];
    let poset = Poset::of_digraph(&influence.digraph(threshold));
    if poset.len() > PICTURE_CLASSES {
        return Ok(None);
    }
    let caption = format!(
        "Hasse diagram of {name} at a mean out-degree of {PICTURE_DEGREE}: {} neurons in {} classes. A class below another \
         drives it. Filled: meet-irreducible; dashed outline: not join-irreducible; larger: several neurons that drive each \
         other.",
        influence.len(),
        poset.len()
    );
    let svg = Diagram::of(&poset).svg();
    Ok(Some(Section {
        title: "The order".into(),
        figures: vec![Figure { caption, svg }],
        ..Section::default()
    }))
}
