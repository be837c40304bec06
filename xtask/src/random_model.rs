//! Checkpoints with random weights, to measure memory and speed on models of any size.

use std::path::PathBuf;

use anyhow::Result;
use candle_core::DType;
use causal_lm::synthetic;
use tensor_io::WriteOptions;

/// What to write.
#[derive(Debug, Clone)]
pub struct Config {
    /// A config.json.
    pub config: PathBuf,
    /// Folder to write.
    pub out: PathBuf,
    /// Stored type.
    pub dtype: DType,
    /// Seed of the weights.
    pub seed: u64,
    /// How the checkpoint is written.
    pub write: WriteOptions,
}

/// Write the checkpoint.
///
/// # Errors
/// A config that is not a supported model, or a folder that cannot be written.
pub fn run(config: &Config) -> Result<()> {
    let fields = tensor_io::Config::read(&config.config)?;
    let random = synthetic::random(config.seed);
    let written = synthetic::write(&fields, config.dtype, &config.out, &config.write, random)?;
    eprintln!(
        "{}: {} parameters in {} bytes",
        config.out.display(),
        written.parameters,
        written.bytes
    );
    Ok(())
}
