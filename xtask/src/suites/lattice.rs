//! Pruning of recurrent networks: which method, which repair, and what it costs.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use eval_report::{
    Axis, Column, DENSE, Figure, Plot, Point, ROUNDS, Reference, Rounds, Row, Section, Series,
    mean_over_seeds,
};
use prune_lattice::NoProgress;
use prune_lattice::calibration::{RecordConfig, record};
use prune_lattice::data::{Dataset, Examples};
use prune_lattice::experiment::{
    self, ExperimentConfig, OrderSummary, Repair, Stage, StructureConfig, Trained, measure_blocks,
    measure_speed, verdict,
};
use prune_lattice::hasse::Diagram;
use prune_lattice::mask::{MaskSet, mask_svg};
use prune_lattice::onnx::OnnxFile;
use prune_lattice::order::{Cut, Poset, thresholds};
use prune_lattice::prune::{Method, PruneConfig, Sparsity, influence_of, layers_of, prune};
use prune_lattice::rnn::{CheckpointNames, ReadOut, Rnn, TrainConfig};
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
/// The same for block kernels, of which there are more.
const BLOCK_SECONDS: f64 = 0.02;
/// Sparsities at which speed is measured.
const SPEED_SPARSITIES: [f64; 3] = [0.5, 0.75, 0.9];
/// The method and sparsity of the picture of blocks.
const PICTURE_BLOCKS: (Method, f64) = (Method::Block8x4, 0.75);
/// What the first table shows, in this order: what is recommended, what the paper proposes, what both must beat.
const SHOWN: [(Method, Repair); 7] = [
    (Method::Magnitude, Repair::Refit),
    (Method::Span, Repair::Merge),
    (Method::LatticeContext, Repair::None),
    (Method::LatticeContext, Repair::Merge),
    (Method::Magnitude, Repair::None),
    (Method::Random, Repair::Refit),
    (Method::ZeroWhh, Repair::None),
];

/// What to train, prune and measure.
#[derive(Debug, Clone)]
pub struct Config {
    /// Tasks, cells, methods, sparsities and seeds.
    pub experiment: ExperimentConfig,
    /// A trained network from a file.
    pub checkpoint: Option<CheckpointConfig>,
    /// Random graphs of each kind whose networks are trained from fresh weights.
    pub structures: Option<usize>,
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
            structures: None,
        }
    }
}

/// A trained network. Without a text it is judged on the experiment's only task.
#[derive(Debug, Clone)]
pub struct CheckpointConfig {
    /// safetensors or ONNX file.
    pub weights: PathBuf,
    /// Node of an ONNX file; `None`: the only one.
    pub node: Option<String>,
    /// Prefix of the read-out's weight and bias.
    pub read_out: Option<String>,
    /// What is applied to the states before the read-out.
    pub activation: ReadOut,
    /// The text of a character network.
    pub characters: Option<Characters>,
}

/// The text that a character network is tested on.
#[derive(Debug, Clone)]
pub struct Characters {
    /// JSON with the id of each character.
    pub vocab: PathBuf,
    /// Text: 90 % for fine-tuning, 5 % validation, 5 % test.
    pub text: PathBuf,
}

/// Train, prune by every method, evaluate at once and after fine-tuning.
///
/// # Errors
/// Files that cannot be used, settings out of range, a diverging run.
pub fn run(settings: &Settings, config: &Config) -> Result<Vec<Section>> {
    let bar = settings.bar("pruning", 1);
    let (rows, first, name) = match &config.checkpoint {
        Some(checkpoint) => {
            let trained = open(checkpoint, &config.experiment)?;
            let name = file_name(&checkpoint.weights);
            let Trained {
                rnn,
                data,
                training,
                ..
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
    let structures = config
        .structures
        .map(|n| structures(&config.experiment, n, &bar));
    let structures = structures.transpose()?;
    bar.finish();
    let mut sections = Vec::new();
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
    sections.insert(0, overview(&rows, &sections, config));
    sections.extend(structures);
    sections.push(speed_section(&first.rnn, &name)?);
    sections.push(block_speed_section(&first.rnn, &name)?);
    sections.push(spectrum(&first, &name)?);
    sections.extend(picture(&first.rnn, &name)?);
    Ok(sections)
}

fn network(config: &CheckpointConfig) -> Result<Rnn> {
    let file = &config.weights;
    if file.extension().is_some_and(|e| e == "onnx") {
        let onnx = OnnxFile::open(file)?;
        let node = onnx.node(config.node.as_deref())?;
        return Ok(onnx.network(node, config.read_out.as_deref(), config.activation)?);
    }
    if config.node.is_some() {
        bail!("--node: {} is not an ONNX file", file.display());
    }
    let names = CheckpointNames::default().with(|names| {
        names.dense_input = config.characters.is_none();
        names.read_out = config.activation;
        if let Some(read_out) = &config.read_out {
            names.output = read_out.clone();
        }
    });
    Ok(Rnn::load(file, &names)?)
}

fn open(config: &CheckpointConfig, experiment: &ExperimentConfig) -> Result<Trained> {
    let rnn = network(config)?;
    let Some(config) = &config.characters else {
        let [task] = experiment.tasks.as_slice() else {
            bail!("--weights: a network from a file is judged on one --task");
        };
        let seed = experiment.seeds.first().copied().unwrap_or_default();
        return Ok(Trained {
            data: task.generate(task.default_sizes(), seed)?,
            training: task.default_training(rnn.config().cell),
            wired: MaskSet::default(),
            rnn,
        });
    };
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
        wired: MaskSet::default(),
    })
}

/// The rows that answer the first questions, and what all rows say in words.
fn overview(rows: &[experiment::Row], sections: &[Section], config: &Config) -> Section {
    let experiment = &config.experiment;
    let prose = "Every method prunes the same trained network of each task, cell and seed. Accuracy is measured on test data \
        right after pruning and again after fine-tuning under the mask; test data decide nothing. Refit solves the weights \
        under a mask again by least squares on states of the training split. Merge removes neurons and folds a linear \
        prediction of their states into the weights that read them. Neither needs training. This table shows the recommended \
        methods first (magnitude with refit for masks, span with merge for smaller networks), then the method of \
        arXiv 2502.16525 (lattice-context), then baselines; the tables of the tasks have all rows. A scattered mask does not \
        make a network faster: see the tables of speeds.";
    let is = |row: &Row, key: &str, value: &str| row.extra.get(key).is_some_and(|v| v == value);
    let mut lines: Vec<Row> = Vec::new();
    for section in sections {
        let one_shot = |row: &&Row| is(row, "stage", "one-shot");
        lines.extend(
            section
                .rows
                .iter()
                .filter(|row| row.method == DENSE && one_shot(row) && is(row, "repair", "none"))
                .cloned(),
        );
        for (method, repair) in SHOWN {
            let same = |row: &&Row| row.method == method.name() && is(row, "repair", repair.name());
            for row in section.rows.iter().filter(same).filter(one_shot) {
                let tuned = section.rows.iter().filter(same).find(|other| {
                    is(other, "stage", "fine-tuned") && other.sparsity == row.sparsity
                });
                let mut line = row.clone();
                if repair != Repair::None {
                    line.method = format!("{method} + {repair}");
                }
                if let Some(tuned) = tuned {
                    let value = match Quality::of_rows(&section.rows) {
                        Quality::Accuracy => tuned.accuracy.map(|a| format!("{:.2} %", 100.0 * a)),
                        quality => quality.of(tuned).map(|v| format!("{v:.4}")),
                    };
                    if let Some(value) = value {
                        line.extra.insert("after fine-tuning".into(), json!(value));
                    }
                }
                lines.push(line);
            }
        }
    }
    let mut qualities: Vec<Column> = Vec::new();
    for section in sections {
        let column = Quality::of_rows(&section.rows).column();
        if !qualities.contains(&column) {
            qualities.push(column);
        }
    }
    let head = [Column::Model, Column::Method, Column::Sparsity];
    let tail = [Column::Extra("after fine-tuning".into())];
    Section {
        title: "Pruning of recurrent networks".into(),
        prose: prose.into(),
        columns: head.into_iter().chain(qualities).chain(tail).collect(),
        rows: lines,
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
    /// Area under the ROC curve.
    Auc,
    /// Bits per character of a text.
    Bits,
    /// Squared error.
    Loss,
}

impl Quality {
    /// What rows of one task have.
    fn of_rows(rows: &[Row]) -> Self {
        let has = |key: &str| rows.iter().any(|row| row.extra.contains_key(key));
        match () {
            () if has("bits") => Quality::Bits,
            () if has("AUC") => Quality::Auc,
            () if rows.iter().any(|row| row.accuracy.is_some()) => Quality::Accuracy,
            () => Quality::Loss,
        }
    }

    fn of(self, row: &Row) -> Option<f64> {
        match self {
            Quality::Accuracy => row.accuracy,
            Quality::Auc => row.extra.get("AUC")?.as_f64(),
            Quality::Bits => row.extra.get("bits")?.as_f64(),
            Quality::Loss => row.nll,
        }
    }

    fn column(self) -> Column {
        match self {
            Quality::Accuracy => Column::Accuracy,
            Quality::Auc => Column::Extra("AUC".into()),
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
    let quality = Quality::of_rows(&rows);
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
            Quality::Auc => (Axis::linear("area under the ROC curve"), "AUC"),
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
    let mut columns = vec![
        Column::Method,
        Column::Sparsity,
        Column::Extra("repair".into()),
        Column::Extra("stage".into()),
        quality.column(),
    ];
    if matches!(quality, Quality::Auc) {
        columns.push(Column::Accuracy);
    }
    let extra = |name: &str| Column::Extra(name.into());
    columns.extend([
        Column::FinetuneEpochs,
        extra("of W_hh"),
        extra("of W_hh and W_ih"),
        extra("of all"),
        extra("FC r"),
        extra("FC r of kept"),
        extra("reach kept"),
        extra("order"),
        Column::Seconds,
    ]);
    let prose = "FC r is Pearson's r between the correlations of states before and after pruning, over all pairs of neurons and \
        over pairs of kept neurons. Reach kept is the share of the ordered pairs of neurons (at a mean out-degree of 1) that \
        can still be reached.";
    Ok(Section {
        title: format!("{task}, {cell}"),
        prose: prose.into(),
        columns,
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
    if let Some(kept) = row.connectivity {
        for (name, value) in [
            ("FC r", kept.functional),
            ("FC r of kept", kept.functional_kept),
            ("reach kept", kept.reach),
        ] {
            if let Some(value) = value {
                out.extra.insert(name.into(), json!(value));
            }
        }
    }
    if let Some(bits) = row.bits {
        out.extra.insert("bits".into(), json!(bits));
    }
    match row.method {
        Method::Strength
        | Method::RandomNeurons
        | Method::Reducible
        | Method::Random
        | Method::Threshold
        | Method::ZeroWhh
        | Method::Ws
        | Method::Ba
        | Method::Er => out.control(),
        _ => out,
    }
}

/// Steps per second of the dense network, of the block that a mask leaves, and of the network without the neurons.
fn speed_section(rnn: &Rnn, name: &str) -> Result<Section> {
    let mut rows = Vec::new();
    for batch in [1, 32] {
        for sparsity in SPEED_SPARSITIES {
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
        title: "Speed of smaller networks".into(),
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

/// Steps per second of the block kernels.
fn block_speed_section(rnn: &Rnn, name: &str) -> Result<Section> {
    let mut rows = Vec::new();
    let second = Duration::from_secs(1);
    for method in [Method::Block8x4, Method::Block8x1] {
        for sparsity in SPEED_SPARSITIES {
            let mut times = [Rounds::default(), Rounds::default(), Rounds::default()];
            let mut bytes = [0; 3];
            for _ in 0..ROUNDS {
                let config = PruneConfig::new(method, sparsity);
                let speed = measure_blocks(rnn, &config, BLOCK_SECONDS)?;
                let rates = [speed.dense, speed.floats, speed.integers];
                for (times, rate) in times.iter_mut().zip(rates) {
                    times.add(rate, second);
                }
                bytes = speed.bytes;
            }
            let [dense, floats, integers] = times;
            let dense_bytes = bytes[0];
            for (kind, times, bytes) in [("f32", floats, bytes[1]), ("int8", integers, bytes[2])] {
                let mut row = Row {
                    model: Some(name.into()),
                    sparsity: Some(sparsity),
                    ..Row::new("lattice", format!("{method} {kind}"))
                };
                times.fill_beside(&dense, &mut row);
                let rate = |steps: Option<f64>, bytes: usize| {
                    steps.map(|s| format!("{:.1} GB/s", s * bytes as f64 / 1e9))
                };
                let both = rate(row.tokens_per_second, bytes)
                    .zip(rate(row.tokens_per_second_dense, dense_bytes));
                if let Some((own, dense)) = both {
                    row.extra.insert("read".into(), json!(own));
                    row.extra.insert("dense reads".into(), json!(dense));
                }
                rows.push(row);
            }
        }
    }
    Ok(Section {
        title: "Speed of blocks".into(),
        prose: format!(
            "Steps per second of one sequence of {name} on one thread, W_hh kept in whole blocks, beside the dense network by the \
             same kernels in f32. GB/s are those of the matrices that a step reads."
        ),
        columns: vec![
            Column::Method,
            Column::Sparsity,
            Column::TokensPerSecond,
            Column::Speedup,
            Column::Extra("read".into()),
            Column::Extra("dense reads".into()),
        ],
        rows,
        ..Section::default()
    })
}

/// How many directions the states of the top layer span, and the blocks that a mask keeps.
fn spectrum(trained: &Trained, name: &str) -> Result<Section> {
    let Trained { rnn, data, .. } = trained;
    let calibration = record(rnn, &data.train, &RecordConfig::default(), &NoProgress)?;
    let series = calibration
        .layers
        .iter()
        .enumerate()
        .map(|(l, layer)| {
            let values = layer.after.spectrum()?;
            let total: f64 = values.iter().sum::<f64>().max(f64::MIN_POSITIVE);
            let mut left = total;
            let points = values.iter().enumerate().map(|(k, v)| {
                left -= v;
                Point {
                    x: (k + 1) as f64,
                    y: (left / total).max(1e-9),
                    band: None,
                }
            });
            Ok(Series {
                name: format!("layer {l}"),
                points: points.collect(),
                control: false,
            })
        })
        .collect::<Result<Vec<Series>>>()?;
    let plot = Plot {
        title: format!("{name}, variance of the states outside the first directions"),
        x: Axis::linear("directions"),
        y: Axis::log("share of the variance"),
        series,
        reference: None,
    };
    let (method, sparsity) = PICTURE_BLOCKS;
    let (masks, _) = prune(rnn, &PruneConfig::new(method, sparsity))?;
    let gates = rnn.config().cell.gate_names();
    let figures = masks.iter().filter_map(|(matrix, mask)| {
        let svg = mask_svg(mask.keep(), gates, method.block()?)?;
        let caption = format!(
            "Blocks of {matrix} that {method} keeps at a sparsity of {sparsity}, gate by gate. Rows are targets, columns are \
             sources."
        );
        Some(Figure { caption, svg })
    });
    Ok(Section {
        title: "States and blocks".into(),
        prose: "The fewer directions the states span, the fewer neurons are needed: span chooses neurons that span them, merge \
            predicts the others."
            .into(),
        plots: vec![plot],
        figures: figures.collect(),
        ..Section::default()
    })
}

/// Networks on random graphs, trained from fresh weights.
fn structures(
    experiment: &ExperimentConfig,
    graphs: usize,
    progress: &dyn prune_lattice::Progress,
) -> Result<Section> {
    let (task, cell) = experiment
        .tasks
        .first()
        .zip(experiment.cells.first())
        .context("--task and --cell name nothing to run")?;
    let config = StructureConfig::new(task.clone(), *cell).with(|c| {
        c.graphs = graphs;
        c.seed = experiment.seeds.first().copied().unwrap_or_default();
    });
    let found = experiment::run_structures(&config, progress)?;
    let rows = found.iter().map(|network| {
        let mut row = Row {
            model: Some(format!("{task} {cell}")),
            accuracy: network.accuracy,
            nll: Some(network.loss),
            ..Row::new("lattice", network.structure.name())
        };
        row.extra.insert("graph".into(), json!(network.graph));
        row.extra.insert("neurons".into(), json!(network.neurons));
        row.extra
            .insert("connections".into(), json!(network.connections));
        row
    });
    let remarks = experiment::correlations(&found)
        .into_iter()
        .filter_map(|p| {
            let r = p.r?;
            Some(format!(
                "{}: r = {r:.2} with accuracy over {} networks",
                p.name, p.networks
            ))
        });
    Ok(Section {
        title: format!("Random structures, {task}, {cell}"),
        prose: "Networks whose recurrent connections are random graphs, trained from fresh weights (after arXiv 2407.20601): \
            er has as many edges as the ba graph of the same number, stack is a stack of equal layers with about as many \
            connections."
            .into(),
        columns: vec![
            Column::Method,
            Column::Extra("graph".into()),
            Column::Extra("neurons".into()),
            Column::Extra("connections".into()),
            Column::Accuracy,
            Column::Nll,
        ],
        rows: rows.collect(),
        remarks: remarks.collect(),
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
