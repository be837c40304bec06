//! The bundled model: where it is, and `train-default`, which makes it.

use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use causal_lm::TextTokenizer;
use eval_report::format;
use toy_lm::bundled;

use crate::bar::Bar;
use crate::settings::Device;

/// What to train.
#[derive(Debug, Clone)]
pub struct Config {
    /// Which model.
    pub architecture: bundled::Architecture,
    /// Folder to write.
    pub out: PathBuf,
    /// Replace what is there.
    pub overwrite: bool,
    /// Steps of 4,096 tokens.
    pub steps: usize,
    /// Seed of weights and text.
    pub seed: u64,
    /// Where to compute.
    pub device: Device,
}

/// The model's folder in this checkout, with its texts; relative to the current folder where it is below it.
pub fn folder() -> PathBuf {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("model");
    let current = std::env::current_dir().ok();
    match current.and_then(|current| Some(folder.strip_prefix(current).ok()?.to_owned())) {
        Some(below) => below,
        None => folder,
    }
}

/// Whether a file is in the bundled model's folder, or is that folder, by whatever path.
pub(crate) fn holds(path: &Path) -> bool {
    let real = |path: &Path| path.canonicalize().unwrap_or_else(|_| path.to_owned());
    real(path).starts_with(real(&folder()))
}

/// The entropy of the evaluation text in nats per token, over the tokens that `windows` windows of `window` positions score
/// (all that the text has, where `None`).
///
/// # Errors
/// A model that is not there.
pub fn entropy(window: usize, windows: Option<usize>) -> Result<f64> {
    let folder = folder();
    let tokenizer = TextTokenizer::open(&folder)?;
    let mut tokens = tokenizer.encode_file(folder.join(bundled::EVALUATION))?;
    // BOS takes a position of each window.
    let text = window - 1;
    let all = tokens.len() / text;
    tokens.truncate(text * windows.map_or(all, |windows| windows.min(all)));
    let bytes = tokenizer.decode(&tokens)?.len();
    Ok(bundled::evaluation().nats_of_prefix(bytes) / tokens.len() as f64)
}

/// Train the bundled model and write its checkpoint.
///
/// # Errors
/// A folder that cannot be written, or a device that is not there.
pub fn run(config: &Config) -> Result<()> {
    let device = config.device.open()?;
    ensure!(
        config.overwrite || !config.out.exists(),
        "--out {}: exists; --overwrite replaces it",
        config.out.display()
    );
    let mut options = bundled::Options::new(&config.out);
    options.architecture = config.architecture;
    options.overwrite = config.overwrite;
    options.steps = config.steps;
    options.seed = config.seed;
    let bar = Bar::new("training", config.steps as u64);
    let trained = bundled::train(&options, &device, &bar)?;
    bar.finish();
    println!(
        "{}: {} tokens in {} ({:.0} tokens/s), {:.4} nats per token on the last of them",
        config.out.display(),
        options.tokens(),
        format::seconds(trained.seconds),
        options.tokens() as f64 / trained.seconds,
        trained.loss
    );
    Ok(())
}
