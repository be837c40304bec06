//! Structured pruning: quality, size and speed by method and ratio.

pub mod experts;
mod parts;
pub mod search;
mod table;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use causal_lm::{Arithmetic, BATCH_TOKENS, Decoder, Hidden, NoTap, Windows};
use eval_report::cells::Shard;
use eval_report::{DENSE, ROUNDS, Rounds, Row, Section, Stopwatch, format, mean_over_seeds};
use lm_eval::ScoredWindows;
use prune_structured::gguf::{self, ExportOptions, Precision};
use prune_structured::output::Refits;
use prune_structured::rate_distortion::Measure;
use prune_structured::score::Random;
use prune_structured::stats::Needs;
use prune_structured::{
    Allocation, Calibration, Collect, Compensation, Cost, Form, Loading, Plan, Recipe, Score,
    nemotron, structprune,
};
use serde_json::json;
use tensor_io::{Checkpoint, WriteOptions};

use self::search::Curves;
use self::table::{compare_with_dense, is_control, layers, section};
use super::lazy::Lazy;
use super::perplexity::{self, Protocol, file_name, tokens};
use crate::bar::Bar;
use crate::estimate::Probe;
use crate::model::naming;
use crate::scratch::Scratch;
use crate::settings::{Settings, part};

/// What to prune and measure.
#[derive(Debug, Clone)]
pub struct Config {
    /// Model, text and protocol of the evaluation.
    pub perplexity: perplexity::Config,
    /// Text to calibrate on.
    pub calib: PathBuf,
    /// Windows to calibrate on.
    pub calib_samples: usize,
    /// The part of the statistics that this process computes, and nothing else.
    pub calib_shard: Option<Shard>,
    /// Methods for dense models, each in its own variants.
    pub recipes: Vec<Recipe>,
    /// Methods for mixtures of experts.
    pub experts: experts::Methods,
    /// Shares of the prunable parameters to remove, each at least 0 and below 1.
    pub ratios: Vec<f64>,
    /// Folder for the compressed checkpoints.
    pub save: Option<PathBuf>,
    /// Shapes to write.
    pub form: Form,
    /// How checkpoints are written.
    pub write: WriteOptions,
    /// What each saved checkpoint is exported as.
    pub exports: Vec<Export>,
    /// Folder for the plans.
    pub save_plans: Option<PathBuf>,
    /// Whether to stop at the plans.
    pub dry_run: bool,
    /// How widths are searched.
    pub search: search::Config,
    /// Runs of whatever draws or searches, each with a seed of its own.
    pub seeds: u64,
}

impl Config {
    /// No methods and no ratios, all else by default; `seed` is that of searches.
    pub fn new(perplexity: perplexity::Config, calib: PathBuf, seed: u64) -> Self {
        Self {
            perplexity,
            calib,
            calib_samples: 128,
            calib_shard: None,
            recipes: Vec::new(),
            experts: experts::Methods::default(),
            ratios: Vec::new(),
            save: None,
            form: Form::Sliced,
            write: WriteOptions::default(),
            exports: Vec::new(),
            save_plans: None,
            dry_run: false,
            search: search::Config::new(seed),
            seeds: 3,
        }
    }
}

/// Tokens of the texts of a run.
pub(crate) struct Counts {
    pub(crate) evaluation: usize,
    pub(crate) calibration: usize,
    /// Of those that whole models are compared on.
    pub(crate) compared: usize,
}

impl Config {
    /// About how long the run takes.
    pub(crate) fn seconds(&self, probe: &Probe, counts: &Counts, is_mixture: bool) -> f64 {
        if is_mixture {
            return self.seconds_of_experts(probe, counts);
        }
        let refits = |recipe: &Recipe| recipe.compensation.is_none_or(|c| c.refits());
        let grams = match self.recipes.iter().any(refits) {
            true => probe.grams(counts.calibration, false) + probe.solves(),
            false => 0.0,
        };
        let beside = 2 * ROUNDS * BATCH_TOKENS.min(counts.evaluation);
        // Writing, evaluating, and running beside the dense model.
        let cell = match self.dry_run {
            true => 0.0,
            false => probe.copy() + probe.pass(counts.evaluation) + probe.pass(beside),
        };
        let draws = |recipe: &Recipe| match (recipe.score, recipe.allocation) {
            (Score::Random(_), _) | (_, Allocation::Searched(_)) => self.seeds as f64,
            _ => 1.0,
        };
        let ratios = self.ratios.len() as f64;
        let of_recipe = |recipe: &Recipe| {
            let search = self.search.options.candidate_tokens();
            let planning = match recipe.allocation {
                Allocation::Searched(_) => draws(recipe) * ratios * probe.pass(search),
                _ => 0.0,
            };
            // Curves are measured once; candidates that prune one sublayer run from there on, half of the model.
            let curves = match self.search.measures_for(recipe) {
                Some(_) => {
                    probe.pass(probe.sublayers() * Measure::default().points * counts.compared / 2)
                }
                None => 0.0,
            };
            curves + planning + draws(recipe) * ratios * cell
        };
        probe.pass(counts.calibration)
            + grams
            + cell
            + self.recipes.iter().map(of_recipe).sum::<f64>()
    }

    fn seconds_of_experts(&self, probe: &Probe, counts: &Counts) -> f64 {
        let experts = &self.experts;
        let dropped = experts.recipes.len() * self.ratios.len() * (1 + experts.then.len());
        let rows = 1 + dropped + experts.compressors.len();
        let row = probe.copy() + probe.pass(counts.evaluation) + probe.pass(counts.calibration);
        rows as f64 * row
    }
}

/// Another format for a compressed checkpoint.
#[derive(Debug, Clone, Copy)]
pub enum Export {
    /// A GGUF file for llama.cpp.
    Gguf(Precision),
    /// A folder with block configs, for vLLM.
    NemotronNas,
}

/// Prune at every method and ratio and measure each.
///
/// # Errors
/// A model or text that cannot be read or run.
pub fn run(settings: &Settings, config: &Config) -> Result<Vec<Section>> {
    perplexity::ensure_unseen(&config.calib, &config.perplexity.text)?;
    let checkpoint = causal_lm::open(&config.perplexity.model)?;
    let decoder = perplexity::open(settings, &checkpoint)?;
    let is_mixture = decoder.config().mixtures.iter().any(Option::is_some);
    anyhow::ensure!(
        is_mixture || !config.recipes.is_empty(),
        "{}: none of the methods asked for prunes a dense model; those that do are {}",
        config.perplexity.model.display(),
        Recipe::NAMES.join(", ")
    );
    for recipe in config.recipes.iter().filter(|_| !is_mixture) {
        if matches!(recipe.allocation, Allocation::Searched(_)) {
            let options = &config.search.options;
            options
                .check(&decoder, recipe)
                .with_context(|| recipe.name.clone())?;
        }
    }
    let protocol = Protocol::new(settings, &config.perplexity, &decoder)?;
    let evaluation = protocol.evaluation(settings, &config.perplexity.text)?;
    let text = protocol.calibration(&config.calib)?;
    let calibration = text.sample(config.calib_samples, settings.seed);
    let compared = text.sample(config.search.compared(&config.recipes), settings.seed);

    // Dense models of any size are pruned, so scratch space is on disk, not in memory.
    let scratch = Scratch::new()?;
    let counts = Counts {
        evaluation: tokens(evaluation.inputs()),
        calibration: tokens(&calibration),
        compared: tokens(&compared),
    };
    anyhow::ensure!(
        !is_mixture || config.calib_shard.is_none(),
        "--calib-shard: the statistics of mixtures are not computed in parts"
    );
    settings.expect("structured", || {
        let probe = Probe::of(&decoder, &calibration)?;
        Ok(config.seconds(&probe, &counts, is_mixture))
    })?;
    if is_mixture {
        let suite = experts::Suite {
            settings,
            config,
            decoder: &decoder,
            protocol: &protocol,
            calibration: &calibration,
            compared: &compared,
            evaluation: &evaluation,
            scratch: scratch.path(),
        };
        return suite.run();
    }
    let cells = Cells {
        settings,
        config,
        decoder: &decoder,
        calibration: &calibration,
        evaluation: &evaluation,
        compared: &compared,
        scratch: scratch.path(),
    };
    if let Some(shard) = config.calib_shard {
        cells.calibrate_part(shard)?;
        return Ok(Vec::new());
    }
    let calibrated = Lazy::default();
    let calibrated = || {
        calibrated.get(|| {
            let bar = settings.bar("calibration", decoder.config().layers() as u64);
            let watch = Stopwatch::start();
            let calibrated = cells.calibrated(&bar)?;
            let mut row = Row::new("structured", "calibration");
            watch.stop(&mut row);
            bar.finish();
            Ok((calibrated, row))
        })
    };
    let calibrating =
        (settings.cells).get("calibration", || anyhow::Ok(calibrated()?.1.clone()))?;

    let mut rows = Vec::new();
    if !config.dry_run {
        rows.extend(settings.cells.get(DENSE, || {
            let bar = settings.bar(DENSE, 0);
            let mut row = Row::new("structured", DENSE);
            perplexity::measure(&decoder, &evaluation, &mut row, &bar)?;
            time_blocks(&[&decoder], evaluation.inputs())?[0].fill(&mut row);
            bar.finish();
            anyhow::Ok(row)
        })?);
    }
    let bar = settings.bar(
        "pruning",
        (config.recipes.len() * config.ratios.len()) as u64,
    );
    let mut failures = Vec::new();
    for recipe in &config.recipes {
        let curves = Lazy::default();
        for &ratio in &config.ratios {
            let name = format!("{} at ratio {ratio}", recipe.name);
            bar.set_label(name.clone());
            let row = settings.cells.get(&name, || {
                let (calibration, _) = calibrated()?;
                let inputs = Inputs {
                    calibration,
                    curves: curves
                        .get(|| cells.curves(calibration, recipe, &bar))?
                        .as_ref(),
                };
                cells.measure(inputs, recipe, ratio, &bar)
            });
            match row.context(name) {
                Ok(row) => rows.extend(row),
                Err(error) => failures.push(error),
            }
            bar.inc(1);
        }
    }
    bar.finish();
    if rows.iter().all(|row| row.method == DENSE) && !failures.is_empty() {
        return Err(failures.swap_remove(0));
    }
    let model = &config.perplexity.model;
    let failures = failures.into_iter().map(|error| naming(error, model));
    let failures = failures.map(|error| format!("{error:#}")).collect();
    let (false, Some(calibrating)) = (settings.is_part(), calibrating) else {
        return Ok(part(failures));
    };
    compare_with_dense(&mut rows, &decoder, &file_name(&config.perplexity.model));
    let arithmetic = match settings.weights.arithmetic {
        Arithmetic::F32 => "f32",
        _ => settings.weights.ran(&decoder.weights()?),
    };
    let mut section = section(config, rows);
    section.failures = failures;
    Ok(vec![
        protocol
            .facts(
                section,
                &config.perplexity.text,
                evaluation.count(),
                evaluation.targets(),
            )
            .fact("arithmetic", arithmetic)
            .fact("calibration text", file_name(&config.calib))
            .fact("calibration windows", calibration.count())
            .fact("calibration time", format::seconds(calibrating.seconds))
            .fact(
                "calibration memory",
                calibrating
                    .peak_rss_bytes
                    .map_or("unknown".into(), format::bytes),
            ),
    ])
}

/// What all cells of the table share.
struct Cells<'a> {
    settings: &'a Settings,
    config: &'a Config,
    decoder: &'a Decoder<'a>,
    calibration: &'a Windows,
    evaluation: &'a ScoredWindows,
    compared: &'a Windows,
    scratch: &'a Path,
}

/// What is measured before any ratio is asked for.
#[derive(Clone, Copy)]
struct Inputs<'a> {
    calibration: &'a Calibration,
    /// Where the recipe, or what its search starts from, allocates by measured curves.
    curves: Option<&'a Curves>,
}

/// One of the runs whose mean a row shows.
struct Draw {
    recipe: Recipe,
    /// Where runs differ by a seed.
    seed: Option<u64>,
}

impl Cells<'_> {
    /// What any of the methods reads.
    fn needs(&self) -> Needs {
        // Plans without refits are written from the model alone.
        let needs = self
            .config
            .recipes
            .iter()
            .map(|recipe| match self.config.dry_run {
                true => recipe.needs_for_plan(),
                false => recipe.needs(self.decoder),
            });
        needs.fold(Needs::default(), |all, needs| all | needs)
    }

    /// One pass of `windows` that collects it, Gram matrices in `dir`.
    fn calibrate(&self, windows: &Windows, dir: &Path, bar: &Bar) -> Result<Calibration> {
        let collect = Collect::new(self.needs(), dir);
        Ok(Calibration::run(self.decoder, windows, &collect, bar)?)
    }

    fn maker<'a>(&'a self, calibration: &'a Calibration) -> search::Maker<'a> {
        search::Maker {
            decoder: self.decoder,
            config: &self.config.search,
            windows: self.calibration,
            search: self.compared,
            calibration,
        }
    }

    fn curves(
        &self,
        calibration: &Calibration,
        recipe: &Recipe,
        bar: &Bar,
    ) -> Result<Option<Curves>> {
        self.config
            .search
            .measures_for(recipe)
            .map(|recipe| {
                let folder = self.scratch.join("curves");
                self.maker(calibration).curves(&recipe, &folder, bar)
            })
            .transpose()
    }

    /// One row: a method at one ratio, over several draws where it is random.
    fn measure(&self, inputs: Inputs<'_>, recipe: &Recipe, ratio: f64, bar: &Bar) -> Result<Row> {
        let rows = self
            .draws(recipe)
            .iter()
            .map(|draw| {
                let row = self.measure_one(inputs, draw, ratio, bar)?;
                self.forget_search(draw, ratio)?;
                Ok(row)
            })
            .collect::<Result<Vec<Row>>>()?;
        Ok(mean_over_seeds(&rows)?)
    }

    fn search_folder(&self, Draw { recipe, seed }: &Draw, ratio: f64) -> PathBuf {
        let folder = self.config.search.resume.as_deref().unwrap_or(self.scratch);
        folder.join(format!("search-{}", cell_name(recipe, *seed, ratio)))
    }

    /// Removes the state of a search that nobody will resume: levels and Gram matrices are larger than the model.
    fn forget_search(&self, draw: &Draw, ratio: f64) -> Result<()> {
        let folder = self.search_folder(draw, ratio);
        if self.config.search.resume.is_none() && folder.exists() {
            std::fs::remove_dir_all(&folder).with_context(|| folder.display().to_string())?;
        }
        Ok(())
    }

    fn draws(&self, recipe: &Recipe) -> Vec<Draw> {
        let draw = |recipe, seed| Draw { recipe, seed };
        let seeds = self.config.seeds;
        match (recipe.score, recipe.allocation) {
            (Score::Random(Random { seed }), _) => (seed..seed + seeds)
                .map(|seed| {
                    let mut recipe = recipe.clone();
                    recipe.score = Random { seed }.into();
                    draw(recipe, Some(seed))
                })
                .collect(),
            (_, Allocation::Searched(_)) => {
                let first = self.config.search.options.seed;
                (first..first + seeds)
                    .map(|seed| draw(recipe.clone(), Some(seed)))
                    .collect()
            }
            _ => vec![draw(recipe.clone(), None)],
        }
    }

    /// The plan of a draw, and the statistics that go with it where they are not the dense model's.
    fn plan(
        &self,
        inputs: Inputs<'_>,
        draw: &Draw,
        ratio: f64,
        (row, bar): (&mut Row, &Bar),
    ) -> Result<(Plan, Option<Calibration>)> {
        let recipe = &draw.recipe;
        let maker = self.maker(inputs.calibration);
        if !matches!(recipe.allocation, Allocation::Searched(_)) {
            return Ok((maker.plan(recipe, inputs.curves, ratio, bar)?, None));
        }
        let folder = self.search_folder(draw, ratio);
        let seed = draw.seed.unwrap_or_default();
        let found = maker.search(recipe, inputs.curves, (ratio, seed), &folder, bar)?;
        if let Some(kl) = found.kl {
            row.extra.insert("kl".into(), json!(kl));
        }
        if found.candidate_tokens > 0 {
            let rate = found.candidate_tokens as f64 / found.seconds;
            row.extra
                .insert("candidate_tokens_per_second".into(), json!(rate));
        }
        Ok((found.plan, Some(found.calibration)))
    }

    fn measure_one(&self, inputs: Inputs<'_>, draw: &Draw, ratio: f64, bar: &Bar) -> Result<Row> {
        let watch = Stopwatch::start();
        let recipe = &draw.recipe;
        let mut row = Row::new("structured", &recipe.name);
        let (plan, searched) = self.plan(inputs, draw, ratio, (&mut row, bar))?;
        let calibration = searched.as_ref().unwrap_or(inputs.calibration);
        let cost = Cost::of(self.decoder, &plan)?;
        row = Row {
            ratio: Some(ratio),
            params: Some(cost.total_after().parameters),
            bytes: Some(cost.total_after().bytes),
            layers: layers(&plan, &cost),
            ..row
        };
        if is_control(recipe) {
            row = row.control();
        }
        let removable: u64 = cost.before.iter().map(|block| block.parameters).sum();
        let left: u64 = cost.after.iter().map(|block| block.parameters).sum();
        row.extra.insert(
            "removed".into(),
            json!(1.0 - left as f64 / removable as f64),
        );
        row.extra.insert(
            "flops_per_token".into(),
            json!(cost.total_after().flops_per_token),
        );
        row.extra.insert(
            "flops_per_token_dense".into(),
            json!(cost.total_before().flops_per_token),
        );
        row.extra.insert(
            "compensation".into(),
            json!(plan.compensation.name().replace('-', " ")),
        );
        row.extra.insert(
            "loads_in".into(),
            json!(match Loading::of(self.decoder, &plan, self.config.form) {
                Loading::Stock => "stock",
                _ => "loader",
            }),
        );
        // A dry run shows widths, which the refinement leaves as they are.
        let (plan, refits) = match self.config.dry_run {
            true => (plan, None),
            false => self.refined(plan, bar)?,
        };
        if let Some(folder) = &self.config.save_plans {
            std::fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
            plan.save(folder.join(format!("{}.json", cell_name(recipe, draw.seed, ratio))))?;
        }
        // Each row says what its ratio alone would take.
        let measuring = inputs.curves.map_or(0.0, |curves| curves.seconds);
        if self.config.dry_run {
            watch.stop(&mut row);
            row.seconds += measuring;
            return Ok(row);
        }
        let folder = self.folder(draw, ratio);
        let writing = bar.nested("writing", 0);
        let settings = prune_structured::Settings::new(calibration)
            .form(self.config.form)
            .refits(refits.as_ref())
            .files(self.config.write.clone());
        let written = prune_structured::write(self.decoder, &plan, &folder, &settings, &writing)?;
        writing.finish();
        watch.stop(&mut row);
        row.seconds += measuring;
        let pruning = (row.seconds, row.peak_rss_bytes);

        let checkpoint = Checkpoint::open(&folder)?;
        let pruned = perplexity::open(self.settings, &checkpoint)?;
        let steps = bar.nested("perplexity", 0);
        perplexity::measure(&pruned, self.evaluation, &mut row, &steps)?;
        steps.finish();
        let times = time_blocks(&[self.decoder, &pruned], self.evaluation.inputs())?;
        times[1].fill_beside(&times[0], &mut row);
        export(self.config, &pruned, &folder, (&mut row, bar))?;
        anyhow::ensure!(
            (Some(written.parameters), Some(written.bytes)) == (row.params, row.bytes),
            "{}: the shards hold other parameters than the plan counts",
            folder.display()
        );
        // The row's time and memory are those of making the smaller model; its speed is that of
        // running it.
        (row.seconds, row.peak_rss_bytes) = pruning;
        if self.config.save.is_none() {
            std::fs::remove_dir_all(&folder).with_context(|| folder.display().to_string())?;
        }
        Ok(row)
    }

    /// A plan whose compensation is the alternating refinement, after it, and where its weights are.
    fn refined(&self, plan: Plan, bar: &Bar) -> Result<(Plan, Option<Refits>)> {
        if !matches!(plan.compensation, Compensation::Alternating(_)) {
            return Ok((plan, None));
        }
        let refining = bar.nested("refining", 0);
        let windows = self.calibration;
        let (plan, refits) =
            structprune::refine(self.decoder, windows, &plan, self.scratch, &refining)?;
        Ok((plan, Some(refits)))
    }

    /// `--save` itself for a single checkpoint, a folder of its own for each of several.
    fn folder(&self, draw: &Draw, ratio: f64) -> PathBuf {
        let cell = cell_name(&draw.recipe, draw.seed, ratio);
        let Config {
            recipes, ratios, ..
        } = self.config;
        let single = recipes.len() * ratios.len() * self.draws(&draw.recipe).len() == 1;
        match &self.config.save {
            Some(save) if single => save.clone(),
            Some(save) => save.join(cell),
            None => self.scratch.join(cell),
        }
    }
}

/// Writes a saved checkpoint in other formats, and the size of each to its row.
fn export(
    Config { exports, write, .. }: &Config,
    pruned: &Decoder<'_>,
    folder: &Path,
    (row, bar): (&mut Row, &Bar),
) -> Result<()> {
    for export in exports {
        let bar = bar.nested("export", 0);
        let (name, bytes) = match export {
            Export::Gguf(precision) => {
                let name = format!("model-{}.gguf", precision.name());
                let mut options = ExportOptions::from(*precision);
                options = options.with_provenance("method", &row.method);
                if let Some(ratio) = row.ratio {
                    options = options.with_provenance("ratio", ratio);
                }
                let exported = gguf::export(pruned, options, folder.join(&name), &bar)?;
                (name, exported.bytes)
            }
            Export::NemotronNas => {
                let name = "nemotron-nas".to_string();
                let dst = folder.join(&name);
                let written = nemotron::export(pruned, dst, write, &bar)?;
                (name, written.bytes)
            }
        };
        row.extra.insert(format!("bytes_{name}"), json!(bytes));
    }
    Ok(())
}

/// What the files of a cell are called.
fn cell_name(recipe: &Recipe, seed: Option<u64>, ratio: f64) -> String {
    match seed {
        Some(seed) => format!("{}-{ratio}-seed{seed}", recipe.name),
        None => format!("{}-{ratio}", recipe.name),
    }
}

/// Times the blocks of models on one batch, in alternation block by block.
fn time_blocks(decoders: &[&Decoder<'_>], windows: &Windows) -> Result<Vec<Rounds>> {
    let batch = windows.first((BATCH_TOKENS / windows.window_len()).max(1));
    let layers = decoders[0].config().layers();
    let tokens = (batch.count() * batch.window_len()) as f64 / layers as f64;
    let mut times = vec![Rounds::default(); decoders.len()];
    let embed = |decoder: &&Decoder<'_>| Hidden::embed(decoder, &batch);
    let mut hidden = decoders.iter().map(embed).collect::<Result<Vec<_>, _>>()?;
    for layer in 0..layers {
        let mut blocks = Vec::with_capacity(decoders.len());
        for decoder in decoders {
            blocks.push(decoder.block(layer)?);
            decoder.release(layer);
        }
        let inputs = hidden.clone();
        for _ in 0..ROUNDS {
            hidden = inputs.clone();
            for ((hidden, block), time) in hidden.iter_mut().zip(&blocks).zip(&mut times) {
                time.time(tokens, || hidden.advance(block, &mut NoTap))?;
            }
        }
    }
    Ok(times)
}
