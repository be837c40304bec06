//! Structured pruning: quality, size and speed by method and ratio.

use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::ValueEnum;

use super::perplexity;
use crate::cli::Common;
use crate::report::Section;

/// What to prune and measure.
#[derive(Debug, Clone)]
pub struct Config {
    /// Model, text and protocol of the evaluation.
    pub perplexity: perplexity::Config,
    /// Text to calibrate on.
    pub calib: PathBuf,
    /// Methods.
    pub methods: Vec<Method>,
    /// Shares of the prunable parameters to remove, each at least 0 and below 1.
    pub ratios: Vec<f64>,
    /// Folder for the compressed checkpoint.
    pub save: Option<PathBuf>,
    /// Whether to stop at the plan.
    pub dry_run: bool,
}

/// A method by its name on the command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Method {
    /// FLAP
    Flap,
    /// FLAP as its reference code computes it
    FlapCompat,
    /// Structured Wanda
    WandaSp,
    /// Weight norms
    Magnitude,
    /// Random selection, the control
    Random,
    /// Týr
    Tyr,
    /// StructPrune
    Structprune,
    /// StructPrune with softmax allocation
    StructpruneSoftmax,
    /// Rate-distortion allocation by dynamic programming
    RdDp,
}

/// Prune at every method and ratio and measure each.
///
/// # Errors
/// A model or text that cannot be read or run.
pub fn run(_: &Common, _: &Config) -> Result<Vec<Section>> {
    bail!("eval structured is not built yet")
}
