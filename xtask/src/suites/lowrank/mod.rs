//! Low-rank repair: output error, quality and size by compressor, method and rank.

mod data;
mod save;
mod table;
mod verdict;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use candle_core::DType;
use causal_lm::{Decoder, Windows};
use eval_report::{DENSE, Row, Section, Stopwatch};
use lm_eval::ScoredWindows;
use lowrank_eora::compress::{Compressor, LinearShape, Shapes};
use lowrank_eora::output::{CheckpointOptions, Layout, Weights, write_checkpoint};
use lowrank_eora::repair::{
    Bytes, Energy, LayerReport, Method, Ranks, Repair, Repaired, Source, Spread, Texts, place,
};
use serde_json::{Value, json};
use tensor_io::{Checkpoint, NoProgress, WriteOptions};

use super::hidden::hidden_metrics;
use super::perplexity::{self, Protocol, file_name};
use crate::bar::Bar;
use crate::scratch::Scratch;
use crate::settings::Settings;

pub use save::Output;

/// The largest rank that an allocation gives a linear, in ranks of an even spread.
const ALLOCATION_REACH: usize = 4;

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
    /// What is written.
    pub outputs: Vec<Output>,
    /// How checkpoints are written.
    pub write: WriteOptions,
    /// Folder for the state of each block.
    pub resume: Option<PathBuf>,
    /// Whether to measure the hidden states.
    pub hidden_metrics: bool,
}

/// Name of the method that leaves the compressed model as it is.
pub const NONE: &str = "none";

impl Config {
    /// No compressors, methods and ranks, all else by default.
    pub fn new(perplexity: perplexity::Config, calib: PathBuf) -> Self {
        Self {
            perplexity,
            calib,
            calib_samples: 128,
            held_out_samples: 32,
            compressors: Vec::new(),
            methods: Vec::new(),
            ranks: Vec::new(),
            allocate: None,
            repair: Repair::default(),
            one_pass: false,
            controls: true,
            save: None,
            outputs: Output::DEFAULT.to_vec(),
            write: WriteOptions::default(),
            resume: None,
            hidden_metrics: false,
        }
    }
}

/// Compress and repair in every combination and measure each.
///
/// # Errors
/// A model or text that cannot be read or run.
pub fn run(common: &Settings, config: &Config) -> Result<Vec<Section>> {
    perplexity::ensure_unseen(&config.calib, &config.perplexity.text)?;
    save::check(config)?;
    let checkpoint = Checkpoint::open(&config.perplexity.model)?;
    let decoder = open(common, &checkpoint)?;
    let protocol = Protocol::new(common, &config.perplexity, &decoder)?;
    let evaluation = protocol.evaluation(common, &config.perplexity.text)?;
    let windows = protocol.calibration(&config.calib)?;
    let wanted = (config.calib_samples, config.held_out_samples);
    let (calibration, held_out) = data::split(&windows, wanted, common.seed)
        .with_context(|| config.calib.display().to_string())?;

    let scratch = Scratch::new()?;
    let suite = Lowrank {
        common,
        config,
        decoder: &decoder,
        evaluation: &evaluation,
        calibration: &calibration,
        held_out: &held_out,
        state: config.resume.as_deref().unwrap_or(scratch.path()),
        scratch: scratch.path(),
    };
    let mut rows = vec![suite.dense()?];
    let repairs = config.methods.iter().flatten().count() * config.ranks.len();
    let bar = common.bar("repair", (config.compressors.len() * (1 + repairs)) as u64);
    for compressor in &config.compressors {
        let named = || compressor.to_string();
        rows.extend(suite.compressor(compressor, &bar).with_context(named)?);
    }
    bar.finish();
    compare_with_dense(&mut rows, &decoder, &file_name(&config.perplexity.model));
    let section = protocol
        .facts(
            table::section(config, rows),
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
    let spread = match config.allocate {
        None => "the same for all".to_string(),
        Some(spread) => format!("by {spread}, in the bytes of one rank for all"),
    };
    Ok(vec![section.fact("ranks", spread)])
}

/// A decoder that computes in f32 on every device: W_c + B A rounded to bf16 would lose what B A adds.
fn open<'a>(common: &Settings, checkpoint: &'a Checkpoint) -> Result<Decoder<'a>> {
    Decoder::new(checkpoint, DType::F32, &common.device.open()?)
        .with_context(|| checkpoint.dir().display().to_string())
}

/// What all rows share.
struct Lowrank<'a> {
    common: &'a Settings,
    config: &'a Config,
    decoder: &'a Decoder<'a>,
    evaluation: &'a ScoredWindows,
    calibration: &'a Windows,
    held_out: &'a Windows,
    state: &'a Path,
    scratch: &'a Path,
}

impl Lowrank<'_> {
    fn dense(&self) -> Result<Row> {
        let bar = self.common.bar(DENSE, 0);
        let mut row = Row::new("lowrank", DENSE);
        perplexity::measure(self.decoder, self.evaluation, &mut row, &bar)?;
        row.tokens_per_second = None;
        if self.config.hidden_metrics {
            hidden_metrics(self.decoder, self.evaluation.inputs(), &mut row)?;
        }
        bar.finish();
        Ok(row)
    }

    /// All rows of a compressor: as it is, repaired, and the controls.
    fn compressor(&self, compressor: &Compressor, bar: &Bar) -> Result<Vec<Row>> {
        let mut rows = Vec::new();
        bar.set_label(compressor.to_string());
        let (row, compressed) = self.cell(compressor, compressor, None, bar)?;
        bar.inc(1);
        if self.config.methods.contains(&None) {
            rows.push(row);
        }
        let source: &dyn Source = if self.config.one_pass {
            compressor
        } else {
            &compressed
        };
        // Methods side by side at each rank.
        for &rank in &self.config.ranks {
            for &method in self.config.methods.iter().flatten() {
                bar.set_label(format!("{compressor}, {method}, rank {rank}"));
                let (row, repaired) = self
                    .cell(compressor, source, Some((method, rank)), bar)
                    .with_context(|| format!("{method} at rank {rank}"))?;
                rows.push(row);
                self.discard(&repaired)?;
                bar.inc(1);
            }
        }
        if self.config.controls {
            rows.extend(self.controls(compressor, &compressed, &rows, bar)?);
        }
        self.discard(&compressed)?;
        Ok(rows)
    }

    /// Makes room, unless the state is to be kept.
    fn discard(&self, repaired: &Repaired) -> Result<()> {
        if self.config.resume.is_some() {
            return Ok(());
        }
        let folder = repaired.folder();
        std::fs::remove_dir_all(folder).with_context(|| folder.display().to_string())
    }

    /// One row: a repair, or the compressed model as it is.
    fn cell(
        &self,
        compressor: &Compressor,
        source: &dyn Source,
        repair: Option<(Method, usize)>,
        bar: &Bar,
    ) -> Result<(Row, Repaired)> {
        let name = cell_name(compressor, repair);
        let options = self
            .config
            .repair
            .clone()
            .with_method(repair.map(|(method, _)| method))
            .with_ranks(Ranks::Constant(repair.map_or(0, |(_, rank)| rank)))
            .with_requantise(self.config.repair.requantise.filter(|_| repair.is_some()));
        let watch = Stopwatch::start();
        let options = match repair {
            Some((_, rank)) => self.allocated(options, rank, source, &name, bar)?,
            None => options,
        };
        let repaired = self.repair(&options, source, &name, bar)?;
        let mut row = Row {
            compress: Some(compressor.to_string()),
            rank: repair.map(|(_, rank)| rank as u64),
            ..Row::new("lowrank", repair.map_or(NONE, |(method, _)| method.name()))
        };
        watch.stop(&mut row);
        let made = (row.seconds, row.peak_rss_bytes);
        self.fill(&mut row, &repaired, bar)?;
        // Time and memory are those of the repair.
        (row.seconds, row.peak_rss_bytes) = made;
        if let Some(folder) = save::folder(self.config, compressor, repair) {
            save::write(self.config, self.decoder, &repaired, &folder)
                .with_context(|| folder.display().to_string())?;
        }
        Ok((row, repaired))
    }

    fn repair(
        &self,
        options: &Repair,
        source: &dyn Source,
        name: &str,
        bar: &Bar,
    ) -> Result<Repaired> {
        let blocks = bar.nested("blocks", self.decoder.config().layers() as u64);
        let texts = Texts::new(self.calibration).with_held_out(self.held_out);
        let folder = self.state.join(name);
        let repaired = options.run(self.decoder, source, texts, folder, &blocks)?;
        blocks.finish();
        Ok(repaired)
    }

    /// The same repair, where asked for with the bytes of one rank for all spread by what each linear gains, as a first repair of a larger
    /// rank shows it.
    fn allocated(
        &self,
        options: Repair,
        rank: usize,
        source: &dyn Source,
        name: &str,
        bar: &Bar,
    ) -> Result<Repair> {
        let Some(spread) = self.config.allocate else {
            return Ok(options);
        };
        let first = options
            .clone()
            .with_ranks(Ranks::Constant(rank * ALLOCATION_REACH))
            .with_requantise(None);
        let first = self.repair(&first, source, &format!("{name}-spectra"), bar)?;
        let size = options.factors.dtype().size_in_bytes();
        let values = |report: &LayerReport| {
            let (m, n) = (report.outputs, report.inputs);
            rank.min(m.min(n)) * (m + n)
        };
        let budget = (first.reports().map(values).sum::<usize>() * size) as u64;
        let ranks = Ranks::allocate(first.reports(), budget, size, 1, spread)?;
        self.discard(&first)?;
        Ok(options.with_ranks(ranks))
    }

    /// Loss, size and quality.
    fn fill(&self, row: &mut Row, repaired: &Repaired, bar: &Bar) -> Result<()> {
        let held_out: Energy = repaired
            .reports()
            .filter_map(|report| report.held_out)
            .sum();
        let calibration: Energy = repaired.reports().map(|report| report.calibration).sum();
        let bytes: Bytes = repaired.reports().map(|report| report.bytes).sum();
        let all = self.decoder.checkpoint().total_bytes();
        row.loss = Some(held_out.loss());
        row.loss_uncompensated = Some(held_out.loss_before());
        row.layers = repaired.reports().map(layer).collect();

        let folder = self.scratch.join("merged");
        let layout = Layout::Dense {
            dtype: Some(DType::F32),
        };
        let options = CheckpointOptions::new(Weights::Merged, layout).with_write(WriteOptions {
            overwrite: true,
            ..self.config.write.clone()
        });
        write_checkpoint(self.decoder, repaired, &folder, &options, &NoProgress)?;
        let merged = Checkpoint::open(&folder)?;
        let decoder = open(self.common, &merged)?;
        let nested = bar.nested("perplexity", 0);
        perplexity::measure(&decoder, self.evaluation, row, &nested)?;
        nested.finish();
        // The merged copy is only there to be measured: its size and speed are not those of the result.
        (row.params, row.tokens_per_second) = (None, None);
        row.bytes = Some(all - bytes.dense + bytes.compressed + bytes.factors);

        let mut extra = |name: &str, value: Value| row.extra.insert(name.into(), value);
        extra("loss_calibration", json!(calibration.loss()));
        extra("bytes_factors", json!(bytes.factors));
        let drift: Energy = repaired
            .reports()
            .filter_map(|report| report.held_out_drift)
            .sum();
        if drift.target > 0.0 {
            extra("loss_drift", json!(drift.loss()));
        }
        if repaired
            .reports()
            .any(|report| report.requantised.is_some())
        {
            let squares = repaired
                .reports()
                .filter_map(|r| r.requantised.as_ref()?.held_out);
            let after = squares.sum();
            extra(
                "loss_requantised",
                json!(Energy { after, ..held_out }.loss()),
            );
        }
        if self.config.hidden_metrics {
            hidden_metrics(&decoder, self.evaluation.inputs(), row)?;
        }
        std::fs::remove_dir_all(&folder).with_context(|| folder.display().to_string())
    }

    /// What the bytes of each repair buy when they are spent on the weights.
    fn controls(
        &self,
        compressor: &Compressor,
        compressed: &Repaired,
        rows: &[Row],
        bar: &Bar,
    ) -> Result<Vec<Row>> {
        let first = compressed
            .reports()
            .next()
            .context("a model without linears")?;
        let shapes = Shapes {
            linears: compressed
                .reports()
                .map(|report| LinearShape {
                    outputs: report.outputs,
                    inputs: report.inputs,
                    place: place(self.decoder, report.layer),
                })
                .collect(),
            float_bytes: first.bytes.dense as usize / (first.outputs * first.inputs),
        };
        let own: Bytes = compressed.reports().map(|report| report.bytes).sum();
        let all = self.decoder.checkpoint().total_bytes();
        // In the order of ranks; methods of one rank share a control.
        let mut controls: Vec<(Compressor, Vec<String>)> = Vec::new();
        for row in rows {
            let (Some(rank), Some(bytes)) = (row.rank, row.bytes) else {
                continue;
            };
            let target = bytes - (all - own.dense);
            let Some((control, _)) = compressor.finer(target, &shapes) else {
                continue;
            };
            let rank = rank.to_string();
            match controls.iter_mut().find(|(other, _)| *other == control) {
                Some((_, ranks)) if ranks.contains(&rank) => {}
                Some((_, ranks)) => ranks.push(rank),
                None => controls.push((control, vec![rank])),
            }
        }
        let mut made = Vec::new();
        for (control, ranks) in controls {
            bar.set_label(format!("control {control}"));
            let (mut row, repaired) = self.control(&control, bar)?;
            self.discard(&repaired)?;
            row.extra.insert(
                "instead_of".into(),
                json!(format!("{compressor} + rank {}", ranks.join(", "))),
            );
            made.push(row.control());
        }
        Ok(made)
    }

    fn control(&self, control: &Compressor, bar: &Bar) -> Result<(Row, Repaired)> {
        let unsaved = Config {
            save: None,
            ..self.config.clone()
        };
        Lowrank {
            config: &unsaved,
            ..*self
        }
        .cell(control, control, None, bar)
    }
}

/// What the files of a cell are called.
fn cell_name(compressor: &Compressor, repair: Option<(Method, usize)>) -> String {
    // A colon is no part of a file name everywhere.
    let compressor = compressor.to_string().replace(':', "of");
    match repair {
        None => format!("{compressor}-none"),
        Some((method, rank)) => format!("{compressor}-{method}-{rank}"),
    }
}

fn layer(report: &LayerReport) -> Value {
    let mut layer = json!({
        "layer": report.layer,
        "rank": report.rank,
        "loss": report.held_out.map(|energy| energy.loss()),
        "loss_uncompensated": report.held_out.map(|energy| energy.loss_before()),
        "loss_calibration": report.calibration.loss(),
        "bytes": report.bytes.compressed + report.bytes.factors,
        "bytes_dense": report.bytes.dense,
        "seconds_collect": report.seconds.collect,
        "seconds_compress": report.seconds.compress,
        "seconds_solve": report.seconds.solve,
    });
    if let Some(drift) = report.held_out_drift {
        layer["loss_drift"] = json!(drift.loss());
    }
    layer
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
