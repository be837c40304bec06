//! All suites on one model, and the methods applied on top of one another: one report that begins with a summary.

mod inputs;
mod preset;
pub(crate) mod presets;
mod summary;

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use causal_lm::{Decoder, Windows};
use eval_report::{Section, command_line, format};
use lm_eval::ProtocolKind;
use prune_lattice::experiment;
use toy_lm::bundled::{CALIBRATION, EVALUATION};

pub use self::inputs::Inputs;
use self::preset::Preset;
use self::summary::Part;
use crate::default_model;
use crate::estimate::Probe;
use crate::settings::{Settings, one_line, part};
use crate::suite::Suite;
use crate::suites::perplexity::{self, Protocol, tokens};
use crate::suites::structured::Counts;
use crate::suites::structured::search::MEASURED;

/// Windows to evaluate on by default, so that the whole takes minutes.
const WINDOWS: usize = 16;

/// What to run on.
#[derive(Debug, Clone, Default)]
pub struct Config {
    /// A model and texts; the bundled model by default.
    pub inputs: Option<Inputs>,
}

impl Config {
    /// The models it reads, which may be names on a hub.
    pub(crate) fn models(&mut self) -> Vec<&mut PathBuf> {
        let models = self.inputs.iter_mut().map(|inputs| &mut inputs.text.model);
        models.collect()
    }
}

/// Where the report goes by default: the build folder of this checkout.
pub(crate) fn report_folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .with_file_name("target")
        .join("report")
}

/// Run all of it.
///
/// # Errors
/// A model or text that cannot be read or run.
pub(crate) fn run(settings: &Settings, config: &Config) -> Result<Vec<Section>> {
    let settings = &Settings {
        samples: settings.samples.or(Some(WINDOWS)),
        ..settings.clone()
    };
    let (inputs, entropy) = match &config.inputs {
        Some(inputs) => (inputs.clone(), None),
        None => {
            let (inputs, entropy) = bundled_inputs(settings)?;
            (inputs, Some(entropy))
        }
    };
    let presets = presets::all(&inputs, settings)?;
    opened(settings, &inputs, &presets)?;
    let mut parts = Vec::new();
    let mut times = Vec::new();
    let (count, mut errors) = (presets.len(), Vec::new());
    for preset in presets {
        let started = Instant::now();
        let sections = preset.suite.run(&settings.within(preset.name));
        // A suite that fails leaves the others.
        let mut sections = sections
            .with_context(|| preset.name)
            .unwrap_or_else(|error| {
                let failed = Section {
                    title: preset.name.into(),
                    failures: vec![one_line(&error)],
                    ..Section::default()
                };
                errors.push(error);
                vec![failed]
            });
        if let Some(first) = sections.first_mut() {
            let command = command_line(&preset.command());
            first.protocol.insert("command".into(), command.into());
        }
        times.push(done(settings, preset.name, started));
        parts.push(Part {
            name: preset.crate_name,
            shown: preset.shown,
            verdict: preset.verdict,
            sections,
        });
    }
    if errors.len() == count
        && let Some(first) = errors.into_iter().next()
    {
        return Err(first);
    }
    if settings.is_part() {
        let sections = parts.into_iter().flat_map(|part| part.sections);
        return Ok(part(
            sections.flat_map(|section| section.failures).collect(),
        ));
    }
    let model = perplexity::file_name(&inputs.text.model);
    let summary = times.into_iter().fold(
        summary::section(&parts, &model, entropy),
        |summary, (name, time)| summary.fact(name, time),
    );
    let sections = parts.into_iter().flat_map(|part| part.sections);
    Ok(std::iter::once(summary).chain(sections).collect())
}

/// Opens the model and the texts once before any suite does, and says how long the suites take.
fn opened(settings: &Settings, inputs: &Inputs, presets: &[Preset]) -> Result<()> {
    let checkpoint = causal_lm::open(&inputs.text.model)?;
    perplexity::ensure_unseen(&inputs.calib, &inputs.text.text)?;
    let decoder = perplexity::open(settings, &checkpoint)?;
    let protocol = Protocol::new(settings, &inputs.text, &decoder)?;
    let evaluation = tokens(&protocol.decoding(settings, &inputs.text.text)?);
    let calibration = protocol.calibration(&inputs.calib)?;
    settings.expect("all but frontier", || {
        seconds(&decoder, evaluation, &calibration, presets)
    });
    Ok(())
}

/// About how long the suites take whose work is known beforehand.
fn seconds(
    decoder: &Decoder<'_>,
    evaluation: usize,
    calibration: &Windows,
    presets: &[Preset],
) -> Result<f64> {
    let probe = Probe::of(decoder, calibration)?;
    let drawn = |windows: usize| tokens(&calibration.first(windows));
    let of_suite = |preset: &Preset| -> Result<f64> {
        Ok(match &preset.suite {
            Suite::Lattice(config) => experiment::expected_seconds(&config.experiment)?,
            Suite::Structured(config) => {
                let counts = Counts {
                    evaluation,
                    calibration: drawn(config.calib_samples),
                    compared: drawn(config.search.compared(&config.recipes)),
                };
                let is_mixture = decoder.config().mixtures.iter().any(Option::is_some);
                config.seconds(&probe, &counts, is_mixture)
            }
            Suite::Lowrank(config) => {
                let texts = drawn(config.calib_samples + config.held_out_samples);
                config.seconds(&probe, texts, evaluation)
            }
            Suite::Kv(config) => probe.decode((1 + config.all_runs()) * evaluation),
            Suite::Chain(config) => {
                let texts = (drawn(config.calib_samples), drawn(MEASURED));
                config.seconds(&probe, texts, evaluation)
            }
            _ => 0.0,
        })
    };
    presets.iter().map(of_suite).sum()
}

/// Reports that a run is done, with its time.
fn done(settings: &Settings, name: &str, started: Instant) -> (String, String) {
    let time = format::seconds(started.elapsed().as_secs_f64());
    settings.note(&format!("{name}: {time}"));
    (name.to_owned(), time)
}

/// The bundled model with texts that it was not trained on, and the entropy of the tokens that are evaluated, in nats per
/// token.
fn bundled_inputs(settings: &Settings) -> Result<(Inputs, f64)> {
    let model = default_model::folder();
    ensure!(
        model.is_dir(),
        "{}: the bundled model is missing; cargo xtask train-default makes it",
        model.display()
    );
    let (text, calib) = (model.join(EVALUATION), model.join(CALIBRATION));
    let window = settings.window.unwrap_or(perplexity::WINDOW);
    let entropy = default_model::entropy(window, settings.samples)?;
    let inputs = Inputs {
        text: perplexity::Config {
            model,
            text,
            protocol: ProtocolKind::Windows,
        },
        calib,
    };
    Ok((inputs, entropy))
}
