//! Questions about long contexts, put to a chat model whose cache is evicted, quantised or both.
//!
//! A context is read by the model once, with the full cache; its queries, keys and values then fill the cache of every cell, which is exact, because a policy evicts
//! when the prompt has been read. Fed in steps, each cell reads the context itself, under eviction. Questions are put one at a time to a copy of the cache.

mod table;

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use candle_core::{Device, Tensor};
use causal_lm::{CacheSet, Model, TextTokenizer};
use clap::ValueEnum;
use eval_report::{Budget, Section, Stopwatch, format};
use kv_lazy::CacheConfig;
use kv_lazy::policy::tri_attention::QueryStatistics;
use kv_lazy::trace::{Recorder, Trace, TraceMeta};
use lm_eval::long_context::{Answer, Example, Questions, example};

use super::Config;
use super::policy::{self, Choice};
use crate::model;
use crate::settings::Settings;
use crate::suites::perplexity::file_name;
use table::{Cell, NOTHING, Outcome, Task};

/// Contexts of each seed where --samples does not say.
const CONTEXTS: usize = 16;
/// Tokens of the calibration text.
const CALIBRATION: usize = 1024;
/// Fewest of them that are enough for statistics.
const FEWEST: usize = 512;
/// Tokens of a decode step up to which policies see the weights of each of its queries.
const STEP: usize = 16;

/// How contexts are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Feed {
    /// As one prompt, evicted once when it has been read: prefill compression
    Whole,
    /// In decode steps of 16 tokens, under eviction: decode-time eviction
    Steps,
}

impl Feed {
    fn label(self) -> &'static str {
        match self {
            Feed::Whole => "read as one prompt and evicted once: prefill compression",
            Feed::Steps => "read in decode steps of 16 tokens under eviction: decode-time eviction",
        }
    }
}

/// What to run.
#[derive(Debug, Clone)]
pub struct LongContext {
    /// A chat model.
    pub model: PathBuf,
    /// What is asked.
    pub questions: Vec<Questions>,
    /// Tokens of the contexts.
    pub lengths: Vec<usize>,
    /// How they are read.
    pub feed: Feed,
    /// Text that query statistics are taken from.
    pub calibration: Option<PathBuf>,
}

/// Ask all questions at all lengths, one section each, and a summary for each length.
pub(crate) fn run(
    settings: &Settings,
    config: &Config,
    task: &LongContext,
) -> Result<Vec<Section>> {
    ensure!(
        settings.window.is_none(),
        "--window: the lengths of --task long-context are those of --context"
    );
    if let Some(text) = &task.calibration {
        ensure!(
            config.policies.iter().any(Choice::takes_calibration),
            "--calib {}: none of the policies takes statistics of queries",
            text.display()
        );
    }
    let checkpoint = settings.weights.open(&task.model)?;
    let decoder = model::decoder(settings, &checkpoint)?;
    let tokenizer = TextTokenizer::open(&task.model)?;
    let model = Model::load(&decoder)?;
    let reach = decoder.config().max_positions;
    for &length in &task.lengths {
        ensure!(
            length + 64 <= reach,
            "--context {length}: the model was made for {reach} positions, questions and answers included"
        );
        policy::check(&model, &config.policies, &config.budgets, length)?;
    }
    let mut config = config.clone();
    let mut statistics_of = "the sequence's own".to_string();
    if let Some(text) = &task.calibration {
        let (statistics, tokens) = calibrate(&model, &tokenizer, text)?;
        statistics_of = format!("{tokens} tokens of {}", file_name(text));
        let policies = config.policies.into_iter();
        config.policies = policies
            .map(|choice| choice.calibrated(&statistics))
            .collect();
    }
    let run = Run {
        settings,
        config: &config,
        model: &model,
        tokenizer: &tokenizer,
        feed: task.feed,
        contexts: settings.samples.unwrap_or(CONTEXTS),
    };
    let mut sections = Vec::new();
    for &length in &task.lengths {
        let facts = |section: Section| {
            section
                .fact("model", file_name(&task.model))
                .fact(
                    "contexts",
                    format!(
                        "{} for each of {} seeds from {}",
                        run.contexts, config.seeds, settings.seed
                    ),
                )
                .fact("contexts are", task.feed.label())
                .fact("full cache stored as", config.stored(decoder.dtype()))
                .fact("prompt", config.prompt_rule.label())
                .fact("question seen while evicting", "no")
                .fact("query statistics", statistics_of.as_str())
        };
        sections.extend(settings.whole(&format!("context of {length}"), || {
            let tasks = task.questions.iter().map(|&kind| run.task(kind, length));
            let tasks = tasks.collect::<Result<Vec<_>>>()?;
            let summary = table::summary(&tasks, length, settings.seed);
            let tables = tasks
                .iter()
                .map(|task| table::section(task, length, settings.seed));
            Ok([summary].into_iter().chain(tables).map(facts).collect())
        })?);
    }
    Ok(sections)
}

/// Statistics of the model's queries on the beginning of a text, and of how many tokens.
fn calibrate(
    model: &Model<'_>,
    tokenizer: &TextTokenizer,
    text: &std::path::Path,
) -> Result<(QueryStatistics, usize)> {
    let mut tokens = tokenizer.encode_file(text).context("--calib")?;
    tokens.truncate(CALIBRATION);
    ensure!(
        tokens.len() >= FEWEST,
        "--calib {}: {}, where statistics of queries need {FEWEST}",
        text.display(),
        format::counted(tokens.len(), "token")
    );
    let trace = record(model, &tokens)?;
    let rotary = policy::rotary(model.decoder().config());
    let of = |layer: usize| rotary.get(layer).and_then(Option::as_ref);
    Ok((kv_lazy::calibrate::queries(&[trace], of)?, tokens.len()))
}

/// Queries, keys and values of a text under the full cache.
fn record(model: &Model<'_>, tokens: &[u32]) -> Result<Trace> {
    let mut cache = model.full_cache(1)?;
    cache.record(Recorder::new())?;
    model.forward(&[tokens], &mut cache)?;
    let recorder = cache.take_recorder().context("a recording was begun")?;
    Ok(recorder.into_trace(TraceMeta::new("", tokens.len(), 1.0), tokens.to_vec())?)
}

/// One layer's queries, keys and values of a context.
struct Filling {
    layer: usize,
    q: Tensor,
    k: Tensor,
    v: Tensor,
}

/// What all tasks share.
struct Run<'a> {
    settings: &'a Settings,
    config: &'a Config,
    model: &'a Model<'a>,
    tokenizer: &'a TextTokenizer,
    feed: Feed,
    contexts: usize,
}

impl Run<'_> {
    /// All cells on all contexts of one kind and length.
    fn task(&self, kind: Questions, length: usize) -> Result<Task> {
        let config = self.config;
        let full = [(&config.full, None)];
        let choices: Vec<(&Choice, Option<Budget>)> =
            full.into_iter().chain(config.cells()).collect();
        let mut cells = Vec::with_capacity(choices.len() + 1);
        cells.push(Cell::new(NOTHING, None, "never"));
        let mut tokens = Vec::with_capacity(choices.len());
        for &(choice, budget) in &choices {
            cells.push(Cell::of(choice, budget));
            let fit = config.tokens(choice, budget, length, self.model);
            tokens.push(fit.with_context(|| choice.flags(budget))?);
        }
        let count = config.seeds * self.contexts;
        let bar = self.settings.bar(kind.name(), (count * cells.len()) as u64);
        for index in 0..count {
            let seed = self.settings.seed + (index / self.contexts) as u64;
            let number = (index % self.contexts) as u64;
            let example = example(kind, self.tokenizer, length, seed, number)?;
            let mut nothing = self.model.full_cache(1)?;
            self.model.forward(&[&example.context[..1]], &mut nothing)?;
            cells[0].push(self.ask(&mut nothing, &example)?);
            bar.inc(1);
            let filling = match self.feed {
                Feed::Whole => fill_with(record(self.model, &example.context)?)?,
                Feed::Steps => (Vec::new(), 1.0),
            };
            for (cell, (&(choice, budget), &tokens)) in
                cells[1..].iter_mut().zip(choices.iter().zip(&tokens))
            {
                bar.set_label(format!("{} {}", kind.name(), choice.flags(budget)));
                let watch = Stopwatch::start();
                let cache = choice.cache(tokens, seed);
                let mut cache = self
                    .read(&cache, index, &example, &filling)
                    .with_context(|| choice.flags(budget))?;
                cell.push(self.ask(&mut cache, &example)?);
                cell.took(watch);
                bar.inc(1);
            }
        }
        bar.finish();
        Ok(Task { kind, cells })
    }

    /// A cache that has read a context.
    fn read(
        &self,
        config: &CacheConfig,
        index: usize,
        example: &Example,
        (filling, scale): &(Vec<Filling>, f64),
    ) -> Result<CacheSet> {
        let mut cache = policy::caches(self.model, Some(config), index, 1)?;
        match self.feed {
            Feed::Whole => {
                cache.begin(example.context.len())?;
                for Filling { layer, q, k, v } in filling {
                    cache.feed(*layer, q, k, v, *scale)?;
                }
                cache.end()?;
            }
            Feed::Steps => {
                let (first, rest) = example.context.split_at(2.min(example.context.len()));
                // From the second token on it is generation.
                for step in first.chunks(1).chain(rest.chunks(STEP)) {
                    self.model.forward(&[step], &mut cache)?;
                }
            }
        }
        Ok(cache)
    }

    /// All questions, each after the context alone, and what the cache holds before them.
    fn ask(&self, cache: &mut CacheSet, example: &Example) -> Result<Outcome> {
        let mut outcome = Outcome::of(cache, example.context.len());
        let held = cache.snapshot();
        for question in &example.questions {
            let tokens = &question.tokens;
            let logits = self
                .model
                .forward_all(&[&tokens[..tokens.len() - 1]], cache)?;
            let answer: Answer = question.score(&logits.squeeze(0)?)?;
            outcome.exact += answer.exact / example.questions.len() as f64;
            outcome.nats += answer.nats;
            outcome.tokens += answer.tokens;
            cache.restore(&held)?;
        }
        Ok(outcome)
    }
}

/// A context's tensors, layer by layer, and the factor on q·k.
fn fill_with(trace: Trace) -> Result<(Vec<Filling>, f64)> {
    let scale = trace.meta.scale;
    let filling = trace.layers.into_iter().map(|(layer, data)| {
        let tensor = |numbers: &[f32], heads| {
            let shape = (1, heads, data.tokens, data.head_dim);
            Tensor::from_slice(numbers, shape, &Device::Cpu)
        };
        Ok(Filling {
            layer,
            q: tensor(&data.q, data.query_heads)?,
            k: tensor(&data.k, data.kv_heads)?,
            v: tensor(&data.v, data.kv_heads)?,
        })
    });
    Ok((filling.collect::<Result<_>>()?, scale))
}
