//! Speed of generation after a long context: one sequence, full cache against eviction.
//!
//! All caches are filled with the same context and then decode in turn, step by step, so that whatever else the machine does slows
//! all alike. Which tokens are fed does not matter for speed: they are drawn. What a smaller cache can win at most follows from the bytes a step reads,
//! weights and cache; it is reported next to the measured speedup.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use candle_core::DType;
use causal_lm::{CacheSet, Model, Windows, synthetic};
use eval_report::{Column, ROUNDS, Rounds, Row, Section, Stopwatch};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::json;
use tensor_io::WriteOptions;

use super::peak::PeakCache;
use super::policy;
use super::rows::{FULL, SUITE, reference};
use super::{Config, prompt_name};
use crate::estimate::Probe;
use crate::model;
use crate::scratch::Scratch;
use crate::settings::Settings;
use crate::suites::perplexity::file_name;

/// Tokens of context where --window does not say.
const CONTEXT: usize = 8192;
/// Tokens generated before the clock runs: by then policies that evict once a window have seen the context.
const WARM: usize = 128;
/// Tokens generated against the clock where --prompt does not say: two of the longest windows.
const TIMED: usize = 256;
/// Tokens of the context read at a time.
const CHUNK: usize = 512;

/// What to run.
#[derive(Debug, Clone)]
pub struct Speed {
    /// Model; one of random weights where there is none.
    pub model: Option<PathBuf>,
    /// Tokens of context.
    pub prompt: Option<usize>,
}

impl Speed {
    /// Policies where nothing is asked for: the cheapest, the paper's and one that sums, the last two every window.
    pub const POLICIES: [&'static str; 3] = ["streaming", "lagged-h2o", "lazy"];
}

/// Caches of one row and the time they took.
struct Lane {
    row: Row,
    cache: CacheSet,
    held: PeakCache,
    times: Rounds,
}

/// Fill and decode with the full cache and with every policy at every budget.
pub(crate) fn run(settings: &Settings, config: &Config, speed: &Speed) -> Result<Vec<Section>> {
    ensure!(
        settings.samples.is_none(),
        "--samples: --task speed runs one sequence"
    );
    let scratch = Scratch::new()?;
    let window = settings.window.unwrap_or(CONTEXT + WARM + TIMED);
    let dir = match &speed.model {
        Some(dir) => dir.clone(),
        None => random_model(&scratch.path().join("random"), window, settings.seed)?,
    };
    let checkpoint = settings.weights.open(&dir)?;
    let decoder = model::decoder(settings, &checkpoint)?;
    let reach = decoder.config().max_positions;
    ensure!(
        window <= reach,
        "--window {window}: {} was made for {reach} positions",
        dir.display()
    );
    let prompt = speed
        .prompt
        .unwrap_or(window.saturating_sub(WARM + TIMED).max(1));
    ensure!(
        prompt.saturating_add(WARM + ROUNDS) <= window,
        "{}: the window of {window} has no room for {WARM} tokens before the clock runs and {ROUNDS} after",
        prompt_name(speed.prompt, prompt)
    );
    let model = Model::load(&decoder)?;
    let (config, statistics) = &config.calibrated(&model, &dir)?;
    policy::check(&model, &config.policies, &config.budgets, prompt)?;

    let mut rng = ChaCha8Rng::seed_from_u64(settings.seed);
    let vocabulary = decoder.config().vocab as u32;
    let tokens: Vec<u32> = (0..window)
        .map(|_| rng.random_range(0..vocabulary))
        .collect();
    let lanes = 1 + config.cells().len();
    settings.expect("kv", || {
        let context = Windows::of_length(tokens[..prompt].to_vec(), prompt)?;
        let probe = Probe::of(&decoder, &context)?;
        Ok(lanes as f64 * (probe.pass(prompt) + probe.decode(window - prompt)))
    });
    let bar = settings.bar("context", (lanes + (window - prompt)) as u64);
    let watch = Stopwatch::start();

    let mut all = Vec::with_capacity(lanes);
    let mut lane = |row: Row, cache: CacheSet| -> Result<()> {
        let lane = Lane {
            row,
            cache: fill(&model, cache, &tokens[..prompt])?,
            held: PeakCache::default(),
            times: Rounds::default(),
        };
        all.push(lane);
        bar.inc(1);
        Ok(())
    };
    let full = config.full.cache(window, settings.seed);
    let full = policy::caches(&model, Some(&full), 0, 1)?;
    lane(reference(Row::new(SUITE, FULL)), full)?;
    for (choice, budget) in config.cells() {
        let tokens = config.tokens(choice, budget, prompt, &model)?;
        let cache = choice.cache(tokens, settings.seed);
        let cache =
            policy::caches(&model, Some(&cache), 0, 1).with_context(|| choice.flags(budget))?;
        lane(config.row(choice, budget, prompt, prompt), cache)?;
    }
    bar.set_label("generation");
    for (step, token) in tokens[prompt..].chunks(1).enumerate() {
        for lane in &mut all {
            let started = Instant::now();
            model.forward(&[token], &mut lane.cache)?;
            if step >= WARM {
                lane.times.add(1.0, started.elapsed());
                lane.held.observe_between(&lane.cache);
            }
        }
        bar.inc(1);
    }
    bar.finish();

    let weights = model.weights();
    let steps = window - prompt - WARM;
    let full_times = all[0].times.clone();
    let mut rows: Vec<Row> = all
        .into_iter()
        .map(|mut lane| {
            lane.times.fill_beside(&full_times, &mut lane.row);
            lane.held.fill(&mut lane.row);
            lane.row.model = Some(file_name(&dir));
            settings.weights.fill(&mut lane.row, &weights);
            lane.row
        })
        .collect();
    // The lanes ran in turn: what they took in all and held at most is the run's.
    if let Some(first) = rows.first_mut() {
        watch.stop(first);
    }
    let full = rows[0].kv_bytes;
    for row in &mut rows {
        row.kv_bytes_full = full;
        if let (Some(full), Some(held)) = (full, row.kv_bytes) {
            let read = |cache: u64| weights.bytes as f64 + cache as f64;
            let bound = (100.0 * read(full) / read(held)).round() / 100.0;
            row.extra.insert("speed_bound".into(), json!(bound));
        }
    }
    let section = settings
        .weights
        .facts(section(rows), Some(&weights))
        .fact("context", prompt)
        .fact("generated before the clock runs", WARM)
        .fact("generated", steps)
        .fact("weights read per step (bytes)", weights.bytes)
        .fact("keys and values", config.stored(decoder.dtype()))
        .fact("query statistics", statistics.as_str());
    Ok(vec![section])
}

/// Reads the context, in chunks: a policy may evict after each.
fn fill(model: &Model<'_>, mut cache: CacheSet, context: &[u32]) -> Result<CacheSet> {
    for chunk in context.chunks(CHUNK) {
        model.forward(&[chunk], &mut cache)?;
    }
    Ok(cache)
}

/// 21 million parameters whose cache at 8k tokens is as large as they are: a step of one sequence reads as much of either.
fn random_model(dir: &Path, positions: usize, seed: u64) -> Result<PathBuf> {
    let fields = json!({
        "model_type": "llama", "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8,
        "num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 2048, "max_position_embeddings": positions,
        "tie_word_embeddings": true, "rope_theta": 10000.0, "rms_norm_eps": 1e-5,
    });
    let config = tensor_io::Config::new(fields.as_object().cloned().unwrap_or_default());
    let options = WriteOptions::default();
    synthetic::write(&config, DType::F32, dir, &options, synthetic::random(seed))?;
    Ok(dir.to_owned())
}

fn section(rows: Vec<Row>) -> Section {
    Section {
        title: "KV cache: speed of generation".into(),
        prose: "One sequence; every cache is filled with the same context and continues it in alternation with the others, step by step. Budgets are of the \
                context, bytes what caches held after their steps at most, tokens per second of generation alone. The bound is what the bytes of weights and cache that a step \
                reads would allow: at batch 1 the weights are read however small the cache."
            .into(),
        columns: vec![
            Column::Method,
            Column::Budget,
            Column::TokensPerSecond,
            Column::Speedup,
            Column::Extra("speed_bound".into()),
            Column::KvBytes,
            Column::KvOverFull,
            Column::StateBytes,
            Column::Extra("tokens_held".into()),
        ],
        rows,
        ..Section::default()
    }
}
