//! Recall under eviction: tasks of which a small transformer, trained here, knows the answers as long as its cache holds them.
//!
//! Sequences are decoded one token at a time after a short prompt, through the same caches as any model's. What a policy loses shows as
//! wrong answers.

mod language;
mod oracle;
mod train;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use candle_core::DType;
use causal_lm::{BATCH_TOKENS, Decoder, Model, Windows};
use kv_lazy::trace::Trace;
use kv_lazy::{CacheConfig, PolicyConfig};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use serde_json::json;
use tensor_io::{Checkpoint, NoProgress, WriteOptions};
use toy_lm::Trained;

use super::bootstrap;
use super::peak::{MEAN_OVER_FULL, PeakCache, compare_means};
use super::policy::{self, Choice};
use super::rows::{FULL, SUITE, over_budget, over_bytes, reference};
use super::verdict::{Metric, verdict};
use super::{Config, prompt_name};
use crate::bar::Bar;
use crate::estimate::Probe;
use crate::model;
use crate::scratch::Scratch;
use crate::settings::Settings;
use crate::suites::perplexity::file_name;
use eval_report::{
    Axis, Budget, Column, Reference, Row, Section, Spread, SpreadOver, Stopwatch, format,
};
use language::{BOS, KEYS, Kind, Sample, key, value_index};

/// Sequences of each task where --samples does not say.
const SEQUENCES: usize = 64;
/// Tokens of BOS and filler before a task begins.
const PROMPT: usize = 4;
/// Tokens that the tasks need after the prompt.
const LEAST: usize = 28;
/// Steps of training by which its time is known beforehand.
const TIMED: usize = 8;
/// Accuracy from which the model counts as having learned a task.
const LEARNED: f64 = 0.9;

const ACCURACY: Metric = Metric {
    field: "accuracy",
    falls: false,
    value: |row| row.accuracy,
    show: format::percent,
};

/// What to run.
#[derive(Debug, Clone)]
pub struct Recall {
    /// A model that an earlier run saved, in place of training.
    pub model: Option<PathBuf>,
    /// Folder for the trained model.
    pub save: Option<PathBuf>,
    /// Steps of training.
    pub steps: usize,
    /// Tokens of the prompt.
    pub prompt: Option<usize>,
}

/// Train or open the model and put every policy at every budget to every task, one section a task.
pub(crate) fn run(settings: &Settings, config: &Config, recall: &Recall) -> Result<Vec<Section>> {
    let length = settings.window.unwrap_or(train::LENGTH);
    let prompt = recall.prompt.unwrap_or(PROMPT);
    ensure!(
        prompt.saturating_add(LEAST) <= length,
        "{}: the tasks need {LEAST} tokens after it, sequences have {length}",
        prompt_name(recall.prompt, prompt)
    );
    ensure!(
        recall.model.is_some() || length <= train::POSITIONS,
        "--window {length}: the model that is trained is made for {} positions",
        train::POSITIONS
    );
    let scratch = Scratch::new()?;
    let sequences = settings.samples.unwrap_or(SEQUENCES);
    let mut trained = None;
    let dir = match &recall.model {
        Some(dir) => dir.clone(),
        None => {
            if let Some(dir) = &recall.save {
                ensure!(!dir.exists(), "--save {}: already exists", dir.display());
            }
            settings.expect(SUITE, || {
                let timed = scratch.path().join("timed");
                let (trained, checkpoint) = timed_training(&timed, settings.seed)?;
                let training = trained.seconds * recall.steps as f64 / TIMED as f64;
                let decoder = model::decoder(settings, &checkpoint)?;
                Ok(training + decoding_seconds(&decoder, config, (sequences, length))?)
            });
            let dir = recall.save.clone();
            let dir = dir.unwrap_or_else(|| scratch.path().join("model"));
            let bar = settings.bar("training", recall.steps as u64);
            let options = WriteOptions::default();
            trained = Some(train::train(
                &dir,
                &options,
                recall.steps,
                settings.seed,
                &bar,
            )?);
            bar.finish();
            dir
        }
    };
    let checkpoint = settings.weights.open(&dir)?;
    ensure!(
        checkpoint.config().opt_usize(train::MARK)? == Some(KEYS),
        "--model {}: not a model that --task recall has trained and saved (config.json has no {} of {KEYS})",
        dir.display(),
        train::MARK
    );
    let decoder = model::decoder(settings, &checkpoint)?;
    ensure!(
        length <= decoder.config().max_positions,
        "--window {length}: the model was made for {} positions",
        decoder.config().max_positions
    );
    let model = Model::load(&decoder)?;
    policy::check(&model, &config.policies, &config.budgets, length)?;
    if trained.is_none() {
        settings.expect(SUITE, || {
            decoding_seconds(&decoder, config, (sequences, length))
        });
    }

    let mut curves = Vec::new();
    let mut sections = Vec::new();
    for (index, kind) in Kind::ALL.into_iter().enumerate() {
        let mut rng = ChaCha8Rng::seed_from_u64(settings.seed);
        rng.set_stream(1 + index as u64);
        let samples = (0..sequences).map(|_| kind.sample(length, prompt, &mut rng));
        let samples: Vec<Sample> = samples.collect();
        let foreseen = if config.policies.iter().any(Choice::is_oracle) {
            oracle::record(&model, &samples, prompt)?
        } else {
            Vec::new()
        };
        let cells = Cells {
            settings,
            config,
            model: &model,
            kind,
            samples,
            foreseen: Arc::new(foreseen),
            prompt,
        };
        let (rows, scores) = cells.run(&file_name(&dir))?;
        let mut section = section(kind, rows, length);
        section = section
            .fact("sequences", sequences)
            .fact("length", length)
            .fact("prefilled", prompt)
            .fact("prompt", config.prompt_rule.label())
            .fact("α", f64::from(config.alpha));
        if let Some(trained) = trained {
            section = section
                .fact("training steps", recall.steps)
                .fact("training seconds", trained.seconds)
                .fact("training loss", trained.loss);
        }
        sections.push(section);
        curves.push((kind, scores));
    }
    sections.extend(areas(config, &curves, length, settings.seed));
    Ok(sections)
}

/// A few steps of training, and the model that they make.
fn timed_training(dir: &Path, seed: u64) -> Result<(Trained, Checkpoint)> {
    let trained = train::train(dir, &WriteOptions::default(), TIMED, seed, &NoProgress)?;
    Ok((trained, causal_lm::open(dir)?))
}

/// About how long it takes to decode all sequences.
fn decoding_seconds(
    decoder: &Decoder<'_>,
    config: &Config,
    (sequences, length): (usize, usize),
) -> Result<f64> {
    let mut rng = ChaCha8Rng::seed_from_u64(0);
    let batch = (0..BATCH_TOKENS / length + 1)
        .flat_map(|_| Kind::ALL[0].sample(length, PROMPT, &mut rng).tokens);
    let windows = Windows::cut(&batch.collect::<Vec<_>>(), length, None)?;
    let decoded = Kind::ALL.len() * sequences * length * (1 + config.all_runs());
    Ok(Probe::of(decoder, &windows)?.decode(decoded))
}

/// The sequences' scores of one policy at one budget.
struct Scores<'a> {
    choice: &'a Choice,
    budget: Budget,
    scores: Vec<f64>,
}

/// What all cells of a task share.
struct Cells<'a> {
    settings: &'a Settings,
    config: &'a Config,
    model: &'a Model<'a>,
    kind: Kind,
    samples: Vec<Sample>,
    /// Each sample's attention under the full cache, for the oracle.
    foreseen: Arc<Vec<Trace>>,
    prompt: usize,
}

impl<'a> Cells<'a> {
    /// All rows, the full cache's first, and the scores behind those of policies.
    fn run(&self, model: &str) -> Result<(Vec<Row>, Vec<Scores<'a>>)> {
        let config = self.config;
        let length = self.samples[0].tokens.len();
        let runs: usize = config.cells().iter().map(|(c, _)| config.runs(c)).sum();
        let bar = self.settings.bar(self.kind.name(), (1 + runs) as u64);
        let full = reference(Row::new(SUITE, FULL));
        let cache = config.full.cache(length, self.settings.seed);
        let mut rows = vec![self.row(full, &[cache], &bar)?.0];
        let mut all = Vec::new();
        for (choice, budget) in config.cells() {
            bar.set_label(format!("{} {}", self.kind.name(), choice.name));
            let tokens = config.tokens(choice, budget, length, self.model)?;
            let draw = |draw| choice.cache(tokens, self.settings.seed + draw);
            let draws: Vec<_> = (0..config.runs(choice) as u64).map(draw).collect();
            let row = config.row(choice, budget, length, self.prompt);
            let (row, scores) = self
                .row(row, &draws, &bar)
                .with_context(|| choice.flags(budget))?;
            rows.push(row);
            if let Some(budget) = budget {
                all.push(Scores {
                    choice,
                    budget,
                    scores,
                });
            }
        }
        bar.finish();
        let (dense, bytes) = (rows[0].accuracy, rows[0].kv_bytes);
        for row in &mut rows {
            row.model = Some(model.into());
            row.accuracy_dense = dense;
            row.kv_bytes_full = bytes;
            row.extra.insert("task".into(), json!(self.kind.name()));
        }
        compare_means(&mut rows);
        Ok((rows, all))
    }

    /// A row over runs that differ in their draws, and the sequences' mean scores.
    fn row(&self, mut row: Row, draws: &[CacheConfig], bar: &Bar) -> Result<(Row, Vec<f64>)> {
        let watch = Stopwatch::start();
        let mut held = PeakCache::default();
        let mut scores = vec![0.0; self.samples.len()];
        for draw in draws {
            let run = self.answer(draw, &mut held)?;
            let share = 1.0 / draws.len() as f64;
            scores
                .iter_mut()
                .zip(run)
                .for_each(|(sum, x)| *sum += share * x);
            bar.inc(1);
        }
        let everyone: Vec<usize> = (0..scores.len()).collect();
        row.accuracy = Some(bootstrap::mean(&scores, &everyone));
        let interval = bootstrap::interval(scores.len(), self.settings.seed, |drawn| {
            bootstrap::mean(&scores, drawn)
        });
        bootstrap::note(&mut row, "accuracy", interval);
        held.fill(&mut row);
        watch.stop(&mut row);
        Ok((row, scores))
    }

    /// The score of each sequence: the share of its questions that were answered right, of a chain whether all were.
    fn answer(&self, config: &CacheConfig, held: &mut PeakCache) -> Result<Vec<f64>> {
        let mut cache = match &config.decode {
            PolicyConfig::Oracle(_) => oracle::caches(self.model, config, &self.foreseen)?,
            _ => policy::caches(self.model, Some(config), 0, self.samples.len())?,
        };
        let mut tokens: Vec<Vec<u32>> = self.samples.iter().map(|s| s.tokens.clone()).collect();
        let mut right = vec![0usize; self.samples.len()];
        let mut next = vec![0usize; self.samples.len()];
        let mut start = 0;
        while start < tokens[0].len() {
            let end = if start == 0 { self.prompt } else { start + 1 };
            let step: Vec<&[u32]> = tokens.iter().map(|t| &t[start..end]).collect();
            let logits = self.model.forward(&step, &mut cache)?;
            held.observe(&cache);
            start = end;
            let asked = |i: usize| self.samples[i].questions.get(next[i]).copied();
            let asked: Vec<_> = (0..tokens.len()).map(asked).collect();
            if asked.iter().flatten().all(|&(at, _)| at + 1 != end) {
                continue;
            }
            let logits = logits.to_dtype(DType::F32)?.to_vec2::<f32>()?;
            for (i, asked) in asked.into_iter().enumerate() {
                let Some((_, answer)) = asked.filter(|&(at, _)| at + 1 == end) else {
                    continue;
                };
                let found = best(&logits[i]);
                right[i] += usize::from(found == answer);
                if let Some(&at) = self.samples[i].follow.get(next[i]) {
                    // An answer that is no value leads nowhere.
                    tokens[i][at] = value_index(found).map_or(BOS, key);
                }
                next[i] += 1;
            }
        }
        let score = |(sample, right): (&Sample, usize)| {
            let asked = sample.questions.len();
            match self.kind {
                Kind::Chain => f64::from(u8::from(right == asked)),
                _ => right as f64 / asked as f64,
            }
        };
        Ok(self.samples.iter().zip(right).map(score).collect())
    }
}

/// The most likely token.
fn best(logits: &[f32]) -> u32 {
    let best = logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1));
    best.map_or(BOS, |(token, _)| token as u32)
}

/// The rows with their confidence intervals where plots and verdicts look for ranges.
fn with_intervals(rows: &[Row]) -> Vec<Row> {
    let with = |row: &Row| {
        let bound = |name: &str| row.extra.get(name).and_then(serde_json::Value::as_f64);
        let mut row = row.clone();
        if let (Some(min), Some(max)) = (bound("accuracy_low"), bound("accuracy_high")) {
            let spread = Spread {
                runs: 1,
                min,
                max,
                over: SpreadOver::Seeds,
            };
            row.spread.insert(ACCURACY.field.into(), spread);
        }
        row
    };
    rows.iter().map(with).collect()
}

fn section(kind: Kind, rows: Vec<Row>, length: usize) -> Section {
    let ranged = with_intervals(&rows);
    let full = rows[0].accuracy.unwrap_or(0.0);
    let learned = if full < LEARNED {
        " The model has not learned this task: with the full cache it answers too little to compare policies."
    } else {
        ""
    };
    let prose = format!(
        "{} The model starts near a constructed circuit, a head that looks one token back and one that matches, because \
         training from random weights does not find it in so few steps; every weight is trained from there. Answers are \
         counted in decoding under eviction, with 95 % bootstrap intervals over sequences; a policy loses to random where \
         its accuracy is below random's interval.{learned} {}",
        kind.about(),
        verdict(&ranged, &ACCURACY)
    );
    let reference = Some(Reference {
        name: FULL.into(),
        y: full,
    });
    let axis = Axis::linear("accuracy");
    let title = format!("Accuracy on {}", kind.name());
    let plots = vec![
        over_budget(
            &title,
            axis.clone(),
            &ranged,
            length,
            &ACCURACY,
            reference.clone(),
        ),
        over_bytes(&title, axis, &ranged, &ACCURACY, reference),
    ];
    Section {
        title: format!("KV cache: recall, {}", kind.name()),
        prose,
        columns: vec![
            Column::Method,
            Column::Budget,
            Column::Accuracy,
            Column::Extra("accuracy_low".into()),
            Column::Extra("accuracy_high".into()),
            Column::KvBytes,
            Column::KvOverFull,
            Column::ExtraShare(MEAN_OVER_FULL.into()),
            Column::StateBytes,
            Column::Extra("tokens_held".into()),
            Column::Seconds,
        ],
        plots,
        rows,
        ..Section::default()
    }
}

/// The area under each policy's accuracy over its budgets, where there are several.
fn areas(
    config: &Config,
    curves: &[(Kind, Vec<Scores<'_>>)],
    length: usize,
    seed: u64,
) -> Option<Section> {
    let mut budgets: Vec<(f64, Budget)> = config
        .budgets
        .iter()
        .map(|&budget| (policy::tokens(budget, length) as f64, budget))
        .collect();
    budgets.sort_by(|a, b| a.0.total_cmp(&b.0));
    budgets.dedup_by_key(|(tokens, _)| *tokens);
    if budgets.len() < 2 {
        return None;
    }
    let x: Vec<f64> = budgets.iter().map(|(tokens, _)| *tokens).collect();
    let mut rows = Vec::new();
    // What comes with a budget of its own has no curve.
    let varied = |choice: &&Choice| !choice.is_full() && !choice.is_fixed();
    for choice in config.policies.iter().filter(varied) {
        let mut row = Row::new(SUITE, &choice.name);
        if choice.is_random() {
            row = row.control();
        }
        for (kind, scores) in curves {
            let own = |budget| {
                let mut scores = scores.iter();
                scores.find(|s| s.choice.name == choice.name && s.budget == budget)
            };
            let curve: Vec<&[f64]> = budgets
                .iter()
                .filter_map(|(_, budget)| Some(&own(*budget)?.scores[..]))
                .collect();
            let area = |drawn: &[usize]| {
                let y: Vec<f64> = curve.iter().map(|s| bootstrap::mean(s, drawn)).collect();
                bootstrap::area(&x, &y)
            };
            let count = curve.first().map_or(0, |scores| scores.len());
            let everyone: Vec<usize> = (0..count).collect();
            let interval = bootstrap::interval(count, seed, area);
            let name = format!("area_{}", kind.name());
            bootstrap::note(&mut row, &name, interval);
            row.extra.insert(name, json!(area(&everyone)));
        }
        rows.push(row);
    }
    let columns = curves.iter().flat_map(|(kind, _)| {
        ["", "_low", "_high"].map(|end| Column::Extra(format!("area_{}{end}", kind.name())))
    });
    Some(Section {
        title: "KV cache: recall, area under accuracy over budget".into(),
        prose: "Mean accuracy over the range of the budgets, by trapezoids over tokens, with 95 % bootstrap intervals over sequences. Budgets are \
                nominal: what policies hold at them stands in the tasks' own tables."
            .into(),
        columns: std::iter::once(Column::Method).chain(columns).collect(),
        rows,
        ..Section::default()
    })
}
