//! Pruning of recurrent networks: which method, which repair, and what it costs.

mod checkpoint;
mod pictures;
mod save;
mod structures;
mod tables;

use anyhow::{Context, Error, Result};
use eval_report::Section;
use prune_lattice::experiment::{self, ExperimentConfig};
use prune_lattice::prune::Method;

use super::lazy::Lazy;
use super::perplexity::file_name;
use crate::bar::Bar;
use crate::settings::{Settings, one_line, part};
pub use checkpoint::{Characters, CheckpointConfig, SaveConfig};
use pictures::pictures;
use save::Saver;
use structures::structures;
use tables::{overview, task_section};

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

/// Train, prune by every method, evaluate at once and after fine-tuning.
///
/// # Errors
/// Files that cannot be used, settings out of range, a diverging run.
pub fn run(settings: &Settings, config: &Config) -> Result<Vec<Section>> {
    let bar = settings.bar("pruning", 1);
    let (experiment, cells) = (&config.experiment, &settings.cells);
    let mut failures = Vec::new();
    let (rows, pictures) = match &config.checkpoint {
        Some(checkpoint) => {
            let opened = Lazy::default();
            let opened = || opened.get(|| checkpoint::open(checkpoint, experiment));
            let name = file_name(&checkpoint.weights);
            let rows = cells.get(&name, || {
                let opened = opened()?;
                let saver = match &checkpoint.save {
                    Some(save) => Some(Saver::new(save, opened, experiment)?),
                    None => None,
                };
                let visit = |network: &experiment::PrunedNetwork<'_>| match &saver {
                    Some(saver) => saver.save(network),
                    None => Ok(()),
                };
                let rows = opened.run(&name, checkpoint, experiment, &visit, &bar)?;
                saver.map_or(Ok(()), Saver::finish)?;
                anyhow::Ok(rows)
            })?;
            let pictures = settings.whole("pictures", || pictures(&opened()?.trained, &name))?;
            (rows, pictures)
        }
        None => {
            settings.expect("lattice", || Ok(experiment::expected_seconds(experiment)?));
            let rows = networks(settings, experiment, &mut failures, &bar)?;
            let (task, cell) = experiment
                .tasks
                .first()
                .zip(experiment.cells.first())
                .context("--task and --cell name nothing to run")?;
            let seed = experiment.seeds.first().copied().unwrap_or_default();
            let first = experiment::network_name(task, *cell, seed);
            let failed = failures.iter().any(|(name, _)| *name == first);
            let pictures = settings.whole("pictures", || {
                let trained = experiment::train_dense(experiment, task, *cell, seed, &bar)?;
                pictures(&trained, &task.to_string())
            });
            let pictures = match pictures {
                // What it failed for has been said.
                Err(_) if failed => Vec::new(),
                pictures => pictures?,
            };
            (Some(rows), pictures)
        }
    };
    let structures = config
        .structures
        .map(|n| settings.whole("structures", || structures(experiment, n, &bar)));
    let structures = structures.transpose()?;
    bar.finish();
    let failures = failures.into_iter();
    let failures = failures.map(|(name, error)| format!("{name}: {}", one_line(&error)));
    let failures: Vec<String> = failures.collect();
    let (false, Some(rows)) = (settings.is_part(), rows) else {
        return Ok(part(failures));
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
    let mut first = overview(&rows, &sections, config);
    first.failures = failures;
    sections.insert(0, first);
    sections.extend(structures.into_iter().flatten());
    sections.extend(pictures);
    Ok(sections)
}

/// The rows of all networks; those that are kept in a folder are trained one after the other. Networks that failed go to
/// `failures` with their names.
///
/// # Errors
/// The first failure, where no network has rows.
fn networks(
    settings: &Settings,
    config: &ExperimentConfig,
    failures: &mut Vec<(String, Error)>,
    bar: &Bar,
) -> Result<Vec<experiment::Row>> {
    let mut rows = Vec::new();
    let mut add = |name: String, of_network: Result<Option<Vec<experiment::Row>>>| match of_network
    {
        Ok(of_network) => rows.extend(of_network.into_iter().flatten()),
        Err(error) => failures.push((name, error)),
    };
    if !settings.cells.are_kept() {
        for network in experiment::run_each(config, bar) {
            add(network.name, network.rows.map(Some).map_err(Error::new));
        }
    } else {
        for task in &config.tasks {
            for &cell in &config.cells {
                for &seed in &config.seeds {
                    let mut one = config.clone();
                    one.tasks = vec![task.clone()];
                    one.cells = vec![cell];
                    one.seeds = vec![seed];
                    let name = experiment::network_name(task, cell, seed);
                    let kept = &settings.cells;
                    let found = kept.get(&name, || anyhow::Ok(experiment::run(&one, bar)?));
                    add(name, found);
                }
            }
        }
    }
    match rows.is_empty() && !failures.is_empty() {
        true => Err(failures.swap_remove(0).1),
        false => Ok(rows),
    }
}
