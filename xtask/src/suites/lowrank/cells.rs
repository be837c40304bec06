//! The rows of a compressed model: as it is, repaired, and its controls.

use std::path::Path;

use anyhow::{Context, Result, anyhow};
use candle_core::DType;
use causal_lm::{Decoder, Windows};
use eval_report::{DENSE, Row, Stopwatch};
use lm_eval::ScoredWindows;
use lowrank_eora::compress::{Compressor, LinearShape, Shapes};
use lowrank_eora::output::{CheckpointOptions, Layout, Weights, write_checkpoint};
use lowrank_eora::repair::{
    Bytes, Energy, LayerReport, Method, Ranks, Repair, Repaired, Source, Texts, WithImportance,
    place,
};
use serde_json::{Value, json};
use tensor_io::gguf::Gguf;
use tensor_io::{Checkpoint, NoProgress};

use super::super::damping;
use super::super::hidden::hidden_metrics;
use super::super::perplexity;
use super::config::{Config, method_name};
use super::gguf::{Imported, InGguf};
use super::save::{self, cell_name};
use super::start::{Start, open};
use crate::bar::Bar;
use crate::settings::Settings;

/// The largest rank that an allocation gives a linear, in ranks of an even spread.
const ALLOCATION_REACH: usize = 4;

/// What all rows share.
pub(super) struct Lowrank<'a> {
    pub(super) settings: &'a Settings,
    pub(super) config: &'a Config,
    pub(super) decoder: &'a Decoder<'a>,
    /// The same as its repair walks through it.
    pub(super) walked: &'a Decoder<'a>,
    pub(super) evaluation: &'a ScoredWindows,
    pub(super) calibration: &'a Windows,
    pub(super) held_out: &'a Windows,
    pub(super) state: &'a Path,
    pub(super) scratch: &'a Path,
    /// A GGUF file of the uncompressed model, where one is needed.
    pub(super) template: Option<&'a Gguf>,
    /// The importance matrix that was given.
    pub(super) imported: &'a Option<Imported>,
}

impl Lowrank<'_> {
    pub(super) fn dense(&self) -> Result<Row> {
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
    pub(super) fn start(&self, start: &Start<'_>, bar: &Bar) -> (Vec<Row>, Vec<anyhow::Error>) {
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
        let mut repaired = self.repair(&options, start.source, &name, bar)?;
        if let Some(in_gguf) = &start.in_gguf {
            repaired = repaired.with_others(in_gguf.rest.clone());
        }
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
                imported: self.imported,
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
        let repaired = options.run(self.walked, source, texts, folder, &blocks);
        let repaired = repaired.map_err(by_flag)?;
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
        let options = CheckpointOptions::new(Weights::Merged, layout)
            .with_write(self.config.write.clone().with_overwrite(true));
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
        let compressed = match (&start.in_gguf, start.given) {
            (Some(in_gguf), _) => in_gguf.rest_bytes + in_gguf.linear_bytes(bytes.compressed),
            (None, Some(given)) if start.is_given => given.checkpoint.total_bytes(),
            (None, Some(given)) => given.rest_bytes + bytes.compressed,
            (None, None) => all - bytes.dense + bytes.compressed,
        };
        row.bytes = Some(compressed + bytes.factors);
        let linears = repaired.reports().count();
        damping::report(row, &start.name, linears, repaired.damping());

        let mut extra = |name: &str, value: Value| row.extra.insert(name.into(), value);
        extra("loss_calibration", json!(calibration.loss()));
        if let Some(table) = start
            .in_gguf
            .as_ref()
            .and_then(|in_gguf| in_gguf.table.as_ref())
        {
            extra("bits_per_weight", json!(table.bits_per_weight()));
        }
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
        let rest = match (&start.in_gguf, start.given) {
            (Some(in_gguf), _) => in_gguf.rest_bytes,
            (None, Some(given)) => given.rest_bytes,
            (None, None) => self.decoder.checkpoint().total_bytes() - own.dense,
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
        let suite = Lowrank {
            config: &unsaved,
            ..*self
        };
        let weighted;
        let source: &dyn Source = match Imported::of(self.imported, control) {
            Some(imported) => {
                weighted = WithImportance::new(*control, &imported.importance);
                &weighted
            }
            None => control,
        };
        let in_gguf = start.in_gguf.as_ref().map(InGguf::of_control);
        let start = Start {
            given: start.given,
            ..Start::compressor(control, source, in_gguf)
        };
        suite.cell(&start, None, bar)
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

/// An error with the flag that sets what it names.
fn by_flag(error: lowrank_eora::Error) -> anyhow::Error {
    match error {
        lowrank_eora::Error::Setting {
            name: "factors",
            value,
            expected,
        } => anyhow!("--factors {value}: expected {expected}"),
        other => other.into(),
    }
}
