//! Pruning of recurrent networks: which method, which repair, and what it costs.

mod pictures;
mod structures;
mod tables;

use anyhow::{Context, Result, bail};
use eval_report::Section;
use prune_lattice::data::{Dataset, Examples};
use prune_lattice::experiment::{self, ExperimentConfig, Trained};
use prune_lattice::mask::MaskSet;
use prune_lattice::onnx::OnnxFile;
use prune_lattice::prune::Method;
use prune_lattice::rnn::{CheckpointNames, ReadOut, Rnn, TrainConfig};
use prune_lattice::tasks::Vocabulary;
use std::path::PathBuf;

use super::lazy::Lazy;
use super::perplexity::file_name;
use crate::bar::Bar;
use crate::settings::Settings;
use pictures::pictures;
use structures::structures;
use tables::{overview, task_section};

/// Characters of a text that a checkpoint is fine-tuned on.
const FINETUNE_CHARACTERS: usize = 60_000;

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

/// A trained network. Without a text it is evaluated on the experiment's only task.
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
    let (experiment, cells) = (&config.experiment, &settings.cells);
    let (rows, pictures) = match &config.checkpoint {
        Some(checkpoint) => {
            let trained = Lazy::default();
            let trained = || trained.get(|| open(checkpoint, experiment));
            let name = file_name(&checkpoint.weights);
            let rows = cells.get(&name, || {
                let Trained {
                    rnn,
                    data,
                    training,
                    ..
                } = trained()?;
                anyhow::Ok(experiment::run_model(
                    &name, rnn, data, experiment, training, &bar,
                )?)
            })?;
            let pictures = settings.whole("pictures", || pictures(trained()?, &name))?;
            (rows, pictures)
        }
        None => {
            let rows = networks(settings, experiment, &bar)?;
            let (task, cell) = experiment
                .tasks
                .first()
                .zip(experiment.cells.first())
                .context("--task and --cell name nothing to run")?;
            let seed = experiment.seeds.first().copied().unwrap_or_default();
            let pictures = settings.whole("pictures", || {
                let trained = experiment::train_dense(experiment, task, *cell, seed, &bar)?;
                pictures(&trained, &task.to_string())
            })?;
            (Some(rows), pictures)
        }
    };
    let structures = config
        .structures
        .map(|n| settings.whole("structures", || Ok(vec![structures(experiment, n, &bar)?])));
    let structures = structures.transpose()?;
    bar.finish();
    let (false, Some(rows)) = (settings.is_part(), rows) else {
        return Ok(Vec::new());
    };
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
    sections.extend(structures.into_iter().flatten());
    sections.extend(pictures);
    Ok(sections)
}

/// The rows of all networks; those that are kept in a folder are trained one after the other.
fn networks(
    settings: &Settings,
    config: &ExperimentConfig,
    bar: &Bar,
) -> Result<Vec<experiment::Row>> {
    if !settings.cells.are_kept() {
        return Ok(experiment::run(config, bar)?);
    }
    let mut rows = Vec::new();
    for task in &config.tasks {
        for &cell in &config.cells {
            for &seed in &config.seeds {
                let mut one = config.clone();
                one.tasks = vec![task.clone()];
                one.cells = vec![cell];
                one.seeds = vec![seed];
                let name = format!("{task}, {cell}, seed {seed}");
                let of_network = settings
                    .cells
                    .get(&name, || anyhow::Ok(experiment::run(&one, bar)?))?;
                rows.extend(of_network.into_iter().flatten());
            }
        }
    }
    Ok(rows)
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
            bail!("--weights: a network from a file is evaluated on one --task");
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
