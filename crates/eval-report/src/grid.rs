//! The rows of a section as a grid of text, which every renderer shows in its own way.

use serde_json::{Map, Value};

use crate::column::{Column, json};
use crate::format::ABSENT;
use crate::report::Section;
use crate::row::{Role, Row, Spread, SpreadOver};

/// The heading of a column.
pub(crate) struct Head {
    pub(crate) title: String,
    /// Whether the column holds numbers, aligned to the right.
    pub(crate) numeric: bool,
    /// Whether the column identifies the row.
    pub(crate) key: bool,
}

/// The cells of a table as text.
pub(crate) struct Grid {
    pub(crate) heads: Vec<Head>,
    pub(crate) rows: Vec<(Role, Vec<String>)>,
    /// Remarks on rows and on notation, shown below the table.
    pub(crate) notes: Vec<String>,
}

impl Grid {
    /// Lay out the measured columns of `section`.
    pub(crate) fn new(section: &Section) -> Self {
        let rows = &section.rows;
        let columns: Vec<&Column> = section
            .columns
            .iter()
            .filter(|c| rows.iter().any(|r| c.cell(r).is_some()))
            .collect();
        let of_rows = rows.iter().flat_map(|row| {
            row.notes
                .iter()
                .map(move |note| format!("{}: {note}", row_name(row)))
        });
        let failures = section.failures.iter();
        let mut notes: Vec<String> = failures
            .map(|failure| format!("Failed: {failure}"))
            .collect();
        notes.extend(section.remarks.iter().cloned().chain(of_rows));
        notes.extend(notation(&columns, rows));
        Grid {
            heads: columns
                .iter()
                .map(|c| Head {
                    title: c.title(),
                    numeric: c.is_numeric(rows),
                    key: c.is_key(),
                })
                .collect(),
            rows: rows
                .iter()
                .map(|row| {
                    (
                        row.role,
                        columns
                            .iter()
                            .map(|c| c.cell(row).unwrap_or_else(|| ABSENT.into()))
                            .collect(),
                    )
                })
                .collect(),
            notes,
        }
    }

    /// The per-layer detail of a row, with a column for every name that occurs; `None` where there is none.
    pub(crate) fn of_layers(row: &Row) -> Option<Self> {
        let layers: Vec<&Map<String, Value>> =
            row.layers.iter().filter_map(Value::as_object).collect();
        let mut names: Vec<&String> = Vec::new();
        for name in layers.iter().flat_map(|layer| layer.keys()) {
            if !names.contains(&name) {
                names.push(name);
            }
        }
        let numeric = |name: &String| {
            let is_number =
                |layer: &&Map<String, Value>| layer.get(name).is_none_or(Value::is_number);
            layers.iter().all(is_number)
        };
        let heads = names.iter().enumerate().map(|(i, name)| Head {
            title: name.replace('_', " "),
            numeric: numeric(name),
            key: i == 0,
        });
        let cell = |value: Option<&Value>| value.map_or_else(|| ABSENT.to_owned(), json);
        let cells = |layer: &&Map<String, Value>| {
            let cells = names.iter().map(|name| cell(layer.get(*name))).collect();
            (Role::Method, cells)
        };
        (!layers.is_empty()).then(|| Self {
            heads: heads.collect(),
            rows: layers.iter().map(cells).collect(),
            notes: Vec::new(),
        })
    }

    /// Whether a line separates row `i` from the one before it: reference rows are set off from the others.
    pub(crate) fn is_apart(&self, i: usize) -> bool {
        i > 0 && (self.rows[i - 1].0 == Role::Reference) != (self.rows[i].0 == Role::Reference)
    }
}

/// What the brackets and signs of the cells that are shown mean.
fn notation(columns: &[&Column], rows: &[Row]) -> Vec<String> {
    let spreads = || {
        rows.iter()
            .flat_map(|row| columns.iter().filter_map(|column| column.spread(row)))
    };
    let runs = |over| {
        let of = |spread: &&Spread| spread.over == over;
        spreads().filter(of).map(|spread| spread.runs).max()
    };
    let mut notes = Vec::new();
    if let Some(runs) = runs(SpreadOver::Seeds) {
        notes.push(format!(
            "Brackets: smallest and largest of {runs} runs with different seeds."
        ));
    }
    if let Some(runs) = runs(SpreadOver::Repeats) {
        notes.push(format!(
            "Speeds are medians. Brackets: smallest and largest of {runs} measurements."
        ));
    }
    let is_bound = |row: &Row| columns.iter().any(|column| column.is_bound(row));
    if rows.iter().any(is_bound) {
        notes.push(
            "≤: peak memory of the whole process so far, because this system does not let a process reset it."
                .into(),
        );
    }
    notes
}

/// A row's method and setting, such as `flap at ratio 0.2`.
pub(crate) fn row_name(row: &Row) -> String {
    let settings = [
        Column::Compress,
        Column::Ratio,
        Column::Sparsity,
        Column::Rank,
        Column::Budget,
    ];
    let settings: Vec<String> = settings
        .iter()
        .filter_map(|c| Some(format!("{} {}", c.title(), c.cell(row)?)))
        .collect();
    if settings.is_empty() {
        row.method.clone()
    } else {
        format!("{} at {}", row.method, settings.join(", "))
    }
}

/// A command line that can be pasted into a shell.
pub fn command_line(words: &[String]) -> String {
    let is_plain = |c: char| c.is_alphanumeric() || "-_./:=,+@%".contains(c);
    let quote = |word: &String| {
        if !word.is_empty() && word.chars().all(is_plain) {
            word.clone()
        } else {
            format!("'{}'", word.replace('\'', r"'\''"))
        }
    };
    words.iter().map(quote).collect::<Vec<_>>().join(" ")
}

/// The protocol facts of a section as name and text.
pub(crate) fn facts(section: &Section) -> impl Iterator<Item = (&str, String)> {
    section
        .protocol
        .iter()
        .map(|(name, value)| (name.as_str(), json(value)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::row::MemoryScope;

    #[test]
    fn a_command_line_can_be_pasted() {
        let words = ["cargo", "xtask", "--text", "a b.txt", "it's", ""].map(String::from);
        assert_eq!(
            command_line(&words),
            r"cargo xtask --text 'a b.txt' 'it'\''s' ''"
        );
    }

    #[test]
    fn what_brackets_mean_follows_from_the_cells_that_are_shown() {
        let mut row = Row {
            perplexity: Some(2.0),
            tokens_per_second: Some(5.0),
            peak_rss_bytes: Some(1 << 20),
            peak_rss_scope: MemoryScope::Process,
            ..Row::new("s", "random")
        };
        let seeds = Spread::of(&[1.0, 3.0], SpreadOver::Seeds).unwrap();
        let repeats = Spread::of(&[4.0, 5.0, 6.0], SpreadOver::Repeats).unwrap();
        row.spread.insert("perplexity".into(), seeds);
        row.spread.insert("tokens_per_second".into(), repeats);
        let shown = |columns: Vec<Column>| {
            let section = Section {
                columns,
                rows: vec![row.clone()],
                ..Section::default()
            };
            let grid = Grid::new(&section);
            (grid.rows[0].1.clone(), grid.notes)
        };
        let (cells, notes) = shown(vec![Column::Perplexity]);
        assert_eq!(cells, ["2.000 [1.000, 3.000]"]);
        assert_eq!(notes.len(), 1);
        assert!(
            notes[0].contains("2 runs with different seeds"),
            "{notes:?}"
        );
        let (cells, notes) = shown(vec![Column::TokensPerSecond, Column::PeakRss]);
        assert_eq!(cells, ["5.0 [4.0, 6.0]", "≤ 1.00 MiB"]);
        assert_eq!(notes.len(), 2);
        assert!(notes[0].contains("3 measurements"), "{notes:?}");
        assert!(notes[1].contains("whole process"), "{notes:?}");
    }
}
