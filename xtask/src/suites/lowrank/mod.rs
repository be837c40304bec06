//! Low-rank repair: output error, quality and size by compressor, method and rank.

mod cells;
mod check;
mod save;
mod start;
mod table;
mod verdict;

use std::path::PathBuf;

use anyhow::{Context, Result};
use causal_lm::Decoder;
use eval_report::{DENSE, Row, Section};
use lowrank_eora::compress::Compressor;
use lowrank_eora::repair::{Method, Repair, Spread};
use tensor_io::WriteOptions;

use super::held_out;
use super::perplexity::{self, Protocol, file_name, tokens};
use crate::estimate::Probe;
use crate::model::naming;
use crate::scratch::Scratch;
use crate::settings::{Settings, part};

use cells::Lowrank;
use start::GivenModel;
use start::{Start, open};

pub use save::Output;

/// What to compress, repair and measure.
#[derive(Debug, Clone)]
pub struct Config {
    /// Model, text and protocol of the evaluation.
    pub perplexity: perplexity::Config,
    /// Text to calibrate on.
    pub calib: PathBuf,
    /// Windows to calibrate on.
    pub calib_samples: usize,
    /// Other windows of the same text, to measure the loss on.
    pub held_out_samples: usize,
    /// Compressors.
    pub compressors: Vec<Compressor>,
    /// The model as another tool compressed it, a folder or a GGUF file: repaired instead of what the compressors make.
    pub compressed: Option<PathBuf>,
    /// Methods; `None` leaves the compressed model as it is.
    pub methods: Vec<Option<Method>>,
    /// Ranks.
    pub ranks: Vec<usize>,
    /// Whether and how the bytes of a rank are spread over linears by what they gain.
    pub allocate: Option<Spread>,
    /// Everything of the repair but method and rank.
    pub repair: Repair,
    /// Whether each block is compressed behind the repaired ones.
    pub one_pass: bool,
    /// Whether to measure what the bytes of the factors buy otherwise.
    pub controls: bool,
    /// Folder for what is written.
    pub save: Option<PathBuf>,
    /// What is written; by default what the methods make.
    pub outputs: Option<Vec<Output>>,
    /// How checkpoints are written.
    pub write: WriteOptions,
    /// Folder for the state of each block.
    pub resume: Option<PathBuf>,
    /// Whether to measure the hidden states.
    pub hidden_metrics: bool,
}

/// Name of the method that leaves the compressed model as it is.
pub const NONE: &str = "none";

/// What a method is called; `None` leaves the compressed model as it is.
pub(crate) fn method_name(method: Option<Method>) -> &'static str {
    method.map_or(NONE, Method::name)
}

impl Config {
    /// No compressors, methods and ranks, all else by default.
    pub fn new(perplexity: perplexity::Config, calib: PathBuf) -> Self {
        Self {
            perplexity,
            calib,
            calib_samples: 128,
            held_out_samples: 32,
            compressors: Vec::new(),
            compressed: None,
            methods: Vec::new(),
            ranks: Vec::new(),
            allocate: None,
            repair: Repair::default(),
            one_pass: false,
            controls: true,
            save: None,
            outputs: None,
            write: WriteOptions::default(),
            resume: None,
            hidden_metrics: false,
        }
    }

    /// About how long the run takes with so many tokens to calibrate on and to hold out, and to evaluate on.
    pub(crate) fn seconds(&self, probe: &Probe, texts: usize, evaluation: usize) -> f64 {
        let starts = self.compressors.len().max(1) as f64;
        let repairs = self.methods.iter().flatten().count() * self.ranks.len();
        // Each rank of a compressor has a control, which the methods share.
        let controls = match self.controls && repairs > 0 {
            true => self.ranks.len(),
            false => 0,
        };
        // The dense and the repaired model side by side; sums and factorisations for compressing and for repairing.
        let walk = 2.0 * probe.pass(texts) + probe.grams(texts, true) + probe.solves();
        let cell = walk + probe.copy() + probe.pass(evaluation);
        let spread = if self.allocate.is_some() { walk } else { 0.0 };
        let cells = (1 + repairs + controls) as f64 * cell + repairs as f64 * spread;
        probe.pass(evaluation) + starts * cells
    }

    /// The models it reads, which may be names on a hub.
    pub(crate) fn models(&mut self) -> Vec<&mut PathBuf> {
        std::iter::once(&mut self.perplexity.model)
            .chain(&mut self.compressed)
            .collect()
    }
}

/// Compress and repair in every combination and measure each. Where some combinations fail, the section has the rows of
/// the others and names those that failed.
///
/// # Errors
/// A model or text that cannot be read or run, what is known beforehand to fail, and the failure of the first combination
/// where all fail.
pub fn run(settings: &Settings, config: &Config) -> Result<Vec<Section>> {
    check::settings(config)?;
    let checkpoint = causal_lm::open(&config.perplexity.model)?;
    let decoder = open(settings, &checkpoint)?;
    let compressed = config.compressed.as_ref();
    let compressed = compressed.map(causal_lm::open).transpose()?;
    let given = compressed.as_ref().map(|compressed| {
        let given = GivenModel::open(settings, compressed);
        given.with_context(|| compressed.dir().display().to_string())
    });
    let given = given.transpose()?;
    check::model(config, &decoder, given.as_ref())?;
    save::make_folder(config)?;
    let scratch = Scratch::new()?;
    let template = save::template(config, &decoder, given.as_ref(), scratch.path())?;
    let protocol = Protocol::new(settings, &config.perplexity, &decoder)?;
    let evaluation = protocol.evaluation(settings, &config.perplexity.text)?;
    let windows = protocol.calibration(&config.calib)?;
    let wanted = (config.calib_samples, config.held_out_samples);
    let (calibration, held_out) = held_out::split(&windows, wanted, settings.seed)
        .with_context(|| config.calib.display().to_string())?;

    let suite = Lowrank {
        settings,
        config,
        decoder: &decoder,
        evaluation: &evaluation,
        calibration: &calibration,
        held_out: &held_out,
        state: config.resume.as_deref().unwrap_or(scratch.path()),
        scratch: scratch.path(),
        template: template.as_ref(),
    };
    let starts: Vec<Start<'_>> = match &given {
        Some(given) => vec![Start::given(config, given)],
        None => config.compressors.iter().map(Start::compressor).collect(),
    };
    let texts = tokens(&calibration) + tokens(&held_out);
    settings.expect("lowrank", || {
        let probe = Probe::of(&decoder, &calibration)?;
        Ok(config.seconds(&probe, texts, tokens(evaluation.inputs())))
    })?;
    let mut rows: Vec<Row> = Vec::new();
    rows.extend(settings.cells.get(DENSE, || suite.dense())?);
    let repairs = config.methods.iter().flatten().count() * config.ranks.len();
    let bar = settings.bar("repair", (starts.len() * (1 + repairs)) as u64);
    let mut failures = Vec::new();
    for start in &starts {
        // What failed is not finished, but the report shows the rest of it.
        let (mut made, mut failed) = (Vec::new(), Vec::new());
        let finished = settings.cells.get(&start.name, || {
            (made, failed) = suite.start(start, &bar);
            match failed.pop() {
                None => Ok(std::mem::take(&mut made)),
                Some(error) => Err(error),
            }
        });
        match finished {
            Ok(finished) => rows.extend(finished.into_iter().flatten()),
            Err(error) => {
                rows.append(&mut made);
                failures.extend(failed.into_iter().chain([error]));
            }
        }
    }
    bar.finish();
    if rows.iter().all(|row| row.method == DENSE) && !failures.is_empty() {
        return Err(failures.swap_remove(0));
    }
    let model = &config.perplexity.model;
    let failures = failures.into_iter().map(|error| naming(error, model));
    let failures = failures.map(|error| format!("{error:#}")).collect();
    if settings.is_part() {
        return Ok(part(failures));
    }
    compare_with_dense(&mut rows, &decoder, &file_name(&config.perplexity.model));
    let names: Vec<&str> = starts.iter().map(|start| start.name.as_str()).collect();
    let mut section = protocol
        .facts(
            table::section(config, &names, rows),
            &config.perplexity.text,
            evaluation.count(),
            evaluation.targets(),
        )
        .fact("calibration text", file_name(&config.calib))
        .fact("calibration windows", calibration.count())
        .fact("held-out windows", held_out.count())
        .fact(
            "calibrated on",
            format!("activations of {}", config.repair.inputs),
        )
        .fact("factors", config.repair.factors.to_string());
    section.failures = failures;
    let spread = match config.allocate {
        None => "the same for all".to_string(),
        Some(spread) => format!("by {spread}, in the bytes of one rank for all"),
    };
    Ok(vec![section.fact("ranks", spread)])
}

fn compare_with_dense(rows: &mut [Row], decoder: &Decoder<'_>, model: &str) {
    let dense = rows
        .iter()
        .find(|row| row.method == DENSE)
        .and_then(|row| row.perplexity);
    for row in rows {
        row.model = Some(model.into());
        row.bytes_dense = Some(decoder.checkpoint().total_bytes());
        row.perplexity_dense = dense;
    }
}
