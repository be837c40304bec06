//! Two reports compared row by row.
//!
//! Rows are matched by suite, method, model, settings, and every other text field. Measurements are compared number by
//! number. A change is called noise only where the reports say how much to expect (spread, standard errors), or where it
//! is a single timing.

mod text;

use std::collections::BTreeSet;

use serde::Serialize;
use serde_json::{Map, Value};

use crate::error::Result;
use crate::report::Report;
use crate::row::{KEYS, Role, Row};

/// Relative change of a single timing or memory peak that is noise: the difference between runs of the same program on
/// the same machine while other programs use it.
pub const NOISE: f64 = 0.1;

/// Fields of a row that neither identify it nor are measured.
const ASIDE: [&str; 5] = ["role", "spread", "layers", "notes", "peak_rss_scope"];
/// Fields that depend on the machine and on its load.
const COSTS: [&str; 5] = [
    "seconds",
    "tokens_per_second",
    "tokens_per_second_dense",
    "speedup",
    "peak_rss_bytes",
];

/// What two reports have in common and where they differ.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Comparison {
    /// Command line of the first report.
    pub command_before: Vec<String>,
    /// Command line of the second.
    pub command_after: Vec<String>,
    /// Facts about the runs that differ.
    pub circumstances: Vec<Circumstance>,
    /// Rows in both that differ in a number.
    pub rows: Vec<Changes>,
    /// Keys of the rows in the first report alone.
    pub only_before: Vec<Map<String, Value>>,
    /// Keys of the rows in the second report alone.
    pub only_after: Vec<Map<String, Value>>,
    /// Rows in both.
    pub matched: usize,
    /// Numbers that are equal in both.
    pub equal: usize,
}

/// A fact about the run that is not the same.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Circumstance {
    /// `machine`, `run`, or the title of a section whose protocol it belongs to.
    pub of: String,
    /// The fact's name.
    pub name: String,
    /// Its value in the first report, where it has one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub before: Option<Value>,
    /// Its value in the second.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub after: Option<Value>,
}

/// What changed in a row.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Changes {
    /// Its key: suite, method, model, settings and text.
    pub row: Map<String, Value>,
    /// The numbers that differ.
    pub changes: Vec<Change>,
}

/// Whether a number is a property of the model or of the run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// Quality and size: the same command gives the same number.
    Quality,
    /// Time and memory of the run.
    Cost,
}

/// A number before and after.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Change {
    /// Its name in the report.
    pub field: String,
    /// What it is a property of.
    pub kind: Kind,
    /// Its value in the first report; absent where it was not measured there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub before: Option<f64>,
    /// Its value in the second.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub after: Option<f64>,
    /// (after − before) / |before|; absent where one is absent or the first is 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub relative: Option<f64>,
    /// Why the change may mean nothing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub noise: Option<String>,
}

impl Comparison {
    /// Compares two reports.
    ///
    /// # Errors
    /// None in practice: rows are converted to JSON.
    pub fn new(before: &Report, after: &Report) -> Result<Self> {
        let circumstances = circumstances(before, after)?;
        let is_same_machine = circumstances
            .iter()
            .all(|c| c.of != "machine" && !["device", "threads"].contains(&&*c.name));
        let has_references = [before, after]
            .iter()
            .all(|report| report.rows().any(|row| row.role == Role::Reference));
        let fields = |report: &Report| -> Result<Vec<Fields>> {
            report
                .rows()
                .map(|row| Fields::new(row, has_references))
                .collect()
        };
        let before_rows = fields(before)?;
        let mut unmatched: Vec<Option<Fields>> = fields(after)?.into_iter().map(Some).collect();
        let mut comparison = Self {
            command_before: before.command.clone(),
            command_after: after.command.clone(),
            circumstances,
            rows: Vec::new(),
            only_before: Vec::new(),
            only_after: Vec::new(),
            matched: 0,
            equal: 0,
        };
        for row in before_rows {
            let is_same = |other: &&mut Option<Fields>| {
                other.as_ref().is_some_and(|other| other.key == row.key)
            };
            match unmatched.iter_mut().find(is_same).and_then(Option::take) {
                None => comparison.only_before.push(row.key),
                Some(now) => comparison.add(row, &now, is_same_machine),
            }
        }
        let rest = unmatched.into_iter().flatten();
        comparison.only_after = rest.map(|row| row.key).collect();
        Ok(comparison)
    }

    fn add(&mut self, then: Fields, now: &Fields, is_same_machine: bool) {
        self.matched += 1;
        let own = now
            .measured
            .keys()
            .filter(|name| !then.measured.contains_key(*name));
        let mut changes = Vec::new();
        for field in then.measured.keys().chain(own) {
            let (before, after) = (then.number(field), now.number(field));
            if before == after {
                self.equal += usize::from(before.is_some());
                continue;
            }
            let kind = match COSTS.contains(&&**field) {
                true => Kind::Cost,
                false => Kind::Quality,
            };
            let both = before.zip(after);
            let relative = both
                .filter(|(before, _)| *before != 0.0)
                .map(|(before, after)| (after - before) / before.abs());
            let is_small = relative.is_some_and(|change| change.abs() < NOISE);
            let has_ranges = then.range(field).is_some() && now.range(field).is_some();
            let noise = match kind {
                Kind::Cost if both.is_some() && !is_same_machine => {
                    Some("other machine or settings".into())
                }
                Kind::Cost if is_small && !has_ranges => {
                    Some(format!("single runs differ by {:.0} %", 100.0 * NOISE))
                }
                _ => both.and_then(|both| noise(field, both, &then, now)),
            };
            changes.push(Change {
                field: field.clone(),
                kind,
                before,
                after,
                relative,
                noise,
            });
        }
        if !changes.is_empty() {
            self.rows.push(Changes {
                row: then.key,
                changes,
            });
        }
    }
}

/// The fields of a row, sorted.
struct Fields {
    key: Map<String, Value>,
    measured: Map<String, Value>,
    all: Map<String, Value>,
}

impl Fields {
    /// Numbers of the dense model are left out where it has a row of its own.
    fn new(row: &Row, has_reference: bool) -> Result<Self> {
        let all = row.to_fields()?;
        let is_key = |name: &str, value: &Value| {
            !ASIDE.contains(&name) && (KEYS.contains(&name) || !value.is_number())
        };
        let repeats = |name: &str| name.ends_with("_dense") || name.ends_with("_full");
        let is_measured = |name: &str, value: &Value| {
            let is_told_elsewhere = name.ends_with("_stderr") || has_reference && repeats(name);
            value.is_number() && !KEYS.contains(&name) && !is_told_elsewhere
        };
        let select = |wanted: &dyn Fn(&str, &Value) -> bool| -> Map<String, Value> {
            let wanted = all.iter().filter(|(name, value)| wanted(name, value));
            wanted
                .map(|(name, value)| (name.clone(), value.clone()))
                .collect()
        };
        Ok(Self {
            key: select(&is_key),
            measured: select(&is_measured),
            all,
        })
    }

    fn number(&self, name: &str) -> Option<f64> {
        self.all.get(name)?.as_f64()
    }

    /// Smallest and largest of several measurements.
    fn range(&self, name: &str) -> Option<(f64, f64)> {
        let spread = self.all.get("spread")?.get(name)?;
        Some((spread["min"].as_f64()?, spread["max"].as_f64()?))
    }
}

/// Why a change may be chance, by what the reports say of the spread.
fn noise(field: &str, (before, after): (f64, f64), then: &Fields, now: &Fields) -> Option<String> {
    if let Some(((low, high), (low_now, high_now))) = then.range(field).zip(now.range(field)) {
        let overlap = low.max(low_now) <= high.min(high_now);
        return overlap.then(|| "the ranges overlap".into());
    }
    let error = format!("{field}_stderr");
    let (a, b) = then.number(&error).zip(now.number(&error))?;
    let is_within = (after - before).abs() <= 2.0 * a.hypot(b);
    is_within.then(|| "within 2 standard errors".into())
}

/// The facts about the runs that differ.
fn circumstances(before: &Report, after: &Report) -> Result<Vec<Circumstance>> {
    let run = |report: &Report| -> Map<String, Value> {
        [
            ("version", report.version.clone().into()),
            ("device", report.device.clone().into()),
            ("threads", report.threads.into()),
            ("seed", report.seed.into()),
        ]
        .map(|(name, value): (&str, Value)| (name.to_owned(), value))
        .into_iter()
        .collect()
    };
    let machine = |report: &Report| serde_json::to_value(&report.machine);
    let machines = (machine(before)?, machine(after)?);
    let mut found = Vec::new();
    let fields = |value: &Value| value.as_object().cloned().unwrap_or_default();
    differences(
        "machine",
        &fields(&machines.0),
        &fields(&machines.1),
        &mut found,
    );
    differences("run", &run(before), &run(after), &mut found);
    let sections = |report: &Report| -> Vec<(String, Map<String, Value>)> {
        let section = report.sections.iter();
        section
            .map(|s| (s.title.clone(), s.protocol.clone()))
            .collect()
    };
    let (then, now) = (sections(before), sections(after));
    for (title, protocol) in &then {
        let other = now.iter().find(|(other, _)| other == title);
        // A section that only one report has shows in its rows.
        if let Some((_, other)) = other {
            differences(title, protocol, other, &mut found);
        }
    }
    Ok(found)
}

fn differences(
    of: &str,
    before: &Map<String, Value>,
    after: &Map<String, Value>,
    found: &mut Vec<Circumstance>,
) {
    let names: BTreeSet<&String> = before.keys().chain(after.keys()).collect();
    for name in names {
        let (before, after) = (before.get(name), after.get(name));
        if before != after {
            found.push(Circumstance {
                of: of.into(),
                name: name.clone(),
                before: before.cloned(),
                after: after.cloned(),
            });
        }
    }
}
