//! Decode-time perplexity: a text is teacher-forced through a cache that evicts.
//!
//! The first tokens of each window are prefilled, the others decoded one at a time; every decoded token is predicted from what the
//! cache still holds. Windows run side by side, because products of matrices are faster than those of vectors, and policies
//! see each window alone.

use std::time::Instant;

use anyhow::{Result, ensure};
use causal_lm::{Decoder, Model, Windows, cross_entropy};
use eval_report::{
    Axis, Column, Reference, Rounds, Row, Section, Stopwatch, format, mean_over_seeds,
};
use kv_lazy::CacheConfig;

use super::peak::{MEAN_OVER_FULL, PeakCache, compare_means};
use super::policy;
use super::rows::{FULL, SUITE, over_budget, over_bytes, reference};
use super::verdict::{Metric, verdict};
use super::{Config, prompt_name, several};
use crate::bar::Bar;
use crate::estimate::Probe;
use crate::model;
use crate::settings::{Settings, one_line, part};
use crate::suites::perplexity::{self, Protocol, file_name};

/// Windows that run side by side at most.
const BATCH: usize = 32;
/// Bytes of keys and values that the full caches of a batch may take.
const BATCH_BYTES: usize = 1 << 30;

const PERPLEXITY: Metric = Metric {
    field: "perplexity",
    falls: true,
    value: |row| row.perplexity,
    show: |value| format::real(value, 3),
};

/// What to run.
#[derive(Debug, Clone)]
pub struct Text {
    /// Model, text and how it is cut into windows.
    pub text: perplexity::Config,
    /// Tokens that are prefilled; a quarter of the window where not asked for.
    pub prompt: Option<usize>,
    /// Windows that run side by side; as memory allows where not asked for.
    pub batch: Option<usize>,
}

/// Measure every policy at every budget, and the full cache in the same way, for each of several models.
pub(crate) fn run(settings: &Settings, config: &Config, texts: &[Text]) -> Result<Vec<Section>> {
    let (mut sections, mut failures) = (Vec::new(), Vec::new());
    for text in texts {
        match one(settings, config, text, texts.len() > 1) {
            Ok(section) => sections.push(section),
            Err(error) => failures.push(model::naming(error, &text.text.model)),
        }
    }
    if sections.is_empty() && !failures.is_empty() {
        return Err(failures.swap_remove(0));
    }
    let failures = failures.iter().map(one_line);
    if let Some((first, _)) = sections.first_mut() {
        first.failures.extend(failures);
    }
    if settings.is_part() {
        let failures = sections
            .into_iter()
            .flat_map(|(section, _)| section.failures);
        return Ok(part(failures.collect()));
    }
    let overview = (texts.len() > 1).then(|| several::overview(&sections));
    let own = sections.into_iter().map(|(section, _)| section);
    Ok(overview.into_iter().chain(own).collect())
}

/// One model, and the window it was run in: among several, one that was made for less than the window has its own.
fn one(settings: &Settings, config: &Config, text: &Text, among: bool) -> Result<(Section, usize)> {
    let checkpoint = settings.weights.open(&text.text.model)?;
    let decoder = model::decoder(settings, &checkpoint)?;
    let mut settings = settings.clone();
    if among {
        let reach = decoder.config().max_positions;
        settings.window = settings.window.map(|window| window.min(reach));
    }
    let settings = &settings;
    let protocol = Protocol::new(settings, &text.text, &decoder)?;
    let windows = protocol.decoding(settings, &text.text.text)?;
    let window = windows.window_len();
    let prompt = text.prompt.unwrap_or(prompt(window));
    ensure!(
        prompt < window,
        "{}: windows have {window} positions and none would be left to decode",
        prompt_name(text.prompt, prompt)
    );
    let model = Model::load(&decoder)?;
    let (mut config, statistics) = config.calibrated(&model, &text.text.model)?;
    let refused = config.add_controls(&model)?;
    let config = &config;
    policy::check(&model, &config.policies, &config.budgets, window)?;
    let batch = text.batch.unwrap_or(batch(&decoder, window));
    let cells = Decoding {
        model: &model,
        windows: &windows,
        prompt,
        batch,
    };

    let runs = config.all_runs();
    let steps = (1 + runs) * windows.count().div_ceil(batch);
    settings.expect("kv", || {
        let positions = windows.count() * window;
        Ok(Probe::of(&decoder, &windows)?.decode((1 + runs) * positions))
    });
    let bar = settings.bar(FULL, steps as u64);
    let full = config.full.cache(window, settings.seed);
    let row = reference(Row::new(SUITE, FULL));
    let path = text.text.model.display();
    let (mut rows, mut failures) = (Vec::new(), Vec::new());
    rows.extend(settings.cells.get(&format!("{path}: {FULL}"), || {
        cells.measure(row, Some(&full), None, &bar)
    })?);
    for (choice, budget) in config.cells() {
        bar.set_label(choice.flags(budget));
        let cell = format!("{path}: {}", choice.flags(budget));
        let row = settings.cells.get(&cell, || {
            let tokens = config.tokens(choice, budget, window, &model)?;
            let draws = (0..config.runs(choice) as u64).map(|draw| {
                let cache = choice.cache(tokens, settings.seed + draw);
                let row = config.row(choice, budget, window, prompt);
                cells.measure(row, Some(&cache), Some(&model), &bar)
            });
            anyhow::Ok(mean_over_seeds(&draws.collect::<Result<Vec<Row>>>()?)?)
        });
        match row {
            Ok(row) => rows.extend(row),
            // The others are worth having.
            Err(error) => failures.push(error.context(choice.flags(budget))),
        }
    }
    bar.finish();
    let name = file_name(&text.text.model);
    compare_with_full(&mut rows, &name);
    let weights = model.weights();
    for row in &mut rows {
        settings.weights.fill(row, &weights);
    }
    let mut section = section(rows, window);
    if among {
        section.title = format!("{}, {name}", section.title);
    }
    let section = protocol
        .facts(section, &text.text.text, windows.count(), windows.targets())
        .fact("prefilled", prompt)
        .fact("decoded", window - prompt)
        .fact("targets", windows.count() * (window - prompt))
        .fact("batch", batch)
        .fact("keys and values", config.stored(decoder.dtype()))
        .fact("prompt", config.prompt_rule.label())
        .fact("query statistics", statistics.as_str());
    let mut section = refused.noted(section);
    let failures = failures
        .into_iter()
        .map(|error| model::naming(error, &text.text.model));
    section.failures = failures.map(|error| one_line(&error)).collect();
    Ok((settings.weights.facts(section, Some(&weights)), window))
}

/// Tokens that are prefilled by default.
pub(crate) fn prompt(window: usize) -> usize {
    (window / 4).max(1)
}

/// Windows side by side that memory allows.
pub(crate) fn batch(decoder: &Decoder<'_>, window: usize) -> usize {
    let config = decoder.config();
    let widths = config.widths.iter().enumerate();
    let channels: usize = widths
        .map(|(layer, widths)| widths.kv_heads * config.head_dim(layer))
        .sum();
    let bytes = 2 * channels * window * decoder.dtype().size_in_bytes();
    (BATCH_BYTES / bytes.max(1)).clamp(1, BATCH)
}

/// How a model decodes texts.
pub(crate) struct Decoding<'a> {
    pub(crate) model: &'a Model<'a>,
    pub(crate) windows: &'a Windows,
    /// Tokens that are prefilled.
    pub(crate) prompt: usize,
    /// Windows that run side by side.
    pub(crate) batch: usize,
}

impl Decoding<'_> {
    /// One run over all windows, a step of `bar` for each batch: quality, bytes and speed of `row`. Where a model is
    /// given to compare with, its full cache decodes the first batch of windows in alternation, step by step.
    pub(crate) fn measure(
        &self,
        mut row: Row,
        eviction: Option<&CacheConfig>,
        dense: Option<&Model<'_>>,
        bar: &Bar,
    ) -> Result<Row> {
        let watch = Stopwatch::start();
        let (mut nll, mut held) = (0.0, PeakCache::default());
        let (mut times, mut dense_times) = (Rounds::default(), Rounds::default());
        for (group, windows) in self.windows.groups(self.batch).enumerate() {
            let first = group * self.batch;
            let windows: Vec<&[u32]> = windows.iter().collect();
            let mut cache = policy::caches(self.model, eviction, first, windows.len())?;
            let part = |range: std::ops::Range<usize>| -> Vec<&[u32]> {
                windows
                    .iter()
                    .map(|window| &window[range.clone()])
                    .collect()
            };
            let mut logits = self.model.forward(&part(0..self.prompt), &mut cache)?;
            let mut beside = match dense.filter(|_| group == 0) {
                Some(dense) => {
                    let mut cache = dense.full_cache(windows.len())?;
                    dense.forward(&part(0..self.prompt), &mut cache)?;
                    Some((dense, cache))
                }
                None => None,
            };
            held.observe(&cache);
            let length = self.windows.window_len();
            for position in self.prompt..length {
                let targets: Vec<u32> = windows.iter().map(|window| window[position]).collect();
                for (sequence, loss) in cross_entropy(&logits, &targets)?.into_iter().enumerate() {
                    if !loss.is_finite() {
                        let error = causal_lm::Error::NonFinite {
                            stage: "the logits".into(),
                            window: first + sequence,
                            position,
                        };
                        return Err(error.into());
                    }
                    nll += loss;
                }
                if position + 1 < length {
                    let tokens = part(position..position + 1);
                    let count = windows.len() as f64;
                    let timed = match &mut beside {
                        Some((dense, cache)) => {
                            dense_times.time(count, || dense.forward(&tokens, cache))?;
                            true
                        }
                        None => dense.is_none(),
                    };
                    let started = Instant::now();
                    logits = self.model.forward(&tokens, &mut cache)?;
                    if timed {
                        times.add(count, started.elapsed());
                    }
                    held.observe(&cache);
                }
            }
            bar.inc(1);
        }
        let targets = self.windows.count() * (self.windows.window_len() - self.prompt);
        let nll = nll / targets as f64;
        row.nll = Some(nll);
        row.perplexity = Some(nll.exp());
        match dense {
            Some(_) => times.fill_beside(&dense_times, &mut row),
            None => times.fill(&mut row),
        }
        held.fill(&mut row);
        watch.stop(&mut row);
        // A row's time is its own: the other model's turns are subtracted.
        row.seconds -= dense_times.spent().as_secs_f64();
        Ok(row)
    }
}

/// Gives every row what the full cache measured; the first row is its.
fn compare_with_full(rows: &mut [Row], model: &str) {
    let Some(full) = rows.first().cloned() else {
        return;
    };
    for row in rows.iter_mut() {
        row.model = Some(model.into());
        row.perplexity_dense = full.perplexity;
        row.kv_bytes_full = full.kv_bytes;
        let speed = row.tokens_per_second_dense.or(full.tokens_per_second);
        row.tokens_per_second_dense = speed;
    }
    compare_means(rows);
}

fn section(rows: Vec<Row>, window: usize) -> Section {
    let reference = rows.first().and_then(|row| row.perplexity);
    let reference = reference.map(|y| Reference {
        name: FULL.into(),
        y,
    });
    let prose = format!(
        "The first part of each window is prefilled, the rest is decoded one token at a time, teacher-forced, under eviction; only decoded \
         tokens count, also for the full cache. A budget is the number of tokens per layer, sequence and KV head right after an eviction; \
         bytes are the peak of the storage per sequence over all layers, also within steps; the mean is over all steps, positions and the policy's state \
         included. Speed is that of all windows of a batch together \
         and without prefill, in alternation with the full cache. {}",
        verdict(&rows, &PERPLEXITY)
    );
    let axis = Axis::log("perplexity of decoded tokens");
    Section {
        title: "KV cache: perplexity under eviction".into(),
        prose,
        columns: vec![
            Column::Method,
            Column::Budget,
            Column::Perplexity,
            Column::PerplexityOverDense,
            Column::KvBytes,
            Column::KvOverFull,
            Column::ExtraShare(MEAN_OVER_FULL.into()),
            Column::StateBytes,
            Column::Extra("tokens_held".into()),
            Column::TokensPerSecond,
            Column::Speedup,
            Column::Seconds,
        ],
        plots: vec![
            over_budget(
                "Perplexity",
                axis.clone(),
                &rows,
                window,
                &PERPLEXITY,
                reference.clone(),
            ),
            over_bytes("Perplexity", axis, &rows, &PERPLEXITY, reference),
        ],
        rows,
        ..Section::default()
    }
}
