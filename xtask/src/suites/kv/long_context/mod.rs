//! Questions about long contexts, put to a chat model whose cache is evicted, quantised or both.
//!
//! A context is read by the model once, through the full cache that all are compared with; its queries, keys and values then fill the cache of every cell. For that full cache this
//! is what reading itself would give, for the others too as far as they attend to a prompt as it does: policies evict when the prompt has been read. Fed in steps, each cell reads
//! the context itself, under eviction. Questions are put one at a time to a copy of the cache.

mod outcome;
mod saved;
mod table;

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use causal_lm::{CacheSet, Model, TextTokenizer, Windows};
use clap::ValueEnum;
use eval_report::{Budget, Section, Stopwatch};
use kv_lazy::CacheConfig;
use kv_lazy::trace::Recorded;
use lm_eval::long_context::{Example, Questions, example};

use super::policy::{self, Choice};
use super::{Config, recording};
use crate::bar::Bar;
use crate::estimate::Probe;
use crate::model;
use crate::settings::Settings;
use crate::suites::perplexity::file_name;
use outcome::{Answered, Outcome};
use table::{Cell, NOTHING, Task};

/// Contexts of each seed where --samples does not say.
const CONTEXTS: usize = 16;
/// Tokens of a decode step up to which policies see the weights of each of its queries.
const STEP: usize = 16;
/// Passes that filling a cache with a recorded context takes, and reading it in steps: from runs on SmolLM2 at 1,000, 2,000 and 4,000 tokens, and from one in steps at 1,000.
const FED: f64 = 0.1;
const IN_STEPS: f64 = 2.0;

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
    /// Folder for the tokens of contexts and questions.
    pub save: Option<PathBuf>,
}

/// All contexts of one kind and length, in the order of their numbers.
struct Asked {
    kind: Questions,
    length: usize,
    examples: Vec<Numbered>,
}

/// A context and what it follows from.
struct Numbered {
    /// Among all seeds' contexts.
    number: usize,
    seed: u64,
    /// Among the seed's contexts.
    index: u64,
    example: Example,
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
    config.check_calibration()?;
    let checkpoint = settings.weights.open(&task.model)?;
    let decoder = model::decoder(settings, &checkpoint)?;
    let tokenizer = TextTokenizer::open(&task.model)?;
    let reach = decoder.config().max_positions;
    // All of them before the model is loaded, so that a length that is too short or too long is found before anything is measured.
    let asked = asked(settings, config, task, &tokenizer, reach)?;
    if let Some(dir) = &task.save {
        saved::write(dir, &asked)?;
    }
    let model = Model::load(&decoder)?;
    let (mut config, statistics) = config.calibrated(&model, &task.model)?;
    let refused = config.add_controls(&model)?;
    for &length in &task.lengths {
        policy::check(&model, &config.policies, &config.budgets, length)?;
    }
    settings.expect("kv", || seconds(&model, &config, task.feed, &asked));
    let run = Run {
        settings,
        config: &config,
        model: &model,
        feed: task.feed,
    };
    let mut tasks = Vec::with_capacity(asked.len());
    for asked in &asked {
        tasks.extend(run.task(asked)?);
    }
    if settings.is_part() {
        return Ok(Vec::new());
    }
    let contexts = settings.samples.unwrap_or(CONTEXTS);
    let mut sections = Vec::new();
    for (tasks, &length) in tasks.chunks(task.questions.len()).zip(&task.lengths) {
        let facts = |section: Section| {
            let section = refused.noted(section);
            section
                .fact("model", file_name(&task.model))
                .fact(
                    "contexts",
                    format!(
                        "{contexts} for each of {} seeds from {}",
                        config.seeds, settings.seed
                    ),
                )
                .fact("contexts are", task.feed.label())
                .fact("full cache stored as", config.stored(decoder.dtype()))
                .fact("prompt", config.prompt_rule.label())
                .fact("question seen while evicting", "no")
                .fact("query statistics", statistics.as_str())
        };
        let summary = table::summary(tasks, length, settings.seed);
        let tables = (tasks.iter()).map(|task| table::section(task, length, settings.seed));
        sections.extend([summary].into_iter().chain(tables).map(facts));
    }
    Ok(sections)
}

/// The contexts of all lengths and kinds, checked against the model's reach.
fn asked(
    settings: &Settings,
    config: &Config,
    task: &LongContext,
    tokenizer: &TextTokenizer,
    reach: usize,
) -> Result<Vec<Asked>> {
    let contexts = settings.samples.unwrap_or(CONTEXTS);
    let mut all = Vec::new();
    for &length in &task.lengths {
        for &kind in &task.questions {
            let one = |number: usize| {
                let seed = settings.seed + (number / contexts) as u64;
                let index = (number % contexts) as u64;
                Ok(Numbered {
                    number,
                    seed,
                    index,
                    example: example(kind, tokenizer, length, seed, index)?,
                })
            };
            let examples = (0..config.seeds * contexts).map(one);
            let examples: Vec<Numbered> = examples
                .collect::<lm_eval::Result<_>>()
                .with_context(|| format!("--context {length}"))?;
            let longest = |one: &Numbered| {
                let asked = one.example.questions.iter().map(|q| q.tokens.len()).max();
                one.example.context.len() + asked.unwrap_or(0)
            };
            let longest = examples.iter().map(longest).max().unwrap_or(0);
            ensure!(
                longest <= reach,
                "--context {length}: the model was made for {reach} positions, questions and answers of {} included make {longest}",
                kind.name()
            );
            all.push(Asked {
                kind,
                length,
                examples,
            });
        }
    }
    Ok(all)
}

/// About how long all rows take on all contexts.
fn seconds(model: &Model<'_>, config: &Config, feed: Feed, asked: &[Asked]) -> Result<f64> {
    let rows = (1 + config.cells().len()) as f64;
    let mut all = 0.0;
    for of_length in asked.chunk_by(|a, b| a.length == b.length) {
        let examples = || of_length.iter().flat_map(|asked| &asked.examples);
        let Some(one) = examples().next() else {
            continue;
        };
        let context = one.example.context.clone();
        let windows = Windows::of_length(context.clone(), context.len())?;
        let probe = Probe::of(model.decoder(), &windows)?;
        for Numbered { example, .. } in examples() {
            let asked = example.questions.iter().map(|q| q.tokens.len()).sum();
            let read = probe.pass(example.context.len());
            all += rows * probe.pass(asked)
                + match feed {
                    Feed::Whole => (1.0 + FED * rows) * read,
                    Feed::Steps => IN_STEPS * rows * read,
                };
        }
    }
    Ok(all)
}

/// What all contexts share.
struct Run<'a> {
    settings: &'a Settings,
    config: &'a Config,
    model: &'a Model<'a>,
    feed: Feed,
}

/// The rows of a context: the full cache's first.
type Rows<'a> = Vec<(&'a Choice, Option<Budget>)>;

impl Run<'_> {
    /// All rows on all contexts of one kind and length; none where other processes measure some of them.
    fn task(&self, asked: &Asked) -> Result<Option<Task>> {
        let (config, name) = (self.config, asked.kind.name());
        let rows: Rows<'_> = [(&config.full, None)]
            .into_iter()
            .chain(config.cells())
            .collect();
        let tokens = |(choice, budget): &(&Choice, Option<Budget>)| {
            config.tokens(choice, *budget, asked.length, self.model)
        };
        let tokens: Vec<usize> = rows.iter().map(tokens).collect::<Result<_>>()?;
        let mut cells = vec![Cell::new(NOTHING, None, "never")];
        cells.extend(
            rows.iter()
                .map(|&(choice, budget)| Cell::of(choice, budget)),
        );
        let count = asked.examples.len();
        let bar = self.settings.bar(name, (count * cells.len()) as u64);
        let mut whole = true;
        for one in &asked.examples {
            let cell = format!("context of {}: {name} {}", asked.length, one.number);
            let answered = self
                .settings
                .cells
                .get(&cell, || self.context(asked, one, (&rows, &tokens), &bar))?;
            match answered {
                Some(answered) => {
                    for (cell, answered) in cells.iter_mut().zip(answered) {
                        cell.push(answered);
                    }
                }
                None => whole = false,
            }
        }
        bar.finish();
        Ok(whole.then_some(Task {
            kind: asked.kind,
            cells,
        }))
    }

    /// What all rows answer about one context; the first token alone before them.
    fn context(
        &self,
        asked: &Asked,
        one: &Numbered,
        (rows, tokens): (&Rows<'_>, &[usize]),
        bar: &Bar,
    ) -> Result<Vec<Answered>> {
        let example = &one.example;
        let watch = Stopwatch::start();
        let mut nothing = self.model.full_cache(1)?;
        self.model.forward(&[&example.context[..1]], &mut nothing)?;
        let mut all = vec![Answered::new(self.ask(&mut nothing, example)?, watch)];
        bar.inc(1);
        let filling = match self.feed {
            Feed::Whole => self.filling(asked.length, one)?,
            Feed::Steps => Vec::new(),
        };
        for (&(choice, budget), &tokens) in rows.iter().zip(tokens) {
            bar.set_label(format!("{} {}", asked.kind.name(), choice.flags(budget)));
            let watch = Stopwatch::start();
            let cache = choice.cache(tokens, one.seed);
            let mut cache = self
                .read(&cache, one, &filling)
                .with_context(|| choice.flags(budget))?;
            all.push(Answered::new(self.ask(&mut cache, example)?, watch));
            bar.inc(1);
        }
        Ok(all)
    }

    /// What the caches of a context are given, as the full cache computes it in its own storage.
    fn filling(&self, length: usize, one: &Numbered) -> Result<Vec<Recorded>> {
        let full = self.config.full.cache(length, one.seed);
        let cache = policy::caches(self.model, Some(&full), one.number, 1)?;
        let recorder = recording::record(self.model, cache, &one.example.context)?;
        let device = self.model.decoder().device();
        let mut layers = recorder.into_layers()?;
        for Recorded { q, k, v, .. } in &mut layers {
            for tensor in [q, k, v] {
                *tensor = tensor.to_device(device)?;
            }
        }
        Ok(layers)
    }

    /// A cache that has read a context.
    fn read(&self, config: &CacheConfig, one: &Numbered, filling: &[Recorded]) -> Result<CacheSet> {
        let context = &one.example.context;
        let mut cache = policy::caches(self.model, Some(config), one.number, 1)?;
        match self.feed {
            Feed::Whole => {
                cache.begin(context.len())?;
                for given in filling {
                    cache.feed(given.layer, &given.q, &given.k, &given.v, given.scores)?;
                }
                cache.end()?;
            }
            Feed::Steps => {
                let (first, rest) = context.split_at(2.min(context.len()));
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
            let answer = question.score(&logits.squeeze(0)?)?;
            outcome.answered(&answer, example.questions.len());
            cache.restore(&held)?;
        }
        Ok(outcome)
    }
}
