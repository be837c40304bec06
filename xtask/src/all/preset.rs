//! One of the runs that all suites consist of.

use std::path::Path;

use eval_report::{Budget, Row};
use lm_eval::ProtocolKind;

use super::inputs::Inputs;
use crate::settings::Settings;
use crate::suite::Suite;

/// A suite with fixed settings, and the command line for the same run.
pub(crate) struct Preset {
    /// The crate whose methods it runs.
    pub(super) crate_name: &'static str,
    /// Name of the suite on the command line.
    pub(super) name: &'static str,
    /// What to measure.
    pub(crate) suite: Suite,
    /// The suite's own flags.
    pub(super) flags: Vec<String>,
    /// The rows of it that the summary shows.
    pub(super) shown: Vec<Shown>,
}

impl Preset {
    /// The command line for this run, one argument each.
    pub(crate) fn command(&self) -> Vec<String> {
        ["cargo", "xtask", "eval", self.name]
            .into_iter()
            .map(String::from)
            .chain(self.flags.iter().cloned())
            .collect()
    }
}

/// A row that the summary shows: the first one with this method at these settings.
#[derive(Debug, Clone, Default)]
pub(super) struct Shown {
    /// What the summary calls it.
    pub(super) label: String,
    pub(super) method: String,
    pub(super) compress: Option<String>,
    pub(super) ratio: Option<f64>,
    pub(super) sparsity: Option<f64>,
    pub(super) rank: Option<u64>,
    pub(super) budget: Option<Budget>,
    /// What was done after pruning, in the suite `lattice`.
    pub(super) repair: Option<&'static str>,
}

impl Shown {
    pub(super) fn new(label: impl Into<String>, method: impl Into<String>) -> Self {
        Self {
            label: label.into(),
            method: method.into(),
            ..Self::default()
        }
    }

    /// Whether `row` has this method and the settings that are given.
    pub(super) fn is(&self, row: &Row) -> bool {
        fn fits<T: PartialEq>(wanted: &Option<T>, found: &Option<T>) -> bool {
            wanted.is_none() || wanted == found
        }
        row.method == self.method
            && fits(&self.compress, &row.compress)
            && fits(&self.ratio, &row.ratio)
            && fits(&self.sparsity, &row.sparsity)
            && fits(&self.rank, &row.rank)
            && fits(&self.budget, &row.budget)
            && self.repair.is_none_or(|repair| {
                let found = row.extra.get("repair");
                found.is_some_and(|found| found == repair)
            })
    }
}

/// Flags of a command line.
#[derive(Debug, Clone, Default)]
pub(super) struct Flags(Vec<String>);

impl Flags {
    /// Model, text and how it is cut.
    pub(super) fn of_text(inputs: &Inputs, settings: &Settings) -> Self {
        let mut flags = Self::default()
            .with("--model", path(&inputs.text.model))
            .with("--text", path(&inputs.text.text));
        match inputs.text.protocol {
            ProtocolKind::Windows => {}
            ProtocolKind::WindowsWithoutBos => flags.0.push("--no-bos".into()),
            kind => flags = flags.with("--protocol", kind),
        }
        if let Some(window) = settings.window {
            flags = flags.with("--window", window);
        }
        if let Some(samples) = settings.samples {
            flags = flags.with("--samples", samples);
        }
        flags
    }

    pub(super) fn with(mut self, name: &str, value: impl ToString) -> Self {
        self.0.extend([name.to_owned(), value.to_string()]);
        self
    }

    /// A flag with several values.
    pub(super) fn with_all<T: ToString>(
        self,
        name: &str,
        values: impl IntoIterator<Item = T>,
    ) -> Self {
        let values: Vec<String> = values.into_iter().map(|value| value.to_string()).collect();
        self.with(name, values.join(","))
    }

    pub(super) fn finish(self, settings: &Settings) -> Vec<String> {
        self.with("--seed", settings.seed).0
    }
}

pub(super) fn path(path: &Path) -> String {
    path.display().to_string()
}
