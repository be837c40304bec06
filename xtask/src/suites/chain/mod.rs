//! The methods on top of one another: prune, quantise what is left, repair it at low rank, and shrink its cache.
//!
//! Every step is written to the files of a runtime, opened again and measured with its weights as they are stored, beside a
//! chain of baselines that spends as much at every step without looking.

mod speed;
mod table;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use candle_core::DType;
use causal_lm::{Arithmetic, Decoder, Execution, Model, Windows};
use eval_report::{Budget, DENSE, Row, Section, Stopwatch, mean_over_seeds};
use frontier::{Files, Format, Target, Written};
use kv_lazy::CacheConfig;
use lowrank_eora::compress::{BlockRounding, Compressor, Rounding, Score};
use lowrank_eora::output::{Adapter, Layout, check_layout, gguf_types, gptq};
use lowrank_eora::repair::{Method, Ranks, Repair, Repaired, Source, Texts};
use prune_structured::gguf::Precision;
use prune_structured::rate_distortion::{self, Measure};
use prune_structured::{Allocation, Calibration, Collect, Compensation, Plan, Recipe};
use tensor_io::atomic::{Overwrite, PendingFolder};
use tensor_io::{Checkpoint, NoProgress};

use crate::bar::Bar;
use crate::estimate::Probe;
use crate::model;
use crate::scratch::Scratch;
use crate::settings::Settings;
use crate::suites::damping;
use crate::suites::held_out;
use crate::suites::kv::FULL;
use crate::suites::kv::perplexity::{Decoding, batch, prompt};
use crate::suites::kv::policy::{self, ALPHA, Choice, PromptRule};
use crate::suites::lowrank::possible_rank;
use crate::suites::perplexity::{self, Protocol, file_name, tokens};
use crate::suites::structured::search::{MEASURED, measured, searches};

/// Name of the suite.
pub(crate) const SUITE: &str = "chain";
/// Runs of the baselines.
const DRAWS: u64 = 3;
/// Rows of one chain, and its pruning.
const STEPS: u64 = 5;
/// The recommended method of pruning.
const RD_DP: &str = "rd-dp";
/// The baseline of pruning and of eviction.
const RANDOM: &str = "random";
/// The recommended storage of keys and values.
pub const KV_DTYPE: &str = "int4";
/// Tokens of caches that evict.
pub const BUDGET: Budget = Budget::Share(0.5);
/// Columns of a block, and codes of whole words at any width in bits.
const BLOCK: usize = 32;

/// What to chain.
#[derive(Debug, Clone)]
pub struct Config {
    /// Model and text to evaluate on.
    pub perplexity: perplexity::Config,
    /// Text to calibrate on.
    pub calib: PathBuf,
    /// Windows to calibrate on.
    pub calib_samples: usize,
    /// Which parts of blocks are pruned, with a least-squares refit.
    pub prune: String,
    /// Share of the blocks' parameters that pruning removes.
    pub ratio: f64,
    /// What the remaining linears are quantised to; what suits the target where not asked for.
    pub compress: Option<Compressor>,
    /// How the quantised linears are repaired.
    pub method: Method,
    /// Rank of the repair.
    pub rank: usize,
    /// What the caches keep.
    pub policy: Choice,
    /// What they store it as; as recommended, where the model's heads admit it.
    pub kv_dtype: Option<String>,
    /// Tokens that the caches hold, where they evict.
    pub budget: Budget,
    /// The runtime whose files are written and measured.
    pub target: Target,
    /// A new folder for the files of the whole chain.
    pub save: Option<PathBuf>,
}

impl Config {
    /// The recommended methods, with the defaults of the command line.
    ///
    /// # Errors
    /// A default that does not exist.
    pub fn new(perplexity: perplexity::Config, calib: PathBuf) -> Result<Self> {
        Ok(Self {
            perplexity,
            calib,
            calib_samples: 32,
            prune: RD_DP.into(),
            ratio: 0.25,
            compress: None,
            method: Method::Eora,
            rank: 8,
            policy: policy(FULL)?,
            kv_dtype: None,
            budget: BUDGET,
            target: Target::Here,
            save: None,
        })
    }

    /// What quantises: about 4.5 bits per weight in the form that the target stores.
    fn compressor(&self) -> Result<Compressor> {
        let default = match self.target {
            Target::Gguf => "gptq-q4_0",
            Target::Vllm => "gptq-int4-g128-sym",
            _ => "gptq-int4-g32",
        };
        Ok(match self.compress {
            Some(compressor) => compressor,
            None => default.parse()?,
        })
    }

    /// The policy with the storage that is asked for, or that which is recommended where a model admits it.
    fn cache(&self, is_admitted: bool) -> Result<Choice> {
        let policy = self.policy.clone();
        Ok(match &self.kv_dtype {
            Some(preset) => policy.stored_as(preset, false)?,
            None if is_admitted => policy.stored_as(KV_DTYPE, false)?,
            None => policy,
        })
    }

    /// The methods, with a cache of this kind.
    fn methods(&self, cache: Choice) -> Result<Steps> {
        Ok(Steps {
            prune: self.prune.clone(),
            compressor: self.compressor()?,
            repair: self.method,
            cache,
            budget: self.budget,
            control: false,
        })
    }

    /// Random units, rounding, plain SVD, random eviction of keys and values that are not quantised, down to a budget.
    fn baselines(&self, budget: Budget) -> Result<Steps> {
        Ok(Steps {
            prune: RANDOM.into(),
            compressor: without_looking(self.compressor()?),
            repair: Method::Svd,
            cache: random()?,
            budget,
            control: true,
        })
    }

    /// The methods of the last rows of both chains, first where a model's heads admit the recommended storage and then where they do not.
    ///
    /// # Errors
    /// A default compressor that cannot be parsed.
    pub(crate) fn wholes(&self) -> Result<[String; 3]> {
        let methods = |is_admitted| anyhow::Ok(self.methods(self.cache(is_admitted)?)?.whole());
        let baselines = self.baselines(self.budget)?;
        Ok([methods(true)?, methods(false)?, baselines.whole()])
    }

    /// About how long it takes with so many tokens to calibrate on, to compare pruned models on and to evaluate on.
    pub(crate) fn seconds(
        &self,
        probe: &Probe,
        (calibration, compared): (usize, usize),
        evaluation: usize,
    ) -> f64 {
        let chains = 1 + DRAWS as usize;
        // Quantising and repairing are a walk each, behind one pass for pruning.
        let walk = 2.0 * probe.pass(calibration) + probe.grams(calibration, true) + probe.solves();
        let decoded = (1 + 4 * chains) * evaluation;
        let copies = chains as f64 * 2.0 * (walk + probe.copy());
        let curves = match self.prune.as_str() {
            RD_DP => {
                let points = probe.sublayers() * Measure::default().points;
                // Candidates that prune one sublayer run from there on, half of the model.
                probe.pass(points * compared / 2)
            }
            _ => 0.0,
        };
        probe.pass(calibration) + curves + copies + probe.decode(decoded)
    }

    /// What is known before anything is computed.
    fn check(&self, settings: &Settings, decoder: &Decoder<'_>) -> Result<()> {
        perplexity::ensure_unseen(&self.calib, &self.perplexity.text)?;
        ensure!(
            settings.device.open()?.is_cpu(),
            "--device: weights as they are stored are multiplied on the CPU alone"
        );
        possible_rank("--rank", decoder, self.rank)?;
        let compressor = self.compressor()?;
        let fits = compressor.check(decoder);
        fits.with_context(|| format!("--compress {compressor}"))?;
        let stored = self.storable(decoder, &compressor);
        stored.with_context(|| format!("--compress {compressor} --for {}", self.target))?;
        let recipe = self.recipe(&self.prune, settings.seed, decoder)?;
        ensure!(
            !searches(&recipe),
            "--prune {}: its widths are searched first; prune with eval structured --save, and chain what it wrote with --ratio 0",
            self.prune
        );
        for name in [self.prune.as_str(), RANDOM] {
            let recipe = self.recipe(name, settings.seed, decoder)?;
            let fits = recipe.check(decoder, self.ratio);
            fits.with_context(|| format!("--ratio {}: {name}", self.ratio))?;
        }
        if let Some(save) = &self.save {
            // Dropped, it leaves nothing.
            let new = PendingFolder::create(save, Overwrite::Never);
            new.map(drop).context("--save")?;
        }
        Ok(())
    }

    /// Whether the files of the target hold what the compressor makes.
    fn storable(&self, decoder: &Decoder<'_>, compressor: &Compressor) -> Result<()> {
        match self.target {
            Target::Gguf => {
                Adapter::check_gguf(decoder)?;
                gguf_types(decoder, compressor)?;
            }
            Target::Vllm => self.target.check(Format::Quantised(*compressor))?,
            _ => {
                let version = gptq::Version::V2;
                if check_layout(decoder, compressor, Layout::Gptq { version }).is_err() {
                    check_layout(decoder, compressor, Layout::CompressedTensors)?;
                }
            }
        }
        Ok(())
    }

    fn recipe(&self, name: &str, seed: u64, decoder: &Decoder<'_>) -> Result<Recipe> {
        let recipe = Recipe::named(name, seed);
        let mut recipe =
            recipe.with_context(|| format!("--prune {name}: no method of this name"))?;
        recipe.compensation = Some(Compensation::LEAST_SQUARES);
        // Rows stay whole blocks, and whole words of packed codes.
        let widths = decoder.config().widths.iter();
        let aligned = widths.map(|widths| 1 << widths.neurons.trailing_zeros().min(BLOCK.ilog2()));
        recipe.shape.align_neurons = aligned.min().unwrap_or(1);
        recipe.shape.uniform = self.target == Target::Vllm;
        Ok(recipe)
    }
}

/// A policy that may evict the prompt.
fn policy(name: &str) -> Result<Choice> {
    let choice = Choice::named(name, PromptRule::Evict, ALPHA);
    choice.with_context(|| format!("no policy {name}"))
}

/// What the baselines evict with: what is left is not quantised.
fn random() -> Result<Choice> {
    policy(RANDOM)?.stored_as("f16", false)
}

/// The same grid without calibration: magnitudes are pruned, and values rounded to the nearest.
fn without_looking(mut compressor: Compressor) -> Compressor {
    if let Some(prune) = &mut compressor.prune {
        prune.score = Score::Magnitude;
    }
    if let Some(quantise) = &mut compressor.quantise {
        quantise.rounding = Rounding::Nearest;
    }
    if let Some(blocks) = &mut compressor.blocks {
        blocks.rounding = BlockRounding::Nearest { importance: false };
    }
    compressor
}

/// What each step does.
struct Steps {
    prune: String,
    compressor: Compressor,
    repair: Method,
    cache: Choice,
    /// Tokens of the cache, where it evicts.
    budget: Budget,
    control: bool,
}

impl Steps {
    /// The method of the row after the last step.
    fn whole(&self) -> String {
        format!(
            "{} + {} + {} + {}",
            self.prune,
            self.compressor,
            self.repair.name(),
            self.cache.name
        )
    }
}

/// Run both chains.
///
/// # Errors
/// A model or text that cannot be read or run, and what a step cannot do to this model.
pub fn run(settings: &Settings, config: &Config) -> Result<Vec<Section>> {
    let checkpoint = causal_lm::open(&config.perplexity.model)?;
    let decoder = model::decoded(settings, &checkpoint)?;
    config.check(settings, &decoder)?;
    let protocol = Protocol::new(settings, &config.perplexity, &decoder)?;
    let evaluation = protocol.decoding(settings, &config.perplexity.text)?;
    let text = protocol.calibration(&config.calib)?;
    let calibration = text.sample(config.calib_samples, settings.seed);
    let compared = held_out::compared(&text, &calibration, MEASURED, settings.seed);
    settings.expect(SUITE, || {
        let probe = Probe::of(&decoder, &calibration)?;
        let texts = (tokens(&calibration), tokens(&compared));
        Ok(config.seconds(&probe, texts, tokens(&evaluation)))
    });
    let stored = packed(&checkpoint, Arithmetic::Int8)?;
    let dense = Model::load(&stored)?;
    let methods = config.methods(config.cache(policy::admits(&dense, KV_DTYPE)?)?)?;
    let window = evaluation.window_len();
    let caches = std::slice::from_ref(&methods.cache);
    policy::check(&dense, caches, &[config.budget], window)?;
    let tokens = policy::tokens(config.budget, window);
    let cache = methods.cache.cache(tokens, settings.seed);
    let dtype = dense.decoder().dtype();
    let bytes = cache.bytes_of(&dense.cache_shapes(), dtype, window)?;
    let tokens = random()?.tokens_in_bytes(bytes, window, &dense)?;
    let baselines = config.baselines(Budget::Tokens(tokens as u64))?;
    let scratch = Scratch::new()?;
    let bar = settings.bar(SUITE, 1 + STEPS * (1 + DRAWS));
    let collect = Collect::new(Compensation::LEAST_SQUARES.needs(), scratch.path());
    let statistics = Calibration::run(&decoder, &calibration, &collect, &NoProgress)?;
    bar.inc(1);
    let chain = Chain {
        settings,
        config,
        decoder: &decoder,
        dense: &dense,
        statistics: &statistics,
        calibration: &calibration,
        compared: &compared,
        evaluation: &evaluation,
        scratch: scratch.path(),
        bar: &bar,
    };
    let mut rows = vec![chain.measure(&checkpoint, Row::new(SUITE, DENSE), None)?];
    rows.extend(chain.steps(&methods, settings.seed)?);
    let draws = (settings.seed..settings.seed + DRAWS)
        .map(|seed| chain.steps(&baselines, seed))
        .collect::<Result<Vec<_>>>()?;
    for step in 0..draws[0].len() {
        let runs: Vec<Row> = draws.iter().map(|rows| rows[step].clone()).collect();
        rows.push(mean_over_seeds(&runs)?);
    }
    let dense = rows[0].clone();
    for row in &mut rows {
        row.model = Some(file_name(&config.perplexity.model));
        row.perplexity_dense = dense.perplexity;
        row.bytes_dense = dense.bytes;
        row.params_dense = dense.params;
        row.kv_bytes_full = dense.kv_bytes;
    }
    let mut section = protocol
        .facts(
            table::section(rows, config, &methods.cache),
            &config.perplexity.text,
            evaluation.count(),
            evaluation.targets(),
        )
        .fact("prefilled", prompt(window))
        .fact("calibration text", file_name(&config.calib))
        .fact("calibration windows", calibration.count())
        .fact("pruned", config.ratio)
        .fact("rank", config.rank)
        .fact("target", config.target.name())
        .fact("arithmetic of quality", "f32")
        .fact("arithmetic of speed", "int8");
    if config.prune == RD_DP {
        let described = held_out::describe(&compared, &calibration);
        section = section.fact("windows that widths are compared on", described);
    }
    if !methods.cache.is_full() {
        section = section.fact("budget", policy::label(config.budget));
    }
    if let Some(experts) = model::experts_left(&decoder) {
        section = section.fact("experts", experts);
    }
    Ok(vec![section])
}

/// A decoder that multiplies with weights as they are stored.
fn packed(checkpoint: &Checkpoint, arithmetic: Arithmetic) -> Result<Decoder<'_>> {
    let decoder = Decoder::new(checkpoint, DType::F32, &candle_core::Device::Cpu);
    let decoder = decoder.with_context(|| checkpoint.dir().display().to_string())?;
    Ok(decoder.packed(Execution::new(arithmetic)))
}

struct Chain<'a> {
    settings: &'a Settings,
    config: &'a Config,
    /// The dense model, to calibrate on and to change.
    decoder: &'a Decoder<'a>,
    /// The dense model with weights as they are stored, to compare speeds with.
    dense: &'a Model<'a>,
    statistics: &'a Calibration,
    calibration: &'a Windows,
    /// What curves of pruning are measured on.
    compared: &'a Windows,
    evaluation: &'a Windows,
    scratch: &'a Path,
    bar: &'a Bar,
}

impl Chain<'_> {
    /// A row after each step.
    fn steps(&self, steps: &Steps, seed: u64) -> Result<Vec<Row>> {
        let watch = Stopwatch::start();
        let row = |name: &str| {
            let row = Row::new(SUITE, name);
            if steps.control { row.control() } else { row }
        };
        let folder = self.scratch.join(format!("{}-{seed}", steps.prune));
        self.prune(steps, seed, &folder)?;
        let checkpoint = causal_lm::open(&folder)?;
        let pruned = model::decoded(self.settings, &checkpoint)?;
        let mut name = steps.prune.clone();
        let mut rows = vec![self.measure(&checkpoint, row(&name), None)?];

        name += &format!(" + {}", steps.compressor);
        let quantised = self.repair(&pruned, None, &steps.compressor)?;
        let files = self.write(&pruned, &quantised, None)?;
        let mut quantised_row = row(&name);
        let compressor = steps.compressor.to_string();
        let linears = quantised.reports().count();
        damping::report(
            &mut quantised_row,
            &compressor,
            linears,
            quantised.damping(),
        );
        rows.push(self.measure(&files.open()?, quantised_row, None)?);
        remove(&files)?;

        // The same codes, with a correction beside them.
        name += &format!(" + {}", steps.repair);
        let save = self.config.save.as_deref().filter(|_| !steps.control);
        let repaired = self.repair(&pruned, Some(steps.repair), &quantised)?;
        let written = self.write(&pruned, &repaired, save)?;
        for linears in [quantised.folder(), repaired.folder()] {
            std::fs::remove_dir_all(linears).with_context(|| linears.display().to_string())?;
        }
        let files = written.open()?;
        rows.push(self.measure(&files, row(&name), None)?);

        let last = Row {
            budget: (!steps.cache.is_full()).then_some(steps.budget),
            ..row(&steps.whole())
        };
        let tokens = policy::tokens(steps.budget, self.evaluation.window_len());
        let cache = steps.cache.cache(tokens, seed);
        let mut last = self.measure(&files, last, Some(&cache))?;
        watch.stop(&mut last);
        rows.push(last);
        drop(files);
        if save.is_none() {
            remove(&written)?;
        }
        std::fs::remove_dir_all(&folder).with_context(|| folder.display().to_string())?;
        Ok(rows)
    }

    fn prune(&self, steps: &Steps, seed: u64, folder: &Path) -> Result<()> {
        let ratio = self.config.ratio;
        self.bar.set_label(format!("{} at {ratio}", steps.prune));
        let recipe = self.config.recipe(&steps.prune, seed, self.decoder)?;
        let plan = match recipe.allocation {
            Allocation::RdDp(_) => {
                let dir = self.scratch.join("curves");
                let data = rate_distortion::Data {
                    windows: self.compared,
                    dir: &dir,
                    options: Measure::default(),
                };
                let rankings = measured(self.decoder, self.statistics, &recipe, data, self.bar)?;
                Plan::allocate(self.decoder, &rankings, &recipe, ratio)?
            }
            _ => Plan::make(self.decoder, self.statistics, &recipe, ratio, &NoProgress)?,
        };
        let settings = prune_structured::Settings::new(self.statistics);
        prune_structured::write(self.decoder, &plan, folder, &settings, &NoProgress)?;
        self.bar.inc(1);
        Ok(())
    }

    /// The linears of a pruned model as `source` compresses them, repaired where there is a method.
    fn repair(
        &self,
        pruned: &Decoder<'_>,
        method: Option<Method>,
        source: &dyn Source,
    ) -> Result<Repaired> {
        let repair = Repair::default()
            .with_method(method)
            .with_ranks(Ranks::Constant(method.map_or(0, |_| self.config.rank)));
        let name = method.map_or("quantised", Method::name);
        self.bar.set_label(name);
        let folder = self.scratch.join(format!("linears-{name}"));
        let texts = Texts::new(self.calibration);
        Ok(repair.run(pruned, source, texts, &folder, &NoProgress)?)
    }

    /// The files of a pruned model with these linears: in `save`, or in a folder of their own.
    fn write(
        &self,
        pruned: &Decoder<'_>,
        linears: &Repaired,
        save: Option<&Path>,
    ) -> Result<Written> {
        let own = self.scratch.join("files");
        let files = Files {
            target: self.config.target,
            rest: Precision::Q8_0,
            scratch: self.scratch,
        };
        Ok(files.write(pruned, linears, save.unwrap_or(&own), &NoProgress)?)
    }

    /// Quality, bytes of weights and cache, and speed of decoding of the files of a model.
    fn measure(
        &self,
        checkpoint: &Checkpoint,
        mut row: Row,
        cache: Option<&CacheConfig>,
    ) -> Result<Row> {
        self.bar.set_label(row.method.clone());
        let window = self.evaluation.window_len();
        let decoder = packed(checkpoint, Arithmetic::F32)?;
        let exact = Model::load(&decoder)?;
        row.params = Some(checkpoint.parameters());
        row.bytes = Some(exact.weight_bytes() as u64);
        row.extra
            .insert("file_bytes".into(), checkpoint.total_bytes().into());
        let batch = batch(&decoder, window);
        let decoding = Decoding {
            model: &exact,
            windows: self.evaluation,
            prompt: prompt(window),
            batch,
        };
        let rounds = self.evaluation.count().div_ceil(batch) as u64;
        let nested = self.bar.nested("decoding", rounds);
        let mut row = decoding.measure(row, cache, None, &nested)?;
        nested.finish();
        drop(exact);
        let decoder = packed(checkpoint, Arithmetic::Int8)?;
        let beside = (row.method != DENSE).then_some(self.dense);
        let model = Model::load(&decoder)?;
        speed::fill(&mut row, (&model, cache), beside, self.evaluation)?;
        self.bar.inc(1);
        Ok(row)
    }
}

/// Removes the folder of files that nobody asked for.
fn remove(written: &Written) -> Result<()> {
    let Some(folder) = written.model.parent() else {
        return Ok(());
    };
    std::fs::remove_dir_all(folder).with_context(|| folder.display().to_string())
}
