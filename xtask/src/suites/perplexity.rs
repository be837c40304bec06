//! Perplexity of a checkpoint on a text.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use causal_lm::{Decoder, TextFile, TextTokenizer, Windows, read_text};
use eval_report::{Column, DENSE, Row, Section, Stopwatch};
use lm_eval::{Perplexity, ProtocolKind, ScoredWindows};

use super::hidden;
use crate::bar::Bar;
use crate::estimate::Probe;
use crate::settings::Settings;
use crate::{default_model, hub, model};

/// Window in positions where none was asked for and the model reaches that far.
pub(crate) const WINDOW: usize = 512;

/// What to measure.
#[derive(Debug, Clone)]
pub struct Config {
    /// Checkpoint folder or GGUF file.
    pub model: PathBuf,
    /// Text to evaluate on.
    pub text: PathBuf,
    /// How the text becomes windows and targets.
    pub protocol: ProtocolKind,
}

/// How texts are cut into windows for one model.
pub(crate) struct Protocol {
    tokenizer: TextTokenizer,
    model: PathBuf,
    /// Rows of the embedding.
    vocab: usize,
    protocol: lm_eval::Protocol,
    /// Whether the model is the one that is bundled with the texts.
    is_bundled: bool,
}

impl Protocol {
    pub(crate) fn new(settings: &Settings, config: &Config, decoder: &Decoder<'_>) -> Result<Self> {
        let tokenizer = TextTokenizer::open(&config.model)?;
        let reach = decoder.config().max_positions;
        let window = settings.window.unwrap_or(WINDOW.min(reach));
        let protocol =
            lm_eval::Protocol::new(config.protocol, window, reach).with_context(|| {
                format!(
                    "--window {window}: {} was made for {reach} positions",
                    config.model.display()
                )
            })?;
        Ok(Self {
            tokenizer,
            model: config.model.clone(),
            vocab: decoder.config().vocab,
            protocol,
            is_bundled: default_model::holds(&config.model),
        })
    }

    /// The windows to calibrate on: all of the text.
    pub(crate) fn calibration(&self, text: &Path) -> Result<Windows> {
        let windows = self.protocol.windows(&self.tokenizer, &read_text(text)?);
        let windows = windows.with_context(|| text.display().to_string())?;
        self.check_tokens(&windows, text)?;
        Ok(windows)
    }

    /// Refuses a tokenizer that makes tokens of the text which the model has no row for.
    fn check_tokens(&self, windows: &Windows, text: &Path) -> Result<()> {
        let mut tokens = windows.iter().flatten().copied();
        let Some(id) = tokens.find(|&id| id as usize >= self.vocab) else {
            return Ok(());
        };
        let token = self.tokenizer.token(id).unwrap_or_default();
        anyhow::bail!(
            "{}: the tokenizer makes token {id} ({token:?}) of {}, but the embedding has {} rows",
            self.model.display(),
            text.display(),
            self.vocab
        )
    }

    /// The windows to evaluate on: the first `--samples` of the text.
    pub(crate) fn evaluation(&self, settings: &Settings, text: &Path) -> Result<ScoredWindows> {
        let (protocol, tokenizer, contents) = (&self.protocol, &self.tokenizer, read_text(text)?);
        let windows = match settings.samples {
            Some(samples) => protocol.first(tokenizer, &contents, samples),
            None => protocol.evaluation(tokenizer, &contents),
        };
        let windows = windows.with_context(|| text.display().to_string())?;
        self.check_tokens(windows.inputs(), text)?;
        Ok(windows)
    }

    /// The windows to decode token by token: those of [`Protocol::evaluation`], of which every token can be a target.
    pub(crate) fn decoding(&self, settings: &Settings, text: &Path) -> Result<Windows> {
        anyhow::ensure!(
            self.protocol.kind != ProtocolKind::Rolling,
            "--protocol rolling scores every token of a text once, decoding only those after each window's prompt; \
             use windows or gptq"
        );
        let windows = self.calibration(text)?;
        Ok(match settings.samples {
            Some(samples) => windows.first(samples),
            None => windows,
        })
    }

    /// `section` with the facts that make a perplexity comparable.
    pub(crate) fn facts(
        &self,
        section: Section,
        text: &Path,
        windows: usize,
        targets: usize,
    ) -> Section {
        let kind = match self.protocol.kind {
            ProtocolKind::WindowsWithoutBos => ProtocolKind::Windows,
            kind => kind,
        };
        let mut section = section;
        if default_model::holds(text) && !self.is_bundled {
            section.remarks.push(
                "The text is the bundled one, generated tales for the bundled model: it compares what was done to this model, \
                 and its perplexity means nothing beside published ones. --text names another."
                    .into(),
            );
        }
        section
            .fact("evaluation text", file_name(text))
            .fact("protocol", kind.name())
            .fact("window", self.protocol.window)
            .fact("BOS", self.protocol.bos(&self.tokenizer))
            .fact("windows", windows)
            .fact("targets", targets)
    }
}

/// Refuses to calibrate on the text that is evaluated on.
pub(crate) fn ensure_unseen(calib: &Path, text: &Path) -> Result<()> {
    anyhow::ensure!(
        !TextFile::new(calib)?.overlaps(&TextFile::new(text)?),
        "--calib {} has text of --text {}: a model calibrated on its evaluation text looks better than it is; \
         FILE[0..80%] and FILE[80..100%] are parts of one file",
        calib.display(),
        text.display()
    );
    Ok(())
}

/// Positions of all windows.
pub(crate) fn tokens(windows: &Windows) -> usize {
    windows.count() * windows.window_len()
}

/// Last part of a path, which is what a report can tell without telling of the machine; the name on the hub of a model
/// that was fetched from there.
pub(crate) fn file_name(path: &Path) -> String {
    if let Some(name) = hub::name_in_cache(path) {
        return name;
    }
    path.file_name()
        .unwrap_or(path.as_os_str())
        .to_string_lossy()
        .into_owned()
}

pub(crate) use crate::model::decoded as open;

/// Measures `decoder` and fills the row's quality, size, speed and memory.
pub(crate) fn measure(
    decoder: &Decoder<'_>,
    windows: &ScoredWindows,
    row: &mut Row,
    progress: &Bar,
) -> Result<()> {
    let watch = Stopwatch::start();
    let perplexity = Perplexity::measure(decoder, windows, progress)?;
    watch.stop(row);
    row.perplexity = Some(perplexity.perplexity());
    row.nll = Some(perplexity.nll());
    for (name, value) in [
        ("word_perplexity", perplexity.word_perplexity()),
        ("byte_perplexity", perplexity.byte_perplexity()),
        ("bits_per_byte", perplexity.bits_per_byte()),
    ] {
        if let Some(value) = value {
            row.extra.insert(name.into(), value.into());
        }
    }
    row.tokens_per_second = Some(perplexity.tokens_per_second());
    row.params = Some(decoder.checkpoint().parameters());
    row.bytes = Some(decoder.checkpoint().total_bytes());
    Ok(())
}

/// Measure the perplexity of one checkpoint, and its hidden states where asked for.
///
/// # Errors
/// A model or text that cannot be read or run.
pub fn run(settings: &Settings, config: &Config, hidden_metrics: bool) -> Result<Vec<Section>> {
    let checkpoint = settings.weights.open(&config.model)?;
    let decoder = model::decoder(settings, &checkpoint)?;
    let protocol = Protocol::new(settings, config, &decoder)?;
    let windows = protocol.evaluation(settings, &config.text)?;
    settings.expect("perplexity", || {
        Ok(Probe::of(&decoder, windows.inputs())?.pass(tokens(windows.inputs())))
    });
    let row = settings.cells.get("perplexity", || {
        let progress = settings.bar("perplexity", 0);
        let mut row = Row {
            model: Some(file_name(&config.model)),
            ..Row::new("perplexity", DENSE)
        };
        measure(&decoder, &windows, &mut row, &progress)?;
        settings.weights.fill(&mut row, &decoder.weights()?);
        if hidden_metrics {
            hidden::hidden_metrics(&decoder, windows.inputs(), &mut row)?;
        }
        progress.finish();
        anyhow::Ok(row)
    })?;
    let Some(row) = row else {
        return Ok(Vec::new());
    };
    let section = Section {
        title: "Perplexity".into(),
        prose: "Perplexity is the exponential of the mean cross-entropy over all targets. The protocol windows takes \
                consecutive windows, each with BOS where the tokenizer has one, and scores all but the first token; gptq \
                cuts them from the text with the tokenizer's own special tokens; rolling scores every token once and also \
                gives the perplexity per word and byte and the bits per byte (lm-evaluation-harness)."
            .into(),
        columns: vec![
            Column::Model,
            Column::Perplexity,
            Column::Nll,
            Column::Extra("word_perplexity".into()),
            Column::Extra("byte_perplexity".into()),
            Column::Extra("bits_per_byte".into()),
            Column::Params,
            Column::Bytes,
            Column::Extra("weight_bytes".into()),
            Column::Extra("arithmetic".into()),
            Column::Extra("linears".into()),
            Column::TokensPerSecond,
            Column::Seconds,
            Column::PeakRss,
            Column::Extra("mnn".into()),
            Column::Extra("nuclear".into()),
            Column::Extra("entropy".into()),
        ],
        rows: vec![row],
        remarks: settings.weights.other_base(&config.model).into_iter().collect(),
        ..Section::default()
    };
    Ok(vec![protocol.facts(
        section,
        &config.text,
        windows.count(),
        windows.targets(),
    )])
}
