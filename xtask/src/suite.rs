//! The suites, and which function runs which.

use std::path::{Path, PathBuf};

use anyhow::Result;
use eval_report::Section;

use crate::model::naming;
use crate::settings::Settings;
use crate::suites::{chain, frontier, kv, lattice, lowrank, perplexity, structured, tasks};

/// A suite with its own settings.
#[derive(Debug)]
pub enum Suite {
    /// Perplexity of a checkpoint.
    Perplexity {
        /// Model, text and protocol.
        config: perplexity::Config,
        /// Whether to measure the hidden states too.
        hidden_metrics: bool,
    },
    /// Structured pruning.
    Structured(Box<structured::Config>),
    /// Low-rank repair.
    Lowrank(Box<lowrank::Config>),
    /// One memory budget over all axes.
    Frontier(Box<frontier::Config>),
    /// Pruning of recurrent networks by order.
    Lattice(Box<lattice::Config>),
    /// KV-cache eviction.
    Kv(kv::Config),
    /// Multiple choice and generation.
    Tasks(tasks::Config),
    /// The methods on top of one another.
    Chain(chain::Config),
}

impl Suite {
    /// Measure.
    ///
    /// # Errors
    /// What the suite reports, naming the file, tensor or flag.
    pub fn run(&self, settings: &Settings) -> Result<Vec<Section>> {
        let sections = match self {
            Suite::Perplexity {
                config,
                hidden_metrics,
            } => perplexity::run(settings, config, *hidden_metrics),
            Suite::Structured(config) => structured::run(settings, config),
            Suite::Lowrank(config) => lowrank::run(settings, config),
            // What it has measured is kept in a folder of its own.
            Suite::Frontier(config) => saved(settings, "frontier", config.save.as_deref())
                .and_then(|()| settings.whole("frontier", || frontier::run(settings, config))),
            Suite::Lattice(config) => lattice::run(settings, config),
            Suite::Kv(config) => kv::run(settings, config),
            Suite::Tasks(config) => tasks::run(settings, config),
            Suite::Chain(config) => saved(settings, "rows", config.save.as_deref())
                .and_then(|()| settings.whole("rows", || chain::run(settings, config))),
        };
        sections.map_err(|error| match self.model() {
            Some(model) => naming(error, model),
            None => error,
        })
    }

    /// The model that is run, where it is one.
    fn model(&self) -> Option<&Path> {
        match self {
            Suite::Perplexity { config, .. } => Some(&config.model),
            Suite::Structured(config) => Some(&config.perplexity.model),
            Suite::Lowrank(config) => Some(&config.perplexity.model),
            Suite::Frontier(config) => Some(&config.perplexity.model),
            Suite::Chain(config) => Some(&config.perplexity.model),
            Suite::Lattice(_) | Suite::Kv(_) | Suite::Tasks(_) => None,
        }
    }

    /// Whether it computes statistics for other processes, and no rows.
    pub(crate) fn only_calibrates(&self) -> bool {
        matches!(self, Suite::Structured(config) if config.calib_shard.is_some())
    }

    /// The models it reads, which may be names on a hub.
    pub fn models(&mut self) -> Vec<&mut PathBuf> {
        match self {
            Suite::Perplexity { config, .. } => vec![&mut config.model],
            Suite::Structured(config) => vec![&mut config.perplexity.model],
            Suite::Lowrank(config) => config.models(),
            Suite::Frontier(config) => vec![&mut config.perplexity.model],
            Suite::Lattice(_) => Vec::new(),
            Suite::Kv(config) => config.models(),
            Suite::Tasks(config) => config.models.iter_mut().collect(),
            Suite::Chain(config) => vec![&mut config.perplexity.model],
        }
    }
}

/// What a finished cell has saved is there.
fn saved(settings: &Settings, cell: &str, save: Option<&Path>) -> Result<()> {
    match save {
        Some(save) => settings.written(cell, "--save", save),
        None => Ok(()),
    }
}
