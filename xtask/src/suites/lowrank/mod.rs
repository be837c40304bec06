//! Low-rank repair: output error, quality and size by compressor, method and rank.

mod check;
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
    Bytes, Energy, Format, Given, LayerId, LayerReport, Method, Ranks, Repair, Repaired, Source,
    Spread, Texts, place,
};
use serde_json::{Value, json};
use tensor_io::gguf::Gguf;
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
    let (calibration, held_out) = data::split(&windows, wanted, settings.seed)
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
    let mut rows = vec![suite.dense()?];
    let repairs = config.methods.iter().flatten().count() * config.ranks.len();
    let bar = settings.bar("repair", (starts.len() * (1 + repairs)) as u64);
    let mut failures = Vec::new();
    for start in &starts {
        let (made, failed) = suite.start(start, &bar);
        rows.extend(made);
        failures.extend(failed);
    }
    bar.finish();
    if rows.len() == 1 && !failures.is_empty() {
        return Err(failures.swap_remove(0));
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
    section.failures = failures.iter().map(|error| format!("{error:#}")).collect();
    let spread = match config.allocate {
        None => "the same for all".to_string(),
        Some(spread) => format!("by {spread}, in the bytes of one rank for all"),
    };
    Ok(vec![section.fact("ranks", spread)])
}

/// A model that another tool compressed.
pub(crate) struct GivenModel<'a> {
    pub(super) source: Given<'a>,
    pub(super) checkpoint: &'a Checkpoint,
    /// The decoder of the model itself, where its tensors are readable as they are: what it quantised besides linears
    /// is then measured too.
    decoder: Option<Decoder<'a>>,
    /// Bytes of everything but the linears.
    rest_bytes: u64,
}

impl<'a> GivenModel<'a> {
    fn open(settings: &Settings, checkpoint: &'a Checkpoint) -> Result<Self> {
        let source = Given::open(checkpoint)?;
        let decoder = match source.format() {
            Format::Dense | Format::Gguf => Some(open(settings, checkpoint)?),
            _ => None,
        };
        let mut rest_bytes = 0;
        for name in checkpoint.names() {
            let module = name.rsplit_once('.').map_or(name, |(module, _)| module);
            if LayerId::parse(module).is_none() {
                rest_bytes += match checkpoint.source() {
                    Some(source) => source.stored(name)?.len(),
                    None => checkpoint.info(name)?.bytes,
                } as u64;
            }
        }
        Ok(Self {
            source,
            checkpoint,
            decoder,
            rest_bytes,
        })
    }

    pub(super) fn is_gguf(&self) -> bool {
        matches!(self.source.format(), Format::Gguf)
    }
}

/// A compressed model that repairs start from.
struct Start<'a> {
    /// The compressor's name, or the file's.
    name: String,
    source: &'a dyn Source,
    /// What spends bytes in the same way, to compare with at other sizes.
    alike: Option<Compressor>,
    /// The given model that it is, or is compared with.
    given: Option<&'a GivenModel<'a>>,
    /// Whether the linears are the given model's.
    is_given: bool,
}

impl<'a> Start<'a> {
    fn compressor(compressor: &'a Compressor) -> Self {
        Self {
            name: compressor.to_string(),
            source: compressor,
            alike: Some(*compressor),
            given: None,
            is_given: false,
        }
    }

    fn given(config: &Config, given: &'a GivenModel<'a>) -> Self {
        let path = config.compressed.as_deref().unwrap_or(Path::new(""));
        Self {
            name: file_name(path),
            source: &given.source,
            alike: given.source.alike(),
            given: Some(given),
            is_given: true,
        }
    }

    /// The same compressor for another source of the same weights.
    fn with_source<'b>(&'b self, source: &'b dyn Source) -> Start<'b> {
        Start {
            name: self.name.clone(),
            source,
            alike: self.alike,
            given: self.given,
            is_given: self.is_given,
        }
    }
}

/// A decoder that computes in f32 on every device: W_c + B A rounded to bf16 would lose what B A adds.
fn open<'a>(settings: &Settings, checkpoint: &'a Checkpoint) -> Result<Decoder<'a>> {
    Decoder::new(checkpoint, DType::F32, &settings.device.open()?)
        .with_context(|| checkpoint.dir().display().to_string())
}

/// What all rows share.
struct Lowrank<'a> {
    settings: &'a Settings,
    config: &'a Config,
    decoder: &'a Decoder<'a>,
    evaluation: &'a ScoredWindows,
    calibration: &'a Windows,
    held_out: &'a Windows,
    state: &'a Path,
    scratch: &'a Path,
    /// A GGUF file of the uncompressed model, where one is needed.
    template: Option<&'a Gguf>,
}

impl Lowrank<'_> {
    fn dense(&self) -> Result<Row> {
        let bar = self.settings.bar(DENSE, 0);
        let mut row = Row::new("lowrank", DENSE);
        perplexity::measure(self.decoder, self.evaluation, &mut row, &bar)?;
        row.tokens_per_second = None;
        if self.config.hidden_metrics {
            hidden_metrics(self.decoder, self.evaluation.inputs(), &mut row)?;
        }
        bar.finish();
        Ok(row)
    }

    /// All rows of a compressed model: as it is, repaired, and the controls; and what failed.
    fn start(&self, start: &Start<'_>, bar: &Bar) -> (Vec<Row>, Vec<anyhow::Error>) {
        let (mut rows, mut failures) = (Vec::new(), Vec::new());
        if let Err(error) = self.cells(start, bar, &mut rows, &mut failures) {
            failures.push(error.context(start.name.clone()));
        }
        (rows, failures)
    }

    fn cells(
        &self,
        start: &Start<'_>,
        bar: &Bar,
        rows: &mut Vec<Row>,
        failures: &mut Vec<anyhow::Error>,
    ) -> Result<()> {
        let name = &start.name;
        bar.set_label(name.clone());
        let (row, compressed) = self.cell(start, None, bar)?;
        bar.inc(1);
        if self.config.methods.contains(&None) {
            rows.push(row);
        }
        let from_compressed = start.with_source(&compressed);
        let source = match self.config.one_pass {
            true => start,
            false => &from_compressed,
        };
        // Methods side by side at each rank.
        for &rank in &self.config.ranks {
            for &method in self.config.methods.iter().flatten() {
                bar.set_label(format!("{name}, {method}, rank {rank}"));
                match self.cell(source, Some((method, rank)), bar) {
                    Ok((row, repaired)) => {
                        rows.push(row);
                        self.discard(&repaired)?;
                    }
                    Err(error) => {
                        let cell = format!("{name}: {method} at rank {rank}");
                        failures.push(error.context(cell));
                    }
                }
                bar.inc(1);
            }
        }
        if self.config.controls {
            let controls = self.controls(start, &compressed, rows, bar)?;
            rows.extend(controls);
        }
        self.discard(&compressed)
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
        start: &Start<'_>,
        repair: Option<(Method, usize)>,
        bar: &Bar,
    ) -> Result<(Row, Repaired)> {
        let name = cell_name(&start.name, repair);
        let options = self
            .config
            .repair
            .clone()
            .with_method(repair.map(|(method, _)| method))
            .with_ranks(Ranks::Constant(repair.map_or(0, |(_, rank)| rank)))
            .with_requantise(self.config.repair.requantise.filter(|_| repair.is_some()));
        let watch = Stopwatch::start();
        let options = match repair {
            Some((_, rank)) => self.allocated(options, rank, start.source, &name, bar)?,
            None => options,
        };
        let repaired = self.repair(&options, start.source, &name, bar)?;
        let mut row = Row {
            compress: Some(start.name.clone()),
            rank: repair.map(|(_, rank)| rank as u64),
            ..Row::new("lowrank", method_name(repair.map(|(method, _)| method)))
        };
        watch.stop(&mut row);
        let made = (row.seconds, row.peak_rss_bytes);
        self.fill(&mut row, start, &repaired, bar)?;
        // Time and memory are those of the repair.
        (row.seconds, row.peak_rss_bytes) = made;
        if let Some(folder) = save::folder(self.config, &start.name, repair) {
            let saved = save::Saving {
                config: self.config,
                decoder: self.decoder,
                given: start.given,
                template: self.template,
                repaired: &repaired,
            };
            let bytes = saved
                .write(&folder)
                .with_context(|| folder.display().to_string())?;
            row.extra.insert("bytes_saved".into(), bytes.into());
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
    fn fill(&self, row: &mut Row, start: &Start<'_>, repaired: &Repaired, bar: &Bar) -> Result<()> {
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
        let given = start.given.and_then(|given| given.decoder.as_ref());
        let rest = given.unwrap_or(self.decoder);
        write_checkpoint(rest, repaired, &folder, &options, &NoProgress)?;
        let merged = Checkpoint::open(&folder)?;
        let decoder = open(self.settings, &merged)?;
        let nested = bar.nested("perplexity", 0);
        perplexity::measure(&decoder, self.evaluation, row, &nested)?;
        nested.finish();
        // The merged copy is only there to be measured: its size and speed are not those of the result.
        (row.params, row.tokens_per_second) = (None, None);
        let compressed = match start.given {
            Some(given) if start.is_given => given.checkpoint.total_bytes(),
            Some(given) => given.rest_bytes + bytes.compressed,
            None => all - bytes.dense + bytes.compressed,
        };
        row.bytes = Some(compressed + bytes.factors);
        if let Some(damping) = repaired.damping() {
            row.extra.insert("damping".into(), json!(damping.largest));
            row.extra
                .insert("damping_raised".into(), json!(damping.raised));
            if damping.raised > 0 {
                row.notes.push(format!(
                    "{}: damping had to grow in {} of {} linears, up to {} of the mean diagonal: the calibration tokens are too few",
                    start.name,
                    damping.raised,
                    repaired.reports().count(),
                    damping.largest,
                ));
            }
        }

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
        start: &Start<'_>,
        compressed: &Repaired,
        rows: &[Row],
        bar: &Bar,
    ) -> Result<Vec<Row>> {
        let Some(compressor) = start.alike else {
            return Ok(Vec::new());
        };
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
        let rest = match start.given {
            Some(given) => given.rest_bytes,
            None => self.decoder.checkpoint().total_bytes() - own.dense,
        };
        // In the order of ranks; methods of one rank share a control.
        let mut controls: Vec<(Compressor, Vec<String>)> = Vec::new();
        for row in rows {
            let (Some(rank), Some(bytes)) = (row.rank, row.bytes) else {
                continue;
            };
            let Some(target) = bytes.checked_sub(rest) else {
                continue;
            };
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
            let (mut row, repaired) = self.control(&control, start, bar)?;
            self.discard(&repaired)?;
            row.extra.insert(
                "instead_of".into(),
                json!(format!("{} + rank {}", start.name, ranks.join(", "))),
            );
            made.push(row.control());
        }
        Ok(made)
    }

    /// The linears compressed by `control`, and all else as where `start` is from.
    fn control(
        &self,
        control: &Compressor,
        start: &Start<'_>,
        bar: &Bar,
    ) -> Result<(Row, Repaired)> {
        let unsaved = Config {
            save: None,
            ..self.config.clone()
        };
        Lowrank {
            config: &unsaved,
            ..*self
        }
        .cell(
            &Start {
                given: start.given,
                ..Start::compressor(control)
            },
            None,
            bar,
        )
    }
}

/// What the files of a cell are called.
fn cell_name(start: &str, repair: Option<(Method, usize)>) -> String {
    // A colon is no part of a file name everywhere.
    let start = start.replace(':', "of");
    match repair {
        None => format!("{start}-{NONE}"),
        Some((method, rank)) => format!("{start}-{method}-{rank}"),
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
