//! One of the runs that all suites consist of.

use std::path::Path;

use eval_report::{Budget, Row, format};
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
    /// What the summary says of them.
    pub(super) verdict: Verdict,
}

/// What the summary says of a crate: what to use, and how the method of its paper fares.
#[derive(Debug, Clone, Default)]
pub(crate) struct Verdict {
    /// What is recommended by the results in RESULTS.md.
    pub(super) recommended: String,
    /// Labels of a method and of the baseline that it is to beat.
    pub(super) compared: Vec<[String; 2]>,
}

impl Verdict {
    /// A recommendation, and the places among `shown` of methods and of their baselines.
    pub(super) fn new(
        recommended: impl Into<String>,
        shown: &[Shown],
        compared: &[[usize; 2]],
    ) -> Self {
        let labels = |pair: &[usize; 2]| pair.map(|at| shown[at].label.clone());
        Self {
            recommended: recommended.into(),
            compared: compared.iter().map(labels).collect(),
        }
    }

    /// One line on the rows of the summary, which are called by their labels.
    pub(super) fn line(&self, crate_name: &str, rows: &[Row]) -> String {
        let find = |label: &String| rows.iter().find(|row| row.method == *label);
        let compared = self.compared.iter().filter_map(|[method, baseline]| {
            let (method, baseline) = (find(method)?, find(baseline)?);
            let (ours, theirs, falls) = match (method.perplexity, baseline.perplexity) {
                (Some(ours), Some(theirs)) => (ours, theirs, true),
                _ => (method.accuracy?, baseline.accuracy?, false),
            };
            let shown = [ours, theirs].map(|value| format::real(value, 3));
            // What looks equal is called equal.
            let verb = match (shown[0] == shown[1], (ours < theirs) == falls) {
                (true, _) => "equals",
                (_, true) => "beats",
                (_, false) => "loses to",
            };
            let [ours, theirs] = shown;
            let (method, baseline) = (&method.method, &baseline.method);
            Some(format!(
                "{method} {verb} {baseline} ({ours} against {theirs})"
            ))
        });
        let compared: Vec<String> = compared.collect();
        let mut line = format!("{crate_name}: recommended is {}", self.recommended);
        if !compared.is_empty() {
            line += &format!("; {}", compared.join("; "));
        }
        line + "."
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    fn row(method: &str, perplexity: Option<f64>, accuracy: Option<f64>) -> Row {
        Row {
            perplexity,
            accuracy,
            ..Row::new("summary", method)
        }
    }

    #[test]
    fn a_verdict_says_where_the_method_loses_to_its_baseline() {
        let shown = ["new", "old", "plain"].map(|name| Shown::new(name, name));
        let verdict = Verdict::new("new", &shown, &[[0, 2], [1, 2]]);
        let rows = [
            row("new", Some(1.5), None),
            row("old", Some(2.5), None),
            row("plain", Some(2.0), None),
        ];
        assert_eq!(
            verdict.line("a crate", &rows),
            "a crate: recommended is new; new beats plain (1.500 against 2.000); old loses to plain (2.500 against 2.000)."
        );
        // Accuracies are better the higher they are, and a row that is not there is not compared.
        let rows = [row("old", None, Some(0.5)), row("plain", None, Some(0.25))];
        assert_eq!(
            verdict.line("a crate", &rows),
            "a crate: recommended is new; old beats plain (0.500 against 0.250)."
        );
        assert_eq!(verdict.line("a crate", &[]), "a crate: recommended is new.");
    }
}
