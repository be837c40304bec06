//! A report as tables on a terminal.

use comfy_table::{
    CellAlignment, ColumnConstraint, ContentArrangement, LineStyle, Table, TableStyle, Width,
};

use crate::grid::{Grid, facts, row_name};
use crate::report::{Report, Section};

/// Columns of the terminal that a table keeps within.
pub const WIDTH: u16 = 100;

/// Columns separated by spaces alone, and a line below the headings.
const STYLE: TableStyle = TableStyle::new().header_separator(LineStyle::none().fill(RULE));
const RULE: char = '─';

impl Report {
    /// The report as tables for a terminal of [`WIDTH`] columns.
    pub fn to_text(&self) -> String {
        text(&self.sections)
    }

    /// The first section alone, as [`Report::to_text`] shows it.
    pub fn summary_text(&self) -> String {
        text(&self.sections[..self.sections.len().min(1)])
    }
}

fn text(sections: &[Section]) -> String {
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

/// The columns of `grid` in as many tables below one another as the width calls for, each with the columns that
/// identify the row.
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
    fn wrapping_keeps_words_and_width() {
        assert_eq!(wrap("aa bb cc dd", 5, ""), "aa bb\ncc dd\n");
        assert_eq!(wrap("", 5, ""), "");
        assert_eq!(wrap("aaaaaaaa b", 5, "  "), "aaaaaaaa\n  b\n");
    }
}
