//! `cargo xtask report`: two reports compared.

use std::path::PathBuf;

use anyhow::{Context, Result};
use eval_report::{Comparison, Report};

use crate::stdout::print;

/// What to compare.
#[derive(Debug, Clone)]
pub(crate) struct Config {
    /// A `report.json`.
    pub before: PathBuf,
    /// The `report.json` of another run.
    pub after: PathBuf,
    /// Whether the comparison is printed as JSON.
    pub json: bool,
}

/// Compare and print.
///
/// # Errors
/// A file that is not a report, named.
pub(crate) fn run(config: &Config) -> Result<()> {
    let (before, after) = (Report::read(&config.before)?, Report::read(&config.after)?);
    let comparison = Comparison::new(&before, &after)?;
    print(&if config.json {
        serde_json::to_string_pretty(&comparison).context("comparison to JSON")? + "\n"
    } else {
        comparison.to_text(&config.before, &config.after)
    })
}
