//! The best model that fits a memory budget, beside what the same bytes buy along one axis.

mod memory;
mod strip;
mod table;

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, anyhow, bail, ensure};
use candle_core::{DType, Device};
use causal_lm::{Arithmetic, CacheSet, Decoder, Execution, Model};
use eval_report::{Budget, DENSE, ROUNDS, Rounds, Row, Section, Stopwatch, format};
use frontier::{Baseline, Data, Frontier, Options, Plan};
use kv_lazy::CacheConfig;
use lm_eval::ScoredWindows;
use tensor_io::atomic::{Overwrite, PendingFolder};

use super::held_out;
use super::lowrank::possible_rank;
use super::perplexity::{self, Protocol, file_name};
use crate::bar::Bar;
use crate::estimate::Probe;
use crate::scratch::Scratch;
use crate::settings::{Settings, once, one_line};

pub use memory::Memory;

/// The method name of a plan over all axes.
pub const JOINT: &str = "joint";
/// What a file that was opened again may differ by from what was measured, in nats per token: rounding of f32.
const SAME: f64 = 1e-6;
/// The same as a share of the divergence: predictions of a model that compression destroyed repeat to fewer digits.
const SAME_SHARE: f64 = 1e-5;
/// The same as a share of the divergence where caches quantise or evict: the last bit of a key decides on codes and on what is
/// evicted.
const SAME_WITH_CACHES: f64 = 0.01;
/// Tokens decoded to measure a speed, and those before them.
const DECODED: usize = 32;
const PROMPT: usize = 16;

/// What to divide and measure.
#[derive(Debug, Clone)]
pub struct Config {
    /// Model, text and protocol of the evaluation.
    pub perplexity: perplexity::Config,
    /// Text to calibrate and to compare on.
    pub calib: PathBuf,
    /// Windows to calibrate on.
    pub calib_samples: usize,
    /// Other windows of the same text, on which models are compared with the dense one.
    pub compare_samples: usize,
    /// Budgets.
    pub memory: Vec<Memory>,
    /// Formats, widths, ranks and how carefully they are measured.
    pub options: Options,
    /// Whether to measure what the same bytes buy along one axis.
    pub baselines: bool,
    /// Folder for the models of the joint plans.
    pub save: Option<PathBuf>,
    /// Whether the models of the other plans are kept there too.
    pub save_baselines: bool,
    /// Folder for what is made and measured.
    pub resume: Option<PathBuf>,
}

impl Config {
    /// No budgets, all else by default.
    pub fn new(perplexity: perplexity::Config, calib: PathBuf) -> Self {
        Self {
            perplexity,
            calib,
            calib_samples: 64,
            compare_samples: 32,
            memory: Vec::new(),
            options: Options::default(),
            baselines: true,
            save: None,
            save_baselines: false,
            resume: None,
        }
    }
}

/// Divide each budget and measure the plans.
///
/// # Errors
/// A model or text that cannot be read or run, and a budget below the smallest plan.
pub fn run(settings: &Settings, config: &Config) -> Result<Vec<Section>> {
    check_flags(config)?;
    let checkpoint = causal_lm::open(&config.perplexity.model)?;
    let decoder = Decoder::new(&checkpoint, DType::F32, &settings.device.open()?)
        .with_context(|| checkpoint.dir().display().to_string())?;
    for &rank in config.options.ranks.iter().flatten() {
        possible_rank("--ranks", &decoder, rank)?;
    }
    let protocol = Protocol::new(settings, &config.perplexity, &decoder)?;
    let evaluation = protocol.evaluation(settings, &config.perplexity.text)?;
    let text = protocol.calibration(&config.calib)?;
    // Of a short text half is compared on.
    let compare = config.compare_samples.min(text.count() / 2);
    let (calibration, comparison) =
        held_out::split(&text, (config.calib_samples, compare), settings.seed)
            .with_context(|| config.calib.display().to_string())?;
    let scratch = Scratch::new()?;
    let state = config.resume.as_deref().unwrap_or(scratch.path());

    let watch = Stopwatch::start();
    let bar = settings.bar("frontier", 0);
    let mut options = config.options.clone();
    options.seed = settings.seed;
    let data = Data {
        calibration: &calibration,
        comparison: &comparison,
    };
    let prepared = Frontier::prepare(&decoder, data, options, state, &bar).map_err(in_flags)?;
    let dense = prepared.dense_bytes();
    // All of a model in 16 bits is its files, with their headers.
    let parameters = checkpoint.parameters();
    let stored = dense - prepared.dense_cache_bytes();
    let in_16_bits = (stored + 2 * parameters).saturating_sub(checkpoint.total_bytes());
    let bf16 = in_16_bits + prepared.caches_in_16_bits();
    let smallest = prepared.smallest().unwrap_or(dense);
    let all = config.memory.iter().map(|memory| memory.bytes(bf16));
    let (budgets, below): (Vec<u64>, Vec<u64>) = all.partition(|&budget| budget >= smallest);
    let mut failures: Vec<String> = below
        .into_iter()
        .map(|budget| {
            format!(
                "--memory {budget}: the smallest plan for --for {} takes {smallest} bytes ({:.1} % of the model in bf16)",
                config.options.target,
                100.0 * smallest as f64 / bf16 as f64
            )
        })
        .collect();
    if let (Some(first), true) = (failures.first(), budgets.is_empty()) {
        bail!("{first}");
    }
    settings.expect("frontier", || {
        let probe = Probe::of(&decoder, &comparison)?;
        let plans = budgets.len() as f64 * prepared.tokens_of_plan();
        let passed = prepared.tokens_of_curves() + plans;
        // Making treatments takes as long as measuring them.
        Ok(2.0 * probe.pass(passed as usize))
    });
    let mut frontier = prepared.measure(&bar).map_err(in_flags)?;
    let mut measuring = Row::new("frontier", "measuring");
    watch.stop(&mut measuring);
    let measured = (measuring.seconds, frontier.passes());

    let suite = Suite {
        config,
        evaluation: &evaluation,
        scratch: scratch.path(),
        bf16,
        bar: &bar,
    };
    let mut rows = vec![suite.dense(&decoder, (dense, frontier.dense_cache_bytes()))?];
    let mut plans = Vec::new();
    for &budget in &budgets {
        bar.set_label(format!("{JOINT} at {budget}"));
        // A plan that fails leaves the others, which were long in the making, to the report.
        match suite.joint(&mut frontier, budget) {
            Ok((row, plan)) => {
                rows.push(row);
                plans.push(plan);
            }
            Err(error) => failures.push(format!("{JOINT} at {budget}: {}", one_line(&error))),
        }
        for baseline in Baseline::ALL {
            if config.baselines {
                bar.set_label(format!("{baseline} at {budget}"));
                match suite.baseline(&mut frontier, baseline, budget) {
                    Ok(found) => rows.extend(found),
                    Err(error) => {
                        failures.push(format!("{baseline} at {budget}: {}", one_line(&error)));
                    }
                }
            }
        }
    }
    if let (Some(first), true) = (failures.first(), plans.is_empty()) {
        bail!("{first}");
    }
    bar.finish();
    table::compare_with_dense(&mut rows, &file_name(&config.perplexity.model));
    let additivity = table::additivity(&rows);
    let mut section = table::section(&frontier, rows, (&plans, bf16));
    section.failures = failures;
    let (coarse, fine) = frontier.tokens();
    let check = frontier.check();
    let section = protocol
        .facts(
            section,
            &config.perplexity.text,
            evaluation.count(),
            evaluation.targets(),
        )
        .fact("calibration text", file_name(&config.calib))
        .fact("calibration windows", calibration.count())
        .fact("comparison windows", comparison.count())
        .fact("target", frontier.options().target.name())
        .fact("budgets are shares of", format::bytes(bf16))
        .fact("caches", caches_counted(frontier.options()))
        .fact("tokens of curves", coarse)
        .fact("tokens of plans", fine)
        .fact("unit of the division", format::bytes(frontier.unit()))
        .fact("seconds to measure curves", measured.0.round() as u64)
        .fact("passes to measure curves", measured.1.round() as u64)
        .fact("passes in all", frontier.passes().round() as u64)
        .fact("sums of single sites against whole plans", additivity)
        .fact(
            "combined treatments",
            format!(
                "{} measured as a check: Spearman {:.2}, predicted / measured {:.2}{}",
                check.sampled,
                check.rho,
                check.ratio,
                match check.widened {
                    true => "; all formats measured at all widths",
                    false => "",
                }
            ),
        );
    Ok(vec![section])
}

/// What the flags alone tell.
fn check_flags(config: &Config) -> Result<()> {
    perplexity::ensure_unseen(&config.calib, &config.perplexity.text)?;
    let options = &config.options;
    once("--memory", config.memory.iter())?;
    once("--widths", options.widths.iter())?;
    once("--formats", options.formats.iter().flatten())?;
    once("--ranks", options.ranks.iter().flatten())?;
    once("--cache-formats", options.cache_formats.iter())?;
    once("--cache-tokens", options.cache_shares.iter())?;
    options.check().map_err(in_flags)?;
    if let Some(resume) = &config.resume {
        let made = std::fs::create_dir_all(resume);
        made.with_context(|| format!("--resume {}", resume.display()))?;
    }
    // A run that goes on finds the models that it has saved.
    match (&config.save, &config.resume) {
        (Some(save), Some(_)) if save.exists() => {
            ensure!(save.is_dir(), "--save {}: it is no folder", save.display())
        }
        (Some(save), resume) => {
            ensure!(
                resume.is_some() || !save.exists(),
                "--save {}: it exists; name a new folder, or the --resume of the run that made it",
                save.display()
            );
            // Dropped, it leaves nothing.
            let new = PendingFolder::create(save, Overwrite::Never);
            new.map(drop).context("--save")?;
        }
        (None, _) => {}
    }
    Ok(())
}

/// An error of the crate with the flag that it is about.
fn in_flags(error: frontier::Error) -> anyhow::Error {
    let flag = match &error {
        frontier::Error::Parameters { .. } => "--max-params",
        frontier::Error::Speed { .. } => "--tokens-per-second",
        frontier::Error::Budget { .. } => "--memory",
        frontier::Error::Format { .. } => "--formats",
        frontier::Error::Option {
            option,
            value,
            expected,
        } => {
            let flag = match *option {
                "widths" => "--widths",
                "cache_shares" => "--cache-tokens",
                "context" => "--context",
                "cache_formats" => "--cache-formats",
                "tokens_per_second" => "--tokens-per-second",
                "comparison windows" => return anyhow::Error::new(error).context("--calib"),
                _ => return error.into(),
            };
            return anyhow!("{flag} {value}: {expected}");
        }
        _ => return error.into(),
    };
    anyhow::Error::new(error).context(flag)
}

/// How caches count, in words.
fn caches_counted(options: &Options) -> String {
    match options.context {
        0 => "not counted".into(),
        context => format!(
            "counted at {context} tokens in {} sequences; measured by decoding the windows, in which layers keep the same \
             shares of the tokens",
            options.batch
        ),
    }
}

/// What all rows share.
struct Suite<'a> {
    config: &'a Config,
    evaluation: &'a ScoredWindows,
    scratch: &'a Path,
    /// Bytes of the model in bf16, and of its cache where it counts.
    bf16: u64,
    bar: &'a Bar,
}

impl Suite<'_> {
    /// Bytes are those of the weights and the caches.
    fn dense(&self, decoder: &Decoder<'_>, (bytes, caches): (u64, u64)) -> Result<Row> {
        let mut row = Row::new("frontier", DENSE);
        let bar = self.bar.nested(DENSE, 0);
        perplexity::measure(decoder, self.evaluation, &mut row, &bar)?;
        let checkpoint = decoder.checkpoint();
        let packed = Decoder::new(checkpoint, DType::F32, &Device::Cpu)?;
        let packed = packed.packed(Execution::new(Arithmetic::F32));
        self.speed(&Model::load(&packed)?, None, &mut row)?;
        row.bytes = Some(bytes - caches);
        row.kv_bytes = Some(caches).filter(|bytes| *bytes > 0);
        row.extra.insert("kl".into(), 0.0.into());
        Ok(row)
    }

    fn joint(&self, frontier: &mut Frontier<'_>, budget: u64) -> Result<(Row, Plan)> {
        let (start, before) = (Instant::now(), frontier.passes());
        let bar = self.bar.nested("dividing", 0);
        let plan = frontier.plan(budget, &bar).map_err(in_flags)?;
        bar.finish();
        let mut row = self.measure(frontier, JOINT, &plan, start)?;
        let passes = (frontier.passes() - before).round() as u64;
        row.extra.insert("passes".into(), passes.into());
        let rounds = serde_json::to_value(&plan.rounds)?;
        row.extra.insert("rounds".into(), rounds);
        row.layers = plan.sites.iter().map(table::site).collect();
        Ok((row, plan))
    }

    fn baseline(
        &self,
        frontier: &mut Frontier<'_>,
        baseline: Baseline,
        budget: u64,
    ) -> Result<Option<Row>> {
        let start = Instant::now();
        let bar = self.bar.nested(baseline.name(), 0);
        let Some(plan) = frontier.baseline(baseline, budget, &bar)? else {
            return Ok(None);
        };
        bar.finish();
        let mut row = self.measure(frontier, baseline.name(), &plan, start)?;
        // What a budget buys along one axis may be much less than all of it: compared at what it does spend.
        let bar = self.bar.nested("joint plan of the same bytes", 0);
        let joint = frontier
            .divided_plan(plan.bytes(), &bar)
            .map_err(in_flags)?;
        // The division counts in units of bytes, so that it may miss the very plan of the baseline, which it could be.
        let itself = plan.predicted.map_or(f64::INFINITY, |_| plan.measured.mean);
        let kl = joint.measured.mean.min(itself);
        row.extra.insert("joint_kl".into(), kl.into());
        bar.finish();
        Ok(Some(row.control()))
    }

    /// Writes a plan, opens the files packed and measures what they hold.
    fn measure(
        &self,
        frontier: &Frontier<'_>,
        method: &str,
        plan: &Plan,
        start: Instant,
    ) -> Result<Row> {
        let name = match method {
            JOINT => plan.budget.to_string(),
            _ => format!(
                "{}-{}",
                plan.budget,
                method.replace(", ", "-").replace(' ', "-")
            ),
        };
        let (all, joint) = (self.config.save_baselines, method == JOINT);
        let kept = self.config.save.as_deref().filter(|_| all || joint);
        let dst = kept.unwrap_or(self.scratch).join(&name);
        let bar = self.bar.nested(method, 0);
        let written = match frontier.written(plan, &dst)? {
            Some(finished) => finished,
            None => frontier.write(plan, &dst, &bar)?,
        };
        let checkpoint = written.open()?;
        let decoder = Decoder::new(&checkpoint, DType::F32, &Device::Cpu)?;
        let decoder = decoder.packed(Execution::new(Arithmetic::F32));
        let (decoder, same) = match plan.cache_within(frontier.window_len()) {
            Some(caches) => (decoder.decoding(caches), SAME_WITH_CACHES),
            None => (decoder, SAME_SHARE),
        };
        let opened = frontier.divergence(&decoder, &bar)?;
        let difference = (opened.mean - plan.measured.mean).abs();
        if difference > SAME.max(same * plan.measured.mean) {
            // Nobody should load them.
            std::fs::remove_dir_all(&dst).with_context(|| dst.display().to_string())?;
            bail!(
                "{}: the files were {} nats from the dense model, the plan {}",
                dst.display(),
                opened.mean,
                plan.measured.mean
            );
        }
        let mut row = Row::new("frontier", method);
        perplexity::measure(&decoder, self.evaluation, &mut row, &bar)?;
        let model = Model::load(&decoder)?;
        self.speed(&model, plan.cache.as_ref(), &mut row)?;
        row.seconds = start.elapsed().as_secs_f64();
        row.bytes = Some(written.bytes);
        let summary = plan.summary();
        row.params = Some(plan.parameters);
        let share = plan.budget as f64 / self.bf16 as f64;
        row.budget = Some(Budget::Share((share * 1e4).round() / 1e4));
        if plan.cache_bytes > 0 {
            let held = match &plan.cache {
                Some(config) => {
                    let (context, batch) = (frontier.options().context, frontier.options().batch);
                    let shapes = model.cache_shapes();
                    frontier::allocated(&shapes, DType::F32, config, (context, batch))?
                }
                None => plan.cache_bytes,
            };
            ensure!(
                held <= plan.cache_bytes,
                "{}: caches take {held} bytes, the plan {}",
                dst.display(),
                plan.cache_bytes
            );
            row.kv_bytes = Some(held);
            row.kv_bytes_full = Some(frontier.dense_cache_bytes());
            let share = held as f64 / (held + written.bytes) as f64;
            row.extra.insert("cache_share".into(), share.into());
        }
        if let Some(seconds) = plan.seconds {
            let predicted = 1.0 / seconds;
            row.extra
                .insert("predicted_tokens_per_second".into(), predicted.into());
        }
        drop(model);
        for (name, value) in [
            ("kl", opened.mean),
            ("kl_error", opened.error),
            ("pruned", summary.pruned),
            ("bits", summary.bits),
            ("mean_rank", summary.rank),
        ] {
            row.extra.insert(name.into(), value.into());
        }
        if let Some(predicted) = plan.predicted {
            row.extra.insert("kl_predicted".into(), predicted.into());
        }
        drop(decoder);
        drop(checkpoint);
        if kept.is_none() {
            std::fs::remove_dir_all(&dst).with_context(|| dst.display().to_string())?;
        }
        Ok(row)
    }

    /// Tokens decoded per second in the middle round, one token at a time, with weights and caches as they are stored; the
    /// row's speed so far is that of a prefill.
    fn speed(&self, model: &Model<'_>, caches: Option<&CacheConfig>, row: &mut Row) -> Result<()> {
        let mut cache = match caches {
            Some(config) => {
                let (shapes, decoder) = (model.cache_shapes(), model.decoder());
                CacheSet::new(&shapes, 1, decoder.dtype(), decoder.device(), config)?
            }
            None => model.full_cache(1)?,
        };
        let windows = self.evaluation.inputs();
        let tokens: Vec<u32> = windows.iter().flatten().copied().collect();
        let len = windows.window_len();
        // A token for each round at least, unless windows are shorter than that.
        let least = ROUNDS.min(len.saturating_sub(1)).max(1);
        let decoded = DECODED.min(len.saturating_sub(PROMPT)).max(least);
        let prompt = &tokens[..PROMPT.min(len - decoded)];
        model.forward(&[prompt], &mut cache)?;
        let prefill = row.tokens_per_second;
        let mut rounds = Rounds::default();
        for token in tokens.iter().cycle().skip(prompt.len()).take(decoded) {
            rounds.time(1.0, || model.forward(&[&[*token]], &mut cache))?;
        }
        rounds.fill(row);
        if let Some(prefill) = prefill {
            row.extra.insert(
                "prefill_tokens_per_second".into(),
                (prefill.round() as u64).into(),
            );
        }
        Ok(())
    }
}
