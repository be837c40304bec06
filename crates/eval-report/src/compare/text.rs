//! A comparison on the terminal.

use std::path::Path;

use serde_json::{Map, Value};

use super::{Change, Circumstance, Comparison, Kind};
use crate::column::json;
use crate::format;
use crate::grid::{Grid, Head, command_line};
use crate::row::Role;
use crate::text::{WIDTH, grid_text, wrap};

impl Comparison {
    /// The comparison for a terminal of [`WIDTH`] columns.
    pub fn to_text(&self, before: &Path, after: &Path) -> String {
        let lines = |text: &str| wrap(text, usize::from(WIDTH), "  ");
        let run = |name: &str, path: &Path, command: &[String]| {
            lines(&format!(
                "{name}: {} ({})",
                path.display(),
                command_line(command)
            ))
        };
        let mut out = run("Before", before, &self.command_before);
        out += &run("After", after, &self.command_after);
        if !self.circumstances.is_empty() {
            out += "\nDifferent in the two runs\n";
            let fact = |c: &Circumstance| {
                let side =
                    |value: &Option<Value>| value.as_ref().map_or(format::ABSENT.into(), json);
                let (before, after) = (side(&c.before), side(&c.after));
                lines(&format!("{}, {}: {before} → {after}", c.of, c.name))
            };
            out += &self.circumstances.iter().map(fact).collect::<String>();
            if self.circumstances.iter().any(Circumstance::is_protocol) {
                out += &lines("Results of different protocols cannot be compared.");
            }
        }
        for (kind, title) in [
            (Kind::Quality, "Quality and size"),
            (Kind::Cost, "Time and memory of the run"),
        ] {
            let grid = self.grid(kind);
            if !grid.rows.is_empty() {
                out += &format!("\n{title}\n{}", grid_text(&grid));
            }
        }
        for (title, rows) in [
            ("Rows only before", &self.only_before),
            ("Rows only after", &self.only_after),
        ] {
            if !rows.is_empty() {
                out += &format!("\n{title}\n");
                out += &rows.iter().map(|row| lines(&name(row))).collect::<String>();
            }
        }
        let changed: usize = self.rows.iter().map(|row| row.changes.len()).sum();
        out + &format!(
            "\n{} rows in both: {changed} numbers changed, {} are equal.\n",
            self.matched, self.equal
        )
    }

    fn grid(&self, kind: Kind) -> Grid {
        let titles = ["row", "", "before", "after", "change", "noise"];
        let head = |(i, title): (usize, &str)| Head {
            title: title.into(),
            numeric: (2..5).contains(&i),
            key: i == 0,
        };
        let mut rows = Vec::new();
        for of_row in &self.rows {
            let mut name = name(&of_row.row);
            for change in of_row.changes.iter().filter(|change| change.kind == kind) {
                rows.push((Role::Method, cells(std::mem::take(&mut name), change)));
            }
        }
        Grid {
            heads: titles.into_iter().enumerate().map(head).collect(),
            rows,
            notes: Vec::new(),
        }
    }
}

impl Circumstance {
    fn is_protocol(&self) -> bool {
        !["machine", "run"].contains(&&*self.of)
    }
}

fn cells(row: String, change: &Change) -> Vec<String> {
    let side = |value: Option<f64>| value.map_or(format::ABSENT.into(), |v| show(&change.field, v));
    let relative = change.relative.map(|share| {
        let sign = if share > 0.0 { "+" } else { "" };
        format!("{sign}{}", small_percent(share))
    });
    vec![
        row,
        change.field.replace('_', " "),
        side(change.before),
        side(change.after),
        relative.unwrap_or_else(|| format::ABSENT.into()),
        change.noise.clone().unwrap_or_default(),
    ]
}

/// A share that does not become 0 when it is small.
fn small_percent(share: f64) -> String {
    if share.abs() < 0.0005 {
        return format!("{} %", format::real(100.0 * share, 4));
    }
    format::percent(share)
}

fn show(field: &str, value: f64) -> String {
    match field {
        "seconds" => format::seconds(value),
        _ if field.contains("bytes") => format::bytes(value as u64),
        _ if value.fract() == 0.0 && value.abs() < 1e15 => format::real(value, 0),
        _ => format::real(value, 4),
    }
}

/// The key of a row in one line.
fn name(row: &Map<String, Value>) -> String {
    let part = |(name, value): (&String, &Value)| match (&**name, value) {
        ("suite" | "method" | "model" | "compress" | "task", value) => json(value),
        (_, Value::String(text)) => text.clone(),
        (name, value) => format!("{name} {value}"),
    };
    row.iter().map(part).collect::<Vec<_>>().join(" · ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_row_is_named_by_what_it_is_of() {
        let row = json!({"suite": "kv", "method": "lazy", "budget": 0.25, "task": "recall"});
        let row = row.as_object().unwrap();
        assert_eq!(name(row), "kv · lazy · budget 0.25 · recall");
    }

    #[test]
    fn numbers_are_shown_in_their_units() {
        assert_eq!(show("kv_bytes", 2048.0), "2.00 KiB");
        assert_eq!(show("perplexity", 6.316_47), "6.3165");
        assert_eq!(show("params", 1e6), "1,000,000");
        assert_eq!(small_percent(0.000012), "0.0012 %");
    }
}
