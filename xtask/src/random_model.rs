//! Checkpoints with random weights, to measure memory and speed on models of any size.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use candle_core::DType;
use causal_lm::{Error, ModelConfig, synthetic};
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
    let flag = || format!("--config {}", config.config.display());
    let fields = tensor_io::Config::read(&config.config).context("--config")?;
    ModelConfig::new(&fields).with_context(flag)?;
    if config.write.overwrite {
        replaceable(&config.out).context("--out")?;
    }
    let random = synthetic::random(config.seed);
    let written = synthetic::write(&fields, config.dtype, &config.out, &config.write, random);
    let written = written.map_err(|error| {
        let is_of_config = matches!(error, Error::TooLarge { .. });
        let error = anyhow::Error::new(error);
        match is_of_config {
            true => error.context(flag()),
            false => error.context("--out"),
        }
    })?;
    eprintln!(
        "{}: {} parameters in {} bytes",
        config.out.display(),
        written.parameters,
        written.bytes
    );
    Ok(())
}

/// A folder is replaced where it has nothing but what is written here: a tokenizer shows that a model of somebody's lies there.
fn replaceable(folder: &Path) -> Result<()> {
    if !folder.is_dir() {
        return Ok(());
    }
    let files = std::fs::read_dir(folder).with_context(|| folder.display().to_string())?;
    for file in files {
        let name = file?.file_name();
        let name = name.to_string_lossy();
        let weights = name.strip_prefix("model").is_some_and(|rest| {
            rest.ends_with(".safetensors") || rest == ".safetensors.index.json"
        });
        ensure!(
            weights || name == "config.json",
            "{}: {name} is no file of a random model; name another folder",
            folder.display()
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_with_a_tokenizer_is_not_replaced() {
        let dir = tempfile::tempdir().unwrap();
        assert!(replaceable(&dir.path().join("new")).is_ok());
        for name in [
            "config.json",
            "model.safetensors",
            "model-00001-of-00002.safetensors",
            "model.safetensors.index.json",
        ] {
            std::fs::write(dir.path().join(name), "").unwrap();
        }
        assert!(replaceable(dir.path()).is_ok());
        std::fs::write(dir.path().join("tokenizer.json"), "").unwrap();
        let error = replaceable(dir.path()).unwrap_err().to_string();
        assert!(error.contains("tokenizer.json"), "{error}");
    }
}
