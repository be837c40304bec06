//! Perplexity of a checkpoint on a text.

use std::path::PathBuf;

use anyhow::{Result, bail};

use crate::cli::Common;
use crate::report::Section;

/// What to measure.
#[derive(Debug, Clone)]
pub struct Config {
    /// Checkpoint folder.
    pub model: PathBuf,
    /// Text to evaluate on.
    pub text: PathBuf,
    /// Whether windows begin with BOS where the tokenizer has it.
    pub bos: bool,
    /// Windows to run at once, where asked for.
    pub batch: Option<usize>,
}

/// Measure the perplexity of one checkpoint.
///
/// # Errors
/// A model or text that cannot be read or run.
pub fn run(_: &Common, _: &Config) -> Result<Vec<Section>> {
    bail!("eval perplexity is not built yet")
}
