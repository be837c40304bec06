//! The rows of a section as a grid of text, and that grid as a table on a terminal.

use comfy_table::{
    CellAlignment, ColumnConstraint, ContentArrangement, LineStyle, Table, TableStyle, Width,
};

use serde_json::{Map, Value};

use crate::column::{Column, json};
use crate::format::ABSENT;
use crate::report::Section;
use crate::row::{Role, Row};

/// Columns of the terminal that a table keeps within.
pub const WIDTH: u16 = 100;

/// Columns kept apart by space alone, and a rule below the heading.
const STYLE: TableStyle = TableStyle::new().header_separator(LineStyle::none().fill(RULE));
const RULE: char = '─';

/// The top of a column.
pub(crate) struct Head {
    pub(crate) title: String,
    /// Whether the column holds numbers, aligned to the right.
    pub(crate) numeric: bool,
    /// Whether the column says which row this is.
    pub(crate) key: bool,
}

/// The cells of a section's table, ready to be shown in any medium.
pub(crate) struct Grid {
    pub(crate) heads: Vec<Head>,
    pub(crate) rows: Vec<(Role, Vec<String>)>,
    /// Remarks on rows and on notation, to stand below the table.
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
        let mut notes: Vec<String> = section.remarks.iter().cloned().chain(of_rows).collect();
        if let Some(runs) = rows
            .iter()
            .flat_map(|row| row.spread.values().map(|s| s.runs))
            .max()
        {
            notes.push(format!(
                "Brackets hold the smallest and the largest of {runs} runs with different seeds."
            ));
        }
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

    /// Whether a rule belongs between row `i` and the one before it: the dense model stands apart.
    pub(crate) fn is_apart(&self, i: usize) -> bool {
        i > 0 && (self.rows[i - 1].0 == Role::Reference) != (self.rows[i].0 == Role::Reference)
    }
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
pub(crate) fn command_line(words: &[String]) -> String {
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

/// Sections of a report for the terminal.
pub(crate) fn text(sections: &[Section]) -> String {
    sections
        .iter()
        .map(section_text)
        .collect::<Vec<_>>()
        .join("\n")
}

fn section_text(section: &Section) -> String {
    let mut out = format!("{}\n", section.title);
    let facts: Vec<String> = facts(section)
        .map(|(name, value)| format!("{name}: {value}"))
        .collect();
    for paragraph in [section.prose.as_str(), &facts.join(" · ")] {
        out += &wrap(paragraph, usize::from(WIDTH), "");
    }
    let grid = Grid::new(section);
    out += &grid_text(&grid);
    for note in &grid.notes {
        out += &wrap(note, usize::from(WIDTH), "  ");
    }
    for row in section.rows.iter().filter(|_| section.print_layers) {
        if let Some(layers) = Grid::of_layers(row) {
            out += &format!("\nLayers of {}\n{}", row_name(row), grid_text(&layers));
        }
    }
    out
}

/// A grid as one table, or several below one another.
pub(crate) fn grid_text(grid: &Grid) -> String {
    if grid.rows.is_empty() {
        return String::new();
    }
    blocks(grid)
        .iter()
        .map(|columns| block_text(grid, columns))
        .collect::<Vec<_>>()
        .join("\n")
}

/// Characters that column `i` asks for, padding included: cells stay whole up to a third of the table, headings may
/// break between words.
fn width(grid: &Grid, i: usize) -> usize {
    let words = grid.heads[i]
        .title
        .split_whitespace()
        .map(|word| word.chars().count());
    let cells = grid.rows.iter().map(|(_, cells)| cells[i].chars().count());
    2 + words
        .chain(cells)
        .max()
        .unwrap_or(0)
        .min(usize::from(WIDTH) / 3)
}

fn fits(grid: &Grid, columns: &[usize]) -> bool {
    columns.iter().map(|i| width(grid, *i)).sum::<usize>() <= usize::from(WIDTH)
}

/// The columns of `grid` in as many tables below one another as the width calls for, each with the columns that say
/// which row it is.
fn blocks(grid: &Grid) -> Vec<Vec<usize>> {
    let (keys, measured): (Vec<usize>, Vec<usize>) =
        (0..grid.heads.len()).partition(|i| grid.heads[*i].key);
    let mut blocks = vec![keys.clone()];
    for i in measured {
        let is_full = |block: &Vec<usize>| {
            block.len() > keys.len() && !fits(grid, &[&block[..], &[i]].concat())
        };
        if blocks.last().is_some_and(is_full) {
            blocks.push(keys.clone());
        }
        if let Some(block) = blocks.last_mut() {
            block.push(i);
        }
    }
    blocks
}

fn block_text(grid: &Grid, columns: &[usize]) -> String {
    let mut table = Table::new();
    table
        .load_style(STYLE)
        .set_content_arrangement(ContentArrangement::Dynamic)
        .set_width(WIDTH);
    table.set_header(columns.iter().map(|i| &grid.heads[*i].title));
    for (row, (_, cells)) in grid.rows.iter().enumerate() {
        if grid.is_apart(row) {
            table.add_row(vec![""; columns.len()]);
        }
        table.add_row(columns.iter().map(|i| &cells[*i]));
    }
    for (column, i) in table.column_iter_mut().zip(columns) {
        if grid.heads[*i].numeric {
            column.set_cell_alignment(CellAlignment::Right);
        }
        if fits(grid, columns) {
            let width = Width::Fixed(width(grid, *i) as u16);
            column.set_constraint(ColumnConstraint::LowerBoundary(width));
        }
    }
    let lines: Vec<String> = table
        .lines()
        .map(|line| line.trim_end().to_owned())
        .collect();
    let width = lines
        .iter()
        .map(|line| line.chars().count())
        .max()
        .unwrap_or(0);
    let rule = RULE.to_string().repeat(width);
    // The only blank lines are the rows put in above, where the library offers no rule for single rows.
    let ruled = lines
        .iter()
        .map(|line| if line.is_empty() { &rule } else { line });
    [&rule]
        .into_iter()
        .chain(ruled)
        .chain([&rule])
        .map(|line| format!("{line}\n"))
        .collect()
}

/// Greedy line breaking at spaces; later lines are indented by `indent`.
pub(crate) fn wrap(text: &str, width: usize, indent: &str) -> String {
    let mut out = String::new();
    let mut line = String::new();
    for word in text.split_whitespace() {
        if !line.trim().is_empty() && line.chars().count() + 1 + word.chars().count() > width {
            out += &format!("{line}\n");
            line = indent.to_owned();
        } else if !line.is_empty() {
            line.push(' ');
        }
        line += word;
    }
    if line.is_empty() {
        out
    } else {
        format!("{out}{line}\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_line_can_be_pasted() {
        let words = ["cargo", "xtask", "--text", "a b.txt", "it's", ""].map(String::from);
        assert_eq!(
            command_line(&words),
            r"cargo xtask --text 'a b.txt' 'it'\''s' ''"
        );
    }

    #[test]
    fn wrapping_keeps_words_and_width() {
        assert_eq!(wrap("aa bb cc dd", 5, ""), "aa bb\ncc dd\n");
        assert_eq!(wrap("", 5, ""), "");
        assert_eq!(wrap("aaaaaaaa b", 5, "  "), "aaaaaaaa\n  b\n");
    }
}
