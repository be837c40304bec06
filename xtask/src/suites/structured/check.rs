//! What is known before anything is computed: values out of range, ratios out of reach, flags that nothing reads, and paths
//! that are taken.

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use causal_lm::Decoder;
use eval_report::DENSE;
use lowrank_eora::compress::Needs;
use prune_structured::experts::{ExpertRecipe, ExpertSettings};
use prune_structured::{Allocation, Compensation, Error, Form, Recipe, Score, rate_distortion};
use tensor_io::PendingFile;

use super::config::{CALIBRATION, Config, ExpertMethods, Export};
use super::experts::{aims, label, planned};
use super::search::searches;
use crate::settings::{Settings, once, spares};
use crate::suites::perplexity;

/// What the flags alone tell.
pub(super) fn settings(config: &Config) -> Result<()> {
    perplexity::ensure_unseen(&config.calib, &config.perplexity.text)?;
    once("--method", config.recipes.iter().map(|recipe| &recipe.name))?;
    once(
        "--method",
        config.experts.recipes.iter().map(|recipe| &recipe.name),
    )?;
    once("--ratio", config.ratios.iter())?;
    ensure!(
        !config.dry_run || config.save.is_none(),
        "--save: --dry-run writes no checkpoint; leave one of the two out"
    );
    ensure!(
        !config.write.overwrite || config.save.is_some() || config.save_plans.is_some(),
        "--overwrite: neither --save nor --save-plans is there to be replaced"
    );
    Ok(())
}

/// What the shapes of the model tell.
pub(super) fn model(settings: &Settings, config: &Config, decoder: &Decoder<'_>) -> Result<()> {
    let is_mixture = decoder.config().mixtures.iter().any(Option::is_some);
    let model = config.perplexity.model.display();
    applied(config, is_mixture)?;
    if is_mixture {
        let own = decoder.config().refuse_expert_map("eval structured");
        own.with_context(|| format!("--model {model}"))?;
        let experts = &config.experts;
        ensure!(
            !experts.recipes.is_empty() || !experts.compressors.is_empty(),
            "{model}: none of the methods asked for prunes a mixture of experts; those that do are {}",
            ExpertRecipe::names().collect::<Vec<_>>().join(", ")
        );
        ensure!(
            config.form == Form::Sliced,
            "--masked: a zeroed expert still takes the place and the gate of another, so that zeroing is not dropping"
        );
        ensure!(
            config.calib_shard.is_none(),
            "--calib-shard: the statistics of mixtures are not computed in parts"
        );
    } else {
        ensure!(
            !config.recipes.is_empty(),
            "{model}: none of the methods asked for prunes a dense model; those that do are {}",
            Recipe::NAMES.join(", ")
        );
    }
    read_by_any(config, decoder, is_mixture)?;
    for recipe in config.recipes.iter().filter(|_| !is_mixture) {
        for &ratio in &config.ratios {
            asked_of(config, recipe, decoder, ratio)?;
        }
    }
    for recipe in config.experts.recipes.iter().filter(|_| is_mixture) {
        for aim in aims(config, decoder, recipe) {
            let fits = recipe.check(decoder, aim);
            fits.map_err(|error| by_flag(error, &recipe.name))?;
        }
    }
    let keeps = |recipe: &&ExpertRecipe| recipe.keeps_rows();
    let keeps = config.experts.recipes.iter().find(keeps);
    if let Some(recipe) = keeps.filter(|_| is_mixture && !config.exports.is_empty()) {
        bail!(
            "--export: {} keeps router rows of experts that are gone, which no export's format has",
            recipe.name
        );
    }
    if is_mixture {
        compressed(config, decoder)?;
    }
    for export in &config.exports {
        let fits = export.check(decoder, &decoder.config().widths);
        fits.context("--export")?;
    }
    match is_mixture {
        true => paths_of_experts(settings, config, decoder),
        false => paths(settings, config),
    }
}

/// What cannot be done to experts that are compressed or stored in another way, or stored at all.
fn compressed(config: &Config, decoder: &Decoder<'_>) -> Result<()> {
    let experts = &config.experts;
    let mut in_memory = experts.recipes.iter().filter(|r| r.term_rank().is_some());
    if let Some(recipe) = in_memory.next() {
        for (flag, is_asked) in [
            ("--save", config.save.is_some()),
            ("--save-plans", config.save_plans.is_some()),
        ] {
            ensure!(
                !is_asked,
                "{flag}: {} adds a linear term to the output of each layer's experts, which no stock format has a place for; it is \
                 measured in memory: leave one of the two out",
                recipe.name
            );
        }
    }
    let settings = ExpertSettings::default().layout(experts.layout);
    settings.check(decoder).context("--layout")?;
    for (flag, compressors) in [
        ("--quantise", &experts.compressors),
        ("--then", &experts.then),
    ] {
        for &compressor in compressors {
            let fits = experts.repair(compressor).check(decoder);
            fits.with_context(|| format!("{flag} {}", label(compressor)))?;
        }
    }
    Ok(())
}

/// Everything that was asked for by name applies to this kind of model.
fn applied(config: &Config, is_mixture: bool) -> Result<()> {
    let (kind, known): (_, Vec<&str>) = match is_mixture {
        true => ("mixture of experts", ExpertRecipe::names().collect()),
        false => ("dense model", Recipe::NAMES.to_vec()),
    };
    let experts = config.experts.recipes.iter();
    let made: Vec<&str> = match is_mixture {
        true => experts.clone().map(|r| r.name.as_str()).collect(),
        false => config.recipes.iter().map(|r| r.name.as_str()).collect(),
    };
    // Variants are called METHOD+COMPENSATION.
    let is_of = |name: &str, method: &str| {
        let variant = name.strip_prefix(method);
        variant.is_some_and(|rest| rest.is_empty() || rest.starts_with('+'))
    };
    let model = config.perplexity.model.display();
    for method in &config.named.methods {
        ensure!(
            known.contains(&method.as_str()),
            "--method {method}: it does not prune a {kind}, which {model} is; those that do are {}",
            known.join(", ")
        );
        ensure!(
            made.iter().any(|name| is_of(name, method)),
            "--compensate {}: nothing that {method} can do for a {kind}",
            config.named.compensations.join(", ")
        );
    }
    // A method that drops experts compensates for nothing by itself.
    let plain = is_mixture && experts.clone().any(ExpertRecipe::drops);
    let compensations = &config.named.compensations;
    for compensation in compensations {
        let is_made = match (compensations.len(), compensation.as_str()) {
            (1, _) | (_, "auto") => !made.is_empty(),
            (_, "none") if plain => true,
            _ => made
                .iter()
                .any(|name| name.split('+').any(|part| part == compensation)),
        };
        ensure!(
            is_made,
            "--compensate {compensation}: nothing that the methods can do for a {kind}, which {model} is"
        );
    }
    Ok(())
}

/// What a method cannot do to this model.
fn asked_of(config: &Config, recipe: &Recipe, decoder: &Decoder<'_>, ratio: f64) -> Result<()> {
    let blame = |error| by_flag(error, &recipe.name);
    recipe.check(decoder, ratio).map_err(blame)?;
    if searches(recipe) {
        let options = &config.search.options;
        options.check(decoder, recipe).map_err(blame)?;
        if let Some(start) = config.search.start_of(recipe) {
            start.check(decoder, ratio).map_err(blame)?;
        }
    }
    match config.search.measures_for(recipe) {
        Some(measured) => {
            rate_distortion::check(decoder, &measured).map_err(blame)?;
            config.search.measure().check().map_err(blame)
        }
        None => Ok(()),
    }
}

/// An error with the flag to blame for it.
fn by_flag(error: Error, method: &str) -> anyhow::Error {
    let flag = match &error {
        Error::Option { option, .. }
        | Error::Width { option, .. }
        | Error::Search { option, .. } => match *option {
            "temperature" => "--temperature",
            "max_ratio" => "--max-ratio",
            "ridge" => "--ridge",
            "min_neurons" => "--min-neurons",
            "min_attention" => "--min-attention",
            "align_neurons" | "align_experts" => "--align",
            "prior" => "--expert-prior",
            "rank" => "--topk-rank",
            "compensation" => "--compensate",
            "uniform" => "--uniform",
            "iterations" => "--iterations",
            "generations" => "--generations",
            "offspring" => "--offspring",
            "top_k" => "--top-k",
            "stages" | "survivors" => "--stages",
            _ => "--method",
        },
        Error::Ratio(_)
        | Error::Unreachable { .. }
        | Error::Uniform { .. }
        | Error::Experts { .. } => "--ratio",
        Error::NotUniform { .. } => "--uniform",
        Error::Attention { .. } => "--attention-unit",
        _ => "--method",
    };
    anyhow::Error::new(error).context(format!("{flag}: {method}"))
}

/// Every flag that was given is one that some method reads.
fn read_by_any(config: &Config, decoder: &Decoder<'_>, is_mixture: bool) -> Result<()> {
    for &flag in &config.asked {
        let read = match is_mixture {
            true => config
                .experts
                .recipes
                .iter()
                .any(|recipe| reads_of_mixtures(flag, recipe)),
            false => config
                .recipes
                .iter()
                .any(|recipe| reads(config, decoder, flag, recipe)),
        };
        if read || is_mixture && read_by_compressors(flag, &config.experts) {
            continue;
        }
        if !is_mixture && is_of_mixtures(flag) {
            let instead = match flag {
                "--quantise" | "--then" | "--owl" => {
                    "quantise dense models by eval lowrank or eval chain"
                }
                _ => "leave it out",
            };
            bail!(
                "{flag}: {} is no mixture of experts; {instead}",
                config.perplexity.model.display()
            );
        }
        let experts = &config.experts;
        let names: Vec<String> = match is_mixture {
            true => {
                let compressors = experts.compressors.iter().chain(&experts.then);
                let compressors = compressors.map(|&compressor| label(compressor));
                let recipes = experts.recipes.iter().map(|recipe| recipe.name.clone());
                recipes.chain(compressors).collect()
            }
            false => config
                .recipes
                .iter()
                .map(|recipe| recipe.name.clone())
                .collect(),
        };
        let or = match flag {
            "--ridge" => ", or ask for --compensate least-squares",
            _ => "",
        };
        bail!(
            "{flag}: changes nothing for {}; leave it out{or}",
            names.join(", ")
        );
    }
    Ok(())
}

/// Whether a method for dense models reads a flag.
fn reads(config: &Config, decoder: &Decoder<'_>, flag: &str, recipe: &Recipe) -> bool {
    let searches = searches(recipe);
    match flag {
        "--temperature" => matches!(recipe.allocation, Allocation::Softmax(_)),
        "--max-ratio" => matches!(
            recipe.allocation,
            Allocation::Softmax(_) | Allocation::ClosedForm(_)
        ),
        // What suits the architecture has a damping of its own.
        "--ridge" => recipe
            .compensation
            .is_some_and(|compensation| compensation.refits()),
        "--seeds" => searches || matches!(recipe.score, Score::Random(_)),
        "--rounds" => matches!(recipe.compensation(decoder), Compensation::Alternating(_)),
        "--search-samples" | "--top-k" => searches || config.search.measures_for(recipe).is_some(),
        "--distortion" | "--convex" => {
            let start = config.search.start_of(recipe).filter(|_| searches);
            let allocation = start.map_or(recipe.allocation, |start| start.allocation);
            matches!(allocation, Allocation::RdDp(_))
        }
        "--search-size" | "--iterations" | "--generations" | "--offspring" | "--stages"
        | "--accumulation" | "--settle" | "--elimination" | "--search-start" | "--resume" => {
            searches
        }
        _ => !is_of_mixtures(flag),
    }
}

/// Whether a flag says something of experts.
fn is_of_mixtures(flag: &str) -> bool {
    matches!(
        flag,
        "--quantise"
            | "--then"
            | "--owl"
            | "--progressive"
            | "--reconstruct"
            | "--topk-rank"
            | "--layout"
            | "--pool-tokens"
            | "--expert-prior"
            | "--no-gate-weight"
    )
}

/// Whether compressing experts reads a flag.
fn read_by_compressors(flag: &str, experts: &ExpertMethods) -> bool {
    let is_left = experts.recipes.iter().any(|recipe| !recipe.is_fewer());
    let then = experts.then.iter().filter(|_| is_left);
    let mut compressors = experts.compressors.iter().chain(then);
    match flag {
        "--owl" => compressors.next().is_some(),
        "--pool-tokens" | "--expert-prior" | "--no-gate-weight" => {
            compressors.any(|(compressor, rank)| *rank > 0 || compressor.needs() > Needs::Nothing)
        }
        _ => false,
    }
}

/// Whether a method for mixtures reads a flag.
fn reads_of_mixtures(flag: &str, recipe: &ExpertRecipe) -> bool {
    match flag {
        "--ridge" | "--align" | "--score" => !recipe.drops() && !recipe.is_fewer(),
        "--then" => !recipe.is_fewer(),
        "--seeds" => recipe.draws(),
        "--progressive" => recipe.reads_layers(),
        "--reconstruct" => recipe.reconstructs(),
        "--topk-rank" => recipe.term_rank().is_some(),
        "--pool-tokens" | "--expert-prior" | "--no-gate-weight" => {
            recipe.narrows() && recipe.neurons.reads_tokens()
        }
        "--search-samples" | "--quantise" | "--layout" => true,
        _ => false,
    }
}

/// Nothing is in the way of what this process writes of a dense model.
fn paths(settings: &Settings, config: &Config) -> Result<()> {
    if config.calib_shard.is_some() {
        return Ok(());
    }
    // In the order in which the run asks for cells.
    let mut names = vec![CALIBRATION.to_owned()];
    names.extend((!config.dry_run).then(|| DENSE.to_owned()));
    let first = names.len();
    let cells: Vec<(&Recipe, f64)> = (config.recipes.iter())
        .flat_map(|recipe| config.ratios.iter().map(move |&ratio| (recipe, ratio)))
        .collect();
    names.extend(
        cells
            .iter()
            .map(|&(recipe, ratio)| Config::cell(recipe, ratio)),
    );
    let ours = settings.cells.ours(&names);
    for &(recipe, ratio) in &cells {
        for draw in config.draws(recipe) {
            let cell = Config::cell(recipe, ratio);
            let folder = config.saved(&draw, ratio);
            written(
                settings,
                config,
                &cell,
                (folder.as_deref(), &draw.name(ratio)),
            )?;
        }
    }
    for (&(recipe, ratio), _) in cells.iter().zip(&ours[first..]).filter(|(_, ours)| **ours) {
        for draw in config.draws(recipe) {
            if let Some(folder) = config.saved(&draw, ratio) {
                checkpoint(config, &folder)?;
            }
            plan(config, &draw.name(ratio))?;
        }
    }
    if let Some(resume) = &config.search.resume {
        std::fs::create_dir_all(resume)
            .with_context(|| format!("--resume {}", resume.display()))?;
    }
    Ok(())
}

/// The same for a mixture.
fn paths_of_experts(settings: &Settings, config: &Config, decoder: &Decoder<'_>) -> Result<()> {
    let cells = planned(settings, config, decoder);
    let mut asked: Vec<String> = Vec::new();
    asked.extend((!config.dry_run).then(|| DENSE.to_owned()));
    let first = asked.len();
    asked.extend(cells.iter().map(|cell| cell.name.clone()));
    let ours = settings.cells.ours(&asked);
    for cell in &cells {
        for folder in &cell.checkpoints {
            settings.written(&cell.name, "--save", folder)?;
        }
        for path in cell.plans.iter().filter_map(|name| config.saved_plan(name)) {
            settings.written(&cell.name, "--save-plans", &path)?;
        }
    }
    for (cell, _) in cells.iter().zip(&ours[first..]).filter(|(_, ours)| **ours) {
        for folder in &cell.checkpoints {
            checkpoint(config, folder)?;
        }
        for name in &cell.plans {
            plan(config, name)?;
        }
    }
    Ok(())
}

/// What an earlier run has written of a cell that it finished is there.
fn written(
    settings: &Settings,
    config: &Config,
    cell: &str,
    (folder, plan): (Option<&Path>, &str),
) -> Result<()> {
    if let Some(folder) = folder {
        settings.written(cell, "--save", folder)?;
    }
    match config.saved_plan(plan) {
        Some(path) => settings.written(cell, "--save-plans", &path),
        None => Ok(()),
    }
}

fn checkpoint(config: &Config, folder: &Path) -> Result<()> {
    let exports = config.exports.iter().filter_map(Export::folder);
    let folders = exports.map(|name| folder.join(name));
    for folder in [folder.to_owned()].into_iter().chain(folders) {
        spares("--save", &folder, &[("--model", &config.perplexity.model)])?;
    }
    let flag = match config.write.overwrite {
        true => "--save",
        false => "--save without --overwrite",
    };
    config.write.check(folder).context(flag)
}

fn plan(config: &Config, name: &str) -> Result<()> {
    let Some(path) = config.saved_plan(name) else {
        return Ok(());
    };
    ensure!(
        config.write.overwrite || !path.exists(),
        "--save-plans without --overwrite: {} exists already",
        path.display()
    );
    if let Some(folder) = path.parent() {
        let made = std::fs::create_dir_all(folder);
        made.with_context(|| format!("--save-plans {}", folder.display()))?;
    }
    // Dropped, it leaves nothing.
    PendingFile::create(&path).map(drop).context("--save-plans")
}
