//! Every suite on one model, and the methods applied on top of one another: one report with a summary in front.

mod chain;
mod summary;

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use causal_lm::TextTokenizer;
use eval_report::{Section, command_line, format};
use toy_lm::bundled::{self, CALIBRATION, EVALUATION};

use super::perplexity;
use crate::cli::{self, Common};
use crate::default_model;

/// Windows to evaluate on where nothing is said, so that the whole takes minutes.
const WINDOWS: usize = 16;

/// What to run on.
#[derive(Debug, Clone, Default)]
pub struct Config {
    /// A model and texts; the embedded model where none are given.
    pub given: Option<Given>,
}

/// A model with texts.
#[derive(Debug, Clone)]
pub struct Given {
    /// Model and text to evaluate on.
    pub text: perplexity::Config,
    /// Text to calibrate on.
    pub calib: PathBuf,
}

/// Where the report goes if nothing is said: the build folder of this checkout.
pub(crate) fn report_folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .with_file_name("target")
        .join("report")
}

/// Run all of it.
///
/// # Errors
/// A model or text that cannot be read or run.
pub(crate) fn run(common: &Common, config: &Config) -> Result<Vec<Section>> {
    let (given, entropy) = match &config.given {
        Some(given) => (given.clone(), None),
        None => {
            let (given, entropy) = embedded()?;
            (given, Some(entropy))
        }
    };
    let common = &Common {
        samples: common.samples.or(Some(WINDOWS)),
        ..common.clone()
    };
    let mut sections = Vec::new();
    let mut times = Vec::new();
    for cli::Part { words, suite } in cli::parts(&given, common)? {
        let name = &words[3];
        let started = Instant::now();
        let of_suite = super::sections(common, &suite);
        let mut of_suite = of_suite.with_context(|| name.clone())?;
        if let Some(first) = of_suite.first_mut() {
            let command = command_line(&words);
            first.protocol.insert("command".into(), command.into());
        }
        times.push(done(common, name, started));
        sections.extend(of_suite);
    }
    let started = Instant::now();
    sections.push(chain::run(common, &given).context("chain")?);
    times.push(done(common, "chain", started));
    let summary = summary::section(&sections, &given, entropy);
    let summary = times
        .into_iter()
        .fold(summary, |summary, (name, time)| summary.fact(name, time));
    sections.insert(0, summary);
    Ok(sections)
}

/// A run that is done, with its time.
fn done(common: &Common, name: &str, started: Instant) -> (String, String) {
    let time = format::seconds(started.elapsed().as_secs_f64());
    common.note(&format!("{name}: {time}"));
    (name.to_owned(), time)
}

/// The embedded model with texts that it has not seen, and the cross-entropy of the generator itself on the text to
/// evaluate on, in nats per token.
fn embedded() -> Result<(Given, f64)> {
    let model = default_model::folder();
    ensure!(
        model.is_dir(),
        "{}: the embedded model is not there; cargo xtask train-default makes it",
        model.display()
    );
    let (text, calib) = (model.join(EVALUATION), model.join(CALIBRATION));
    let tokens = TextTokenizer::open(&model)?.encode_file(&text)?.len();
    let entropy = bundled::evaluation().nats() / tokens as f64;
    let given = Given {
        text: perplexity::Config {
            model,
            text,
            bos: true,
        },
        calib,
    };
    Ok((given, entropy))
}
