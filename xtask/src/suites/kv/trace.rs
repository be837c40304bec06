//! Policies replayed on traces: the attention they would have lost, compared with an oracle that knows the future.
//!
//! Traces come from the model's own attention on a text, from files, or from generators with a known truth. Replay is open loop: it
//! ranks cheaply, and the tasks that run the model decide.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor};
use causal_lm::Model;
use eval_report::{Axis, Budget, Column, Row, Section, Stopwatch, mean_over_seeds};
use kv_lazy::attention::Reduce;
use kv_lazy::policy::Threshold;
use kv_lazy::trace::mri::{self, MriHistogram};
use kv_lazy::trace::replay::{LayerReport, ReplayOptions, replay_all};
use kv_lazy::trace::synth::{Drifting, HeavyHitters, Planted, Sizes};
use kv_lazy::trace::{LayerTrace, Trace, TraceMeta, file};
use kv_lazy::{CacheSet, LayerShape, Rotary};
use serde_json::json;
use tensor_io::NoProgress;

use super::policy::{self, Choice};
use super::rows::{FULL, OWN_QUERIES, SUITE, over_budget, over_bytes, reference};
use super::verdict::{Metric, verdict};
use super::{Config, prompt_name, recording};
use crate::model;
use crate::settings::Settings;
use crate::suites::perplexity::{self, Protocol, file_name};

/// Windows recorded where --samples does not say.
const RECORDED: usize = 2;
/// Positions that a generator needs at least.
const LEAST: usize = 64;
/// The most positions of a generated trace: replaying one takes time with their square.
const MOST: usize = 1 << 17;

const MASS: Metric = Metric {
    field: "retained_mass",
    falls: false,
    value: |row| row.retained_mass,
    show: |value| format!("{:.2} %", 100.0 * value),
};

/// Where traces come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// Tokens that recur after log-normal gaps.
    Planted,
    /// Logits that drift.
    Drift,
    /// A fixed few tokens take most of the attention.
    HeavyHitters,
    /// A trace file.
    File(PathBuf),
}

impl Source {
    /// The generators.
    pub const GENERATORS: [Source; 3] = [Source::Planted, Source::Drift, Source::HeavyHitters];
    /// Their names.
    pub const NAMES: [&str; 3] = ["planted", "drift", "heavy-hitters"];
}

impl From<&str> for Source {
    /// A generator by its name, or a file.
    fn from(name: &str) -> Self {
        match name {
            "planted" => Source::Planted,
            "drift" => Source::Drift,
            "heavy-hitters" => Source::HeavyHitters,
            path => Source::File(path.into()),
        }
    }
}

/// What to replay on.
#[derive(Debug, Clone)]
pub struct Traces {
    /// Model and text to record.
    pub recorded: Option<perplexity::Config>,
    /// Generators and files.
    pub sources: Vec<Source>,
    /// Tokens of the prompt, where not a file says.
    pub prompt: Option<usize>,
    /// Folder for the recorded traces.
    pub save: Option<PathBuf>,
}

/// Traces of one kind.
struct Kind {
    name: String,
    traces: Vec<Trace>,
    /// How the model rotated keys, layer by layer; empty where no model did.
    rotary: Vec<Option<Rotary>>,
    /// Where statistics of queries come from, in words.
    statistics: String,
}

/// Replay every policy at every budget on every kind of traces, one section a kind.
pub(crate) fn run(settings: &Settings, config: &Config, traces: &Traces) -> Result<Vec<Section>> {
    let mut sections = Vec::new();
    if let Some(text) = &traces.recorded {
        let cell = format!("trace of {}", text.model.display());
        sections.extend(settings.whole(&cell, || {
            let (kind, config) = record(settings, config, text, traces.prompt)?;
            if let Some(dir) = &traces.save {
                save(&kind.traces, dir)?;
            }
            Ok(vec![replay(settings, &config, &kind)?])
        })?);
    }
    for (index, source) in traces.sources.iter().enumerate() {
        sections.extend(settings.whole(&format!("trace {index}"), || {
            let kind = generate(settings, config, traces.prompt, source)?;
            Ok(vec![replay(settings, config, &kind)?])
        })?);
    }
    Ok(sections)
}

/// The attention of the model on the windows of a text, and the policies with statistics of its queries where they use them.
fn record(
    settings: &Settings,
    config: &Config,
    text: &perplexity::Config,
    prompt: Option<usize>,
) -> Result<(Kind, Config)> {
    let checkpoint = settings.weights.open(&text.model)?;
    let decoder = model::decoder(settings, &checkpoint)?;
    let protocol = Protocol::new(settings, text, &decoder)?;
    let windows = protocol.calibration(&text.text)?;
    let windows = windows.first(settings.samples.unwrap_or(RECORDED));
    let asked = prompt;
    let prompt = asked.unwrap_or((windows.window_len() / 4).max(1));
    ensure!(
        prompt < windows.window_len(),
        "{}: windows have {} positions and none would be left to decode",
        prompt_name(asked, prompt),
        windows.window_len()
    );
    let model = Model::load(&decoder)?;
    let name = file_name(&text.model);
    let one = |window: &[u32]| -> Result<Trace> {
        let recorder = recording::record(&model, model.full_cache(1)?, window)?;
        // The scale comes with the recorded calls.
        let meta = TraceMeta::new(&name, prompt, 1.0);
        Ok(recorder.into_trace(meta, window.to_vec())?)
    };
    let traces = windows.iter().map(one).collect::<Result<_>>()?;
    let rotary = policy::rotary(decoder.config());
    let (config, statistics) = config.calibrated(&model, &text.model)?;
    let kind = Kind {
        name,
        traces,
        rotary,
        statistics,
    };
    Ok((kind, config))
}

fn save(traces: &[Trace], dir: &Path) -> Result<()> {
    std::fs::create_dir_all(dir).with_context(|| format!("--save {}", dir.display()))?;
    for (index, trace) in traces.iter().enumerate() {
        file::write(trace, &dir.join(format!("trace-{index}.safetensors"))).context("--save")?;
    }
    Ok(())
}

/// One trace for each seed, or the one of a file.
fn generate(
    settings: &Settings,
    config: &Config,
    prompt: Option<usize>,
    source: &Source,
) -> Result<Kind> {
    let mut sizes = Sizes::default();
    if let Source::File(file) = source {
        ensure!(
            settings.window.is_none(),
            "--window: {} is as long as it was recorded",
            file.display()
        );
    } else {
        sizes.tokens = settings.window.unwrap_or(sizes.tokens);
        sizes.prompt = prompt.unwrap_or(sizes.prompt);
        ensure!(
            (LEAST..=MOST).contains(&sizes.tokens),
            "--window {}: generated traces have {LEAST} to {MOST} positions",
            sizes.tokens
        );
        ensure!(
            settings.samples.is_none(),
            "--samples: of generated traces there is one for each of --seeds"
        );
        ensure!(
            sizes.prompt < sizes.tokens,
            "{}: traces have {} positions and none would be left to decode",
            prompt_name(prompt, sizes.prompt),
            sizes.tokens
        );
    }
    let seeds = settings.seed..settings.seed + config.seeds as u64;
    let (name, traces) = match source {
        Source::Planted => {
            let generator = Planted {
                sizes,
                ..Planted::default()
            };
            ("planted", seeds.map(|seed| generator.trace(seed)).collect())
        }
        Source::Drift => {
            let generator = Drifting {
                sizes,
                ..Drifting::default()
            };
            ("drift", seeds.map(|seed| generator.trace(seed)).collect())
        }
        Source::HeavyHitters => {
            let generator = HeavyHitters {
                sizes,
                ..HeavyHitters::default()
            };
            (
                "heavy-hitters",
                seeds.map(|seed| generator.trace(seed)).collect(),
            )
        }
        Source::File(path) => {
            let trace = file::read(path).context("--trace")?;
            ensure!(
                trace.meta.prompt_len < trace.tokens.len(),
                "--trace {}: all {} positions are prompt",
                path.display(),
                trace.tokens.len()
            );
            let plain = |theta| {
                let layers = trace.layers.keys().max().map_or(0, |last| last + 1);
                let of = |layer| Some(Rotary::plain(theta, trace.layers.get(&layer)?.head_dim));
                (0..layers).map(of).collect()
            };
            // A file knows the base; of scaled frequencies it has only the model's own description.
            let theta = trace
                .meta
                .rope_theta
                .filter(|_| trace.meta.rope_scaling.is_none());
            return Ok(Kind {
                name: file_name(path),
                rotary: theta.map(plain).unwrap_or_default(),
                statistics: OWN_QUERIES.into(),
                traces: vec![trace],
            });
        }
    };
    Ok(Kind {
        name: name.into(),
        traces,
        rotary: Vec::new(),
        statistics: OWN_QUERIES.into(),
    })
}

/// A replay of all layers of one trace.
struct Replayed {
    row: Row,
    layers: Vec<LayerReport>,
}

fn replay(settings: &Settings, config: &Config, kind: &Kind) -> Result<Section> {
    let window = kind
        .traces
        .iter()
        .map(|t| t.tokens.len())
        .max()
        .unwrap_or(0);
    let prompt = kind
        .traces
        .iter()
        .map(|t| t.meta.prompt_len)
        .max()
        .unwrap_or(0);
    let attention = kind
        .traces
        .iter()
        .map(attention_seconds)
        .collect::<Result<Vec<_>>>()?;
    let mut recurrence = MriHistogram::default();
    for trace in &kind.traces {
        recurrence.merge(&mri::of_trace(
            trace,
            config.threshold(),
            Reduce::Max,
            &NoProgress,
        )?);
    }

    // The oracle first: the others are measured against it.
    let rotated = |choice: &Choice| !choice.needs_rotary() || !kind.rotary.is_empty();
    let mut skipped: Vec<&str> = (config.policies.iter())
        .filter(|choice| !rotated(choice))
        .map(|choice| choice.name.as_str())
        .collect();
    skipped.dedup();
    let mut planned = config.cells();
    planned.retain(|(choice, _)| rotated(choice));
    planned.sort_by_key(|(choice, _)| !choice.is_oracle());
    let cells = 1 + planned.len();
    let bar = settings.bar(kind.name.clone(), (cells * kind.traces.len()) as u64);
    let replayed = |choice: &Choice, budget: Option<Budget>, row: &Row| -> Result<Vec<Replayed>> {
        let one = |(index, trace): (usize, &Trace)| -> Result<Replayed> {
            let len = trace.tokens.len();
            let tokens = budget.map_or(len, |budget| policy::tokens(budget, len));
            let mut cache = choice.cache(tokens, settings.seed + index as u64);
            if cache.rotary.is_none() && cache.layer_rotary.is_empty() {
                cache.layer_rotary = kind.rotary.clone();
            }
            let options = ReplayOptions::default()
                .with_gap(policy::lag(tokens))
                .with_threshold(config.threshold());
            let watch = Stopwatch::start();
            let layers = replay_all(trace, &cache, &options, &NoProgress)?;
            let mut row = row.clone();
            fill(&mut row, &layers, &attention[index]);
            watch.stop(&mut row);
            bar.inc(1);
            Ok(Replayed { row, layers })
        };
        kind.traces
            .iter()
            .enumerate()
            .map(one)
            .collect::<Result<Vec<_>>>()
            .with_context(|| choice.flags(budget))
    };
    let mean = |runs: &[Replayed]| {
        let rows: Vec<Row> = runs.iter().map(|run| run.row.clone()).collect();
        mean_over_seeds(&rows)
    };

    let row = reference(Row::new(SUITE, FULL));
    let mut full = mean(&replayed(&config.full, None, &row)?)?;
    full.kv_bytes_full = full.kv_bytes;
    let bytes = full.kv_bytes;
    let mut rows = vec![full];
    let mut oracles: Vec<(Option<Budget>, Vec<Replayed>)> = Vec::new();
    for (choice, budget) in planned {
        bar.set_label(choice.flags(budget));
        let row = config.row(choice, budget, window, prompt);
        let mut runs = replayed(choice, budget, &row)?;
        if choice.is_oracle() {
            rows.push(mean(&runs)?);
            oracles.push((budget, runs));
            continue;
        }
        if let Some((_, oracle)) = oracles.iter().find(|(at, _)| *at == budget) {
            for (run, oracle) in runs.iter_mut().zip(oracle) {
                let pairs = run.layers.iter().zip(&oracle.layers);
                let gap: f64 = pairs.map(|(layer, oracle)| layer.oracle_gap(oracle)).sum();
                let gap = gap / run.layers.len().max(1) as f64;
                run.row.extra.insert("oracle_gap".into(), json!(gap));
            }
        }
        rows.push(mean(&runs)?);
    }
    bar.finish();
    for row in &mut rows {
        row.model = Some(kind.name.clone());
        row.kv_bytes_full = bytes;
        let extra = &mut row.extra;
        extra.insert("mri_above_1".into(), json!(recurrence.recurring_share()));
        if let Some(p80) = recurrence.percentile(0.8) {
            extra.insert("mri_p80".into(), json!(p80));
        }
    }
    let section = section(kind, rows, window, &recurrence)
        .fact("traces", kind.traces.len())
        .fact("positions", window)
        .fact("prompt", prompt)
        .fact("layers", kind.traces.iter().map(|t| t.layers.len()).max())
        .fact("keys and values", config.full.stored(DType::F16))
        .fact("prompt rule", config.prompt_rule.label())
        .fact("query statistics", kind.statistics.as_str())
        .fact("α", f64::from(config.alpha))
        .fact("k of recall", ReplayOptions::default().top)
        .fact(
            "share of active tokens with MRI above 1",
            recurrence.recurring_share(),
        )
        .fact("80th percentile of MRI", recurrence.percentile(0.8));
    if skipped.is_empty() {
        return Ok(section);
    }
    Ok(section.fact(
        "not run, because keys are not rotated here",
        skipped.join(", "),
    ))
}

/// Fills a row with the means over heads and layers; `attention` is each layer's seconds per step and token of decode attention.
fn fill(row: &mut Row, layers: &[LayerReport], attention: &[f64]) {
    let count = layers.len().max(1) as f64;
    let mean =
        |figure: &dyn Fn(&LayerReport) -> f64| layers.iter().map(figure).sum::<f64>() / count;
    row.retained_mass = Some(mean(&|l| l.mean(|h| h.retained_mass)));
    let heads = || layers.iter().flat_map(|layer| &layer.heads);
    let recurring: u64 = heads().map(|head| head.recurring).sum();
    if recurring > 0 {
        let hits = heads().filter_map(|h| Some(h.recurring_hit_rate? * h.recurring as f64));
        row.recurring_hit_rate = Some(hits.sum::<f64>() / recurring as f64);
    }
    row.kv_bytes = Some(layers.iter().map(|l| l.kv_bytes as u64).sum());
    row.kv_bytes_full = Some(layers.iter().map(|l| l.kv_bytes_full as u64).sum());
    row.state_bytes = Some(layers.iter().map(|l| l.state_bytes as u64).sum());
    let seconds: f64 = layers.iter().map(|l| l.policy_seconds).sum();
    let attention: Vec<f64> = layers
        .iter()
        .zip(attention)
        .map(|(layer, seconds)| seconds * layer.footprint as f64)
        .collect();
    let detail = |(l, attention): (&LayerReport, &f64)| {
        json!({
            "layer": l.layer,
            "retained_mass": l.mean(|h| h.retained_mass),
            "recall_at_k": l.mean(|h| h.recall),
            "output_error": l.mean(|h| h.output_error),
            "lost_values": l.mean(|h| h.lost_values),
            "renormalisation": l.mean(|h| h.renormalisation),
            "mean_tokens": l.mean_tokens,
            "peak_tokens": l.peak_tokens,
            "policy_seconds": l.policy_seconds,
            "attention_seconds": attention,
        })
    };
    row.layers = layers.iter().zip(&attention).map(detail).collect();
    let peak = layers.iter().map(|l| l.peak_tokens).max();
    for (name, value) in [
        ("recall_at_k", json!(mean(&|l| l.mean(|h| h.recall)))),
        (
            "regret",
            json!(mean(&|l| l.mean(|h| h.regret.total())).abs()),
        ),
        ("output_error", json!(mean(&|l| l.mean(|h| h.output_error)))),
        ("ideal_mass", json!(mean(&|l| l.mean(|h| h.ideal_mass)))),
        ("tokens_held", json!(peak)),
        (
            "policy_over_attention",
            json!(seconds / attention.iter().sum::<f64>()),
        ),
    ] {
        row.extra.insert(name.into(), value);
    }
}

/// Seconds that each layer's decode attention takes per step and token held, through a cache that keeps everything.
fn attention_seconds(trace: &Trace) -> Result<Vec<f64>> {
    let one = |layer: &LayerTrace| -> Result<f64> {
        let (mut seconds, mut footprint) = (0.0, 0u64);
        let LayerTrace {
            query_heads,
            kv_heads,
            head_dim,
            tokens,
            ..
        } = *layer;
        let shape = LayerShape {
            query_heads,
            kv_heads,
            head_dim,
            sliding_window: None,
        };
        let tensor = |data: &[f32], heads| {
            Tensor::from_slice(data, (1, heads, tokens, head_dim), &Device::Cpu)
        };
        let (q, k, v) = (
            tensor(&layer.q, query_heads)?,
            tensor(&layer.k, kv_heads)?,
            tensor(&layer.v, kv_heads)?,
        );
        let mut cache = CacheSet::full(&[shape], 1, DType::F32, &Device::Cpu)?;
        let prompt = trace.meta.prompt_len;
        for (from, count) in std::iter::once((0, prompt)).chain((prompt..tokens).map(|t| (t, 1))) {
            let part = |x: &Tensor| x.narrow(2, from, count)?.contiguous();
            let (q, k, v) = (part(&q)?, part(&k)?, part(&v)?);
            let started = Instant::now();
            cache.begin(count)?;
            cache.attend(0, &q, &k, &v, trace.meta.scale)?;
            if from >= prompt {
                seconds += started.elapsed().as_secs_f64();
                footprint += from as u64 + 1;
            }
        }
        Ok(seconds / footprint.max(1) as f64)
    };
    trace.layers.values().map(|layer| one(layer)).collect()
}

fn section(kind: &Kind, rows: Vec<Row>, window: usize, recurrence: &MriHistogram) -> Section {
    let prose = format!(
        "Every policy is replayed on {} and sees the weights that its own cache would have given; what is measured is the full cache's \
         attention on the tokens that it still holds, mean over heads, layers and traces with the range over traces. Recall counts the most \
         attended tokens still held, recurring hits the activations after a gap longer than W, a quarter of the budget, regret the \
         attention on evicted tokens per step, the oracle gap what an oracle in the same budget retains beyond. Output error is relative. \
         Policy time is a share of decode attention over as many tokens. Bytes are those of the storage, or of 16-bit numbers where --kv-dtype names none. Of the active \
         tokens {:.1} % have an MRI above 1{}. {}",
        match &kind.traces[..] {
            [_] => format!("one trace ({})", kind.name),
            traces => format!("{} traces ({})", traces.len(), kind.name),
        },
        100.0 * recurrence.recurring_share(),
        recurrence
            .percentile(0.8)
            .map_or(String::new(), |p80| format!(", 80 % one of at most {p80}")),
        verdict(&rows, &MASS)
    );
    let axis = Axis::linear("retained mass");
    let extra = |name: &str| Column::Extra(name.into());
    Section {
        title: format!("KV cache: attention kept on {}", kind.name),
        prose,
        columns: vec![
            Column::Method,
            Column::Budget,
            Column::RetainedMass,
            Column::RecurringHitRate,
            extra("recall_at_k"),
            extra("regret"),
            extra("oracle_gap"),
            extra("output_error"),
            extra("policy_over_attention"),
            extra("tokens_held"),
            Column::KvBytes,
            Column::KvOverFull,
            Column::StateBytes,
            extra("mri_above_1"),
            extra("mri_p80"),
            Column::Seconds,
        ],
        plots: vec![
            over_budget("Retained mass", axis.clone(), &rows, window, &MASS, None),
            over_bytes("Retained mass", axis, &rows, &MASS, None),
        ],
        rows,
        ..Section::default()
    }
}

impl Config {
    /// When a token counts as active.
    fn threshold(&self) -> Threshold {
        Threshold::Absolute(self.alpha)
    }
}
