//! The experts of a mixture compressed and repaired, and its other linears left as they are.

use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};
use causal_lm::Decoder;
use eval_report::{Axis, Column, DENSE, Plot, Reference, Row, Section, Series, Stopwatch};
use lowrank_eora::compress::Compressor;
use lowrank_eora::experts::{
    ExpertRepair, GramOptions, RepairedExperts, predicted_bytes, repair_experts,
};
use lowrank_eora::repair::Method;
use serde_json::{Map, Value, json};
use tensor_io::Checkpoint;

use super::super::sizes::decoded_bytes;
use super::super::{damping, perplexity};
use super::cells::Lowrank;
use super::config::{Config, method_name};
use super::output::Output;
use super::save::{self, cell_name};
use super::start::open;
use crate::bar::Bar;

/// What can be written of them.
pub(super) const OUTPUTS: [Output; 3] = [Output::Adapter, Output::Compressed, Output::Merged];

/// What the shapes of the model and the flags together tell.
pub(super) fn check(config: &Config, decoder: &Decoder<'_>, grams: GramOptions) -> Result<()> {
    let model = decoder.config();
    let widths = || model.mixtures.iter().flatten().map(|mixture| mixture.width);
    let Some(narrowest) = widths().min() else {
        bail!(
            "--experts: {} is no mixture of experts; leave it out",
            config.perplexity.model.display()
        );
    };
    for &method in config.methods.iter().flatten() {
        ensure!(
            method == Method::Eora,
            "--method {method}: experts are repaired by {} alone; leave one of --method and --experts out",
            Method::Eora
        );
    }
    for &compressor in &config.compressors {
        let named = || format!("--compress {compressor}");
        for columns in widths().chain([model.hidden]) {
            compressor.check_columns(columns).with_context(named)?;
        }
        for shape in widths().map(|width| (width, model.hidden)) {
            ensure!(
                predicted_bytes(&compressor, shape, 0).is_some(),
                "--compress {compressor}: it is no format of one weight of {} × {}, which experts have",
                shape.0,
                shape.1
            );
        }
        let repair = ExpertRepair::new(compressor).grams(grams);
        repair.check(decoder).context("--experts")?;
    }
    let largest = narrowest.min(model.hidden);
    for &rank in &config.ranks {
        ensure!(
            rank <= largest,
            "--rank {rank}: the largest rank of every expert of this model is {largest}"
        );
    }
    if config.save.is_none() {
        return Ok(());
    }
    let repairs = config.methods.iter().any(Option::is_some);
    for output in save::outputs(config, None) {
        ensure!(
            OUTPUTS.contains(&output),
            "--save-as {output}: of experts there are {}",
            OUTPUTS.map(|output| output.to_string()).join(", ")
        );
        // W_c of a repair is apart from its factors, which are an adapter.
        let is_apart = matches!(output, Output::Adapter | Output::Compressed) && repairs;
        if let (true, [first, ..], [rank, ..]) =
            (is_apart, &config.compressors[..], &config.ranks[..])
        {
            let repair = ExpertRepair::new(*first).rank(*rank);
            let repair = repair.adapter(Some(PathBuf::new()));
            let fits = repair.check(decoder);
            fits.with_context(|| format!("--save-as {output}"))?;
        }
    }
    Ok(())
}

/// What a cell of `--experts` writes, and where.
struct Places {
    /// W_c, or W_c + B A without an adapter beside it.
    model: PathBuf,
    /// B A.
    adapter: Option<PathBuf>,
    /// W_c + B A: what is measured.
    merged: PathBuf,
    /// Those that stay.
    saved: Vec<(Output, PathBuf)>,
    /// Where those are that do not.
    scratch: PathBuf,
}

impl Lowrank<'_> {
    /// The rows of a compressor of experts: as they are, and repaired at each rank.
    pub(super) fn experts(&self, compressor: Compressor, bar: &Bar) -> Result<Vec<Row>> {
        let mut rows = Vec::new();
        for &method in &self.config.methods {
            let ranks = self.config.ranks.iter();
            let repairs: Vec<_> = match method {
                None => vec![None],
                Some(method) => ranks.map(|&rank| Some((method, rank))).collect(),
            };
            for repair in repairs {
                let name = cell_name(&compressor.to_string(), repair);
                bar.set_label(name.clone());
                rows.push(self.of_experts(compressor, repair, bar).context(name)?);
                bar.inc(1);
            }
        }
        Ok(rows)
    }

    fn of_experts(
        &self,
        compressor: Compressor,
        repair: Option<(Method, usize)>,
        bar: &Bar,
    ) -> Result<Row> {
        let rank = repair.map_or(0, |(_, rank)| rank);
        let places = self.places(compressor, repair)?;
        let options = ExpertRepair::new(compressor)
            .rank(rank)
            .grams(self.config.experts.unwrap_or_default())
            .adapter(places.adapter.clone())
            .merged(places.adapter.is_some().then(|| places.merged.clone()))
            .files(self.config.write.clone());
        let mut row = Row {
            compress: Some(compressor.to_string()),
            rank: repair.map(|(_, rank)| rank as u64),
            ..Row::new("lowrank", method_name(repair.map(|(method, _)| method)))
        };
        let watch = Stopwatch::start();
        let steps = bar.nested("experts", 0);
        let (decoder, text) = (self.walked, self.calibration);
        let found = repair_experts(decoder, text, &options, &places.model, &steps)?;
        steps.finish();
        watch.stop(&mut row);
        let made = (row.seconds, row.peak_rss_bytes);
        let merged = Checkpoint::open(&places.merged)?;
        let steps = bar.nested("perplexity", 0);
        let repaired = open(self.settings, &merged)?;
        perplexity::measure(&repaired, self.evaluation, &mut row, &steps)?;
        steps.finish();
        // Time and memory are those of the repair; the floats that were measured are not what is counted.
        (row.seconds, row.peak_rss_bytes) = made;
        (row.params, row.tokens_per_second) = (None, None);
        self.describe(&mut row, &compressor, &found)?;
        if !places.saved.is_empty() {
            let mut bytes = Map::new();
            for (output, path) in &places.saved {
                let file = match output {
                    Output::Adapter => {
                        Checkpoint::open_file(path.join("adapter_model.safetensors"))
                    }
                    _ => Checkpoint::open(path),
                };
                bytes.insert(output.to_string(), file?.total_bytes().into());
            }
            row.extra.insert("bytes_saved".into(), bytes.into());
        }
        std::fs::remove_dir_all(&places.scratch)
            .with_context(|| places.scratch.display().to_string())?;
        Ok(row)
    }

    /// Losses and sizes.
    fn describe(
        &self,
        row: &mut Row,
        compressor: &Compressor,
        found: &RepairedExperts,
    ) -> Result<()> {
        row.loss = Some(found.loss());
        row.loss_uncompensated = Some(found.loss_compressed());
        let checkpoint = self.decoder.checkpoint();
        let all = decoded_bytes(checkpoint, checkpoint.names())?;
        row.bytes = Some(all - found.expert_bytes_dense + found.expert_bytes);
        damping::report(row, &compressor.to_string(), found.linears, found.damping);
        let mut extra = |name: &str, value: Value| row.extra.insert(name.into(), value);
        extra("rerouted", json!(found.rerouted));
        let unseen = found.experts.iter().filter(|expert| expert.tokens == 0);
        extra("unseen_experts", json!(unseen.count()));
        let mut shares: Vec<f64> = found.experts.iter().map(|expert| expert.pool).collect();
        shares.sort_by(f64::total_cmp);
        extra("pool_share", json!(shares.get(shares.len() / 2)));
        Ok(())
    }

    fn places(&self, compressor: Compressor, repair: Option<(Method, usize)>) -> Result<Places> {
        let name = compressor.to_string();
        let scratch = self.scratch.join(cell_name(&name, repair));
        std::fs::create_dir_all(&scratch).with_context(|| scratch.display().to_string())?;
        let folder = save::folder(self.config, &name, repair);
        let mut wanted = match folder {
            Some(_) => save::outputs(self.config, None),
            None => Vec::new(),
        };
        wanted.retain(|output| repair.is_some() || !output.needs_factors());
        if let Some(folder) = folder.as_ref().filter(|_| !wanted.is_empty()) {
            std::fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
        }
        let place = |output: Output| match &folder {
            Some(folder) if wanted.contains(&output) => folder.join(output.file_name()),
            _ => scratch.join(output.file_name()),
        };
        // W_c is apart from B A where it is kept.
        let is_apart = repair.is_some() && wanted.contains(&Output::Compressed);
        let merged = match repair {
            Some(_) => place(Output::Merged),
            None => place(Output::Compressed),
        };
        let saved = wanted.iter().map(|&output| (output, place(output)));
        Ok(Places {
            model: match is_apart {
                true => place(Output::Compressed),
                false => merged.clone(),
            },
            adapter: is_apart.then(|| place(Output::Adapter)),
            merged,
            saved: saved.collect(),
            scratch,
        })
    }
}

/// The table with its explanation.
pub(super) fn section(rows: Vec<Row>) -> Section {
    let dense = rows.iter().find(|row| row.method == DENSE);
    let reference = dense.and_then(|row| row.perplexity).map(|y| Reference {
        name: DENSE.into(),
        y,
    });
    let megabytes = |row: &Row| row.bytes.map(|bytes| bytes as f64 / f64::from(1 << 20));
    let by_compressor: Vec<Row> = (rows.iter().cloned())
        .map(|mut row| {
            if let Some(compressor) = &row.compress {
                row.method = format!("{compressor}, {}", row.method);
            }
            row
        })
        .collect();
    let plot = Plot {
        title: "Perplexity over size".into(),
        x: Axis::linear("size of the model (MiB)"),
        y: Axis::log("perplexity"),
        series: Series::by_method(&by_compressor, megabytes, "perplexity", |row| {
            row.perplexity
        }),
        reference,
    };
    let extra = |name: &str| Column::Extra(name.into());
    Section {
        title: "Low-rank repair of experts".into(),
        prose: "The routed experts alone are compressed and repaired; routers, shared experts, attention and embeddings are as \
                they were. Output error is the relative error of all their linears on the calibration windows, which they were \
                fitted to. Perplexity is that of the weights W_c + B A in the dtype of the model. Sizes count the experts in the form \
                of the compressor with factors in 16 bits, and all else as it is; bytes_saved in the JSON has the tensors of each \
                output, of which an adapter pads the factors of gate and up with zeros. Rerouted is the share of the choices of \
                tokens that changed. Time and memory are those of the repair."
            .into(),
        columns: vec![
            Column::Compress,
            Column::Method,
            Column::Rank,
            Column::LossUncompensated,
            Column::Loss,
            Column::Perplexity,
            Column::Bytes,
            Column::BytesOverDense,
            extra("rerouted"),
            extra("unseen_experts"),
            extra("pool_share"),
            Column::Seconds,
            Column::PeakRss,
        ],
        plots: vec![plot],
        rows,
        ..Section::default()
    }
}
