//! The cells of a run on a mixture, and where what they make is saved.

use std::path::PathBuf;

use causal_lm::Decoder;
use lowrank_eora::compress::Compressor;
use prune_structured::experts::{Aim, ExpertRecipe};

use super::super::config::Config;
use super::table::cell_name;
use crate::settings::Settings;

/// A compressor as `--quantise` names it.
pub(in super::super) fn label((compressor, rank): (Compressor, usize)) -> String {
    match rank {
        0 => compressor.to_string(),
        rank => format!("{compressor}+eora-{rank}"),
    }
}

/// What a recipe is asked for: every ratio, or every smaller number of experts for a token.
pub(in super::super) fn aims(
    config: &Config,
    decoder: &Decoder<'_>,
    recipe: &ExpertRecipe,
) -> Vec<Aim> {
    let mixtures = decoder.config().mixtures.iter().flatten();
    let chosen = mixtures.map(|mixture| mixture.chosen).min().unwrap_or(0);
    match recipe.is_fewer() {
        true => (1..chosen).rev().map(Aim::Chosen).collect(),
        false => config.ratios.iter().copied().map(Aim::Ratio).collect(),
    }
}

/// The seeds of a recipe's runs; none where it draws nothing.
pub(super) fn seeds(
    settings: &Settings,
    config: &Config,
    recipe: &ExpertRecipe,
) -> Vec<Option<u64>> {
    let first = settings.seed;
    match recipe.draws() {
        true => (first..first + config.seeds).map(Some).collect(),
        false => vec![None],
    }
}

/// Where the checkpoint of a cell is saved: `--save` itself for a single one, a folder of its own in it for each of several.
pub(super) fn saved(config: &Config, decoder: &Decoder<'_>, cell: &str) -> Option<PathBuf> {
    let save = config.save.as_ref()?;
    let methods = &config.experts;
    let checkpoints = |recipe: &ExpertRecipe| {
        let draws = if recipe.draws() {
            config.seeds as usize
        } else {
            1
        };
        draws * aims(config, decoder, recipe).len()
    };
    let made: usize = methods.recipes.iter().map(checkpoints).sum();
    Some(
        match made + methods.compressors.len() == 1 && methods.then.is_empty() {
            true => save.clone(),
            false => save.join(cell),
        },
    )
}

/// Where the checkpoint of a compressor is saved.
pub(super) fn beside(config: &Config, name: &str) -> Option<PathBuf> {
    Some(config.save.as_ref()?.join(name))
}

/// A cell of a run, and what is written of it.
pub(in super::super) struct Planned {
    /// Its name.
    pub(in super::super) name: String,
    /// Where checkpoints are saved.
    pub(in super::super) checkpoints: Vec<PathBuf>,
    /// What plans are called.
    pub(in super::super) plans: Vec<String>,
}

/// The cells of a run behind that of the dense model, in their order.
pub(in super::super) fn planned(
    settings: &Settings,
    config: &Config,
    decoder: &Decoder<'_>,
) -> Vec<Planned> {
    let methods = &config.experts;
    let mut cells = Vec::new();
    for recipe in &methods.recipes {
        for aim in aims(config, decoder, recipe) {
            let seeds = seeds(settings, config, recipe).into_iter();
            let plans: Vec<String> = seeds.map(|seed| cell_name(recipe, seed, aim)).collect();
            let mut checkpoints = Vec::new();
            for plan in &plans {
                checkpoints.extend(saved(config, decoder, plan));
                let then = methods.then.iter().filter(|_| !recipe.is_fewer());
                for &then in then {
                    checkpoints.extend(beside(config, &format!("{plan}+{}", label(then))));
                }
            }
            cells.push(Planned {
                name: cell_name(recipe, None, aim),
                checkpoints,
                plans,
            });
        }
    }
    for &compressor in methods.compressors.iter().filter(|_| !config.dry_run) {
        let name = label(compressor);
        cells.push(Planned {
            checkpoints: beside(config, &name).into_iter().collect(),
            plans: Vec::new(),
            name,
        });
    }
    cells
}
