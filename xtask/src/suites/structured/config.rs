//! What a run prunes, measures and writes.

use std::path::PathBuf;

use anyhow::Result;
use causal_lm::names::ExpertLayout;
use causal_lm::{BATCH_TOKENS, Decoder, Widths};
use eval_report::ROUNDS;
use eval_report::cells::Shard;
use lowrank_eora::compress::Compressor;
use lowrank_eora::experts::{ExpertRepair, GramOptions, Owl};
use prune_structured::experts::ExpertRecipe;
use prune_structured::gguf::{self, Precision};
use prune_structured::rate_distortion::Measure;
use prune_structured::score::Random;
use prune_structured::{Allocation, Form, Recipe, Score, nemotron};
use tensor_io::WriteOptions;

use super::search;
use crate::estimate::Probe;
use crate::suites::perplexity;

/// The cell of what all rows calibrate on.
pub(super) const CALIBRATION: &str = "calibration";

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
    pub experts: ExpertMethods,
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
    /// Flags that were given and that some methods alone read.
    pub asked: Vec<&'static str>,
    /// What was asked for by name, of which nothing may be left out.
    pub named: Named,
}

/// Methods and compensations that were asked for by name; what runs by default suits the model as far as it can.
#[derive(Debug, Clone, Default)]
pub struct Named {
    /// Methods.
    pub methods: Vec<String>,
    /// Compensations.
    pub compensations: Vec<String>,
}

/// What to do to mixtures.
#[derive(Debug, Clone, Default)]
pub struct ExpertMethods {
    /// Methods.
    pub recipes: Vec<ExpertRecipe>,
    /// Compressors of experts, each with a rank of its correction; 0 for none.
    pub compressors: Vec<(Compressor, usize)>,
    /// The same for the experts that methods leave.
    pub then: Vec<(Compressor, usize)>,
    /// How much of each layer compressors prune; `None` for the same of all.
    pub owl: Option<Owl>,
    /// How tokens of experts count where these are compressed; those that are narrowed have the same in their recipes.
    pub grams: GramOptions,
    /// How experts are stored; `None` for as the model has them.
    pub layout: Option<ExpertLayout>,
}

impl ExpertMethods {
    /// How a compressor with a correction of some rank is run.
    pub(super) fn repair(&self, (compressor, rank): (Compressor, usize)) -> ExpertRepair {
        let repair = ExpertRepair::new(compressor).rank(rank);
        repair.owl(self.owl).grams(self.grams).layout(self.layout)
    }

    /// Whether layers are calibrated behind the pruned ones.
    pub(super) fn is_progressive(&self) -> bool {
        self.recipes.iter().any(|recipe| recipe.progressive)
    }
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
            experts: ExpertMethods::default(),
            ratios: Vec::new(),
            save: None,
            form: Form::Sliced,
            write: WriteOptions::default(),
            exports: Vec::new(),
            save_plans: None,
            dry_run: false,
            search: search::Config::new(seed),
            seeds: 3,
            asked: Vec::new(),
            named: Named::default(),
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
        let draws = |recipe: &Recipe| self.draws(recipe).len() as f64;
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
        let calibration = match experts.is_progressive() {
            true => 2 * counts.calibration,
            false => counts.calibration,
        };
        let row = probe.copy() + probe.pass(counts.evaluation) + probe.pass(calibration);
        rows as f64 * row
    }
}

impl Config {
    /// The runs of a method: one for each seed where it draws or searches.
    pub(super) fn draws(&self, recipe: &Recipe) -> Vec<Draw> {
        let draw = |recipe, seed| Draw { recipe, seed };
        let seeds = self.seeds;
        match (recipe.score, recipe.allocation) {
            (Score::Random(Random { seed }), _) => (seed..seed + seeds)
                .map(|seed| {
                    let mut recipe = recipe.clone();
                    recipe.score = Random { seed }.into();
                    draw(recipe, Some(seed))
                })
                .collect(),
            (_, Allocation::Searched(_)) => {
                let first = self.search.options.seed;
                (first..first + seeds)
                    .map(|seed| draw(recipe.clone(), Some(seed)))
                    .collect()
            }
            _ => vec![draw(recipe.clone(), None)],
        }
    }

    /// The name of a row.
    pub(super) fn cell(recipe: &Recipe, ratio: f64) -> String {
        format!("{} at ratio {ratio}", recipe.name)
    }

    /// Where a checkpoint is saved: `--save` itself for a single one, a folder of its own in it for each of several.
    pub(super) fn saved(&self, draw: &Draw, ratio: f64) -> Option<PathBuf> {
        let save = self.save.as_ref()?;
        let cells = self.recipes.len() * self.ratios.len();
        Some(match cells * self.draws(&draw.recipe).len() {
            1 => save.clone(),
            _ => save.join(draw.name(ratio)),
        })
    }

    /// Where a plan is saved.
    pub(super) fn saved_plan(&self, name: &str) -> Option<PathBuf> {
        let folder = self.save_plans.as_ref()?;
        Some(folder.join(format!("{name}.json")))
    }
}

/// One of the runs whose mean a row shows.
pub(super) struct Draw {
    pub(super) recipe: Recipe,
    /// Where runs differ by a seed.
    pub(super) seed: Option<u64>,
}

impl Draw {
    /// What its files are called.
    pub(super) fn name(&self, ratio: f64) -> String {
        let name = &self.recipe.name;
        match self.seed {
            Some(seed) => format!("{name}-{ratio}-seed{seed}"),
            None => format!("{name}-{ratio}"),
        }
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

impl Export {
    /// The folder in that of the checkpoint, where it is one.
    pub(super) fn folder(&self) -> Option<&'static str> {
        match self {
            Export::Gguf(_) => None,
            Export::NemotronNas => Some("nemotron-nas"),
        }
    }

    /// Whether a model can be exported if its layers have these widths.
    pub(super) fn check(&self, decoder: &Decoder<'_>, widths: &[Widths]) -> Result<()> {
        match self {
            Export::Gguf(_) => gguf::check(decoder, widths)?,
            Export::NemotronNas => nemotron::check(decoder, widths)?,
        }
        Ok(())
    }
}
