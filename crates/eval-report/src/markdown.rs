//! A report as Markdown: the sections' tables without their plots.

use crate::format;
use crate::grid::{Grid, command_line, facts};
use crate::report::{Report, Section};

impl Report {
    /// The text of `report.md`.
    pub fn to_markdown(&self) -> String {
        render(self)
    }
}

fn render(report: &Report) -> String {
    let machine = &report.machine;
    let mut out = format!(
        "# Evaluation report\n\n```\n{}\n```\n\nVersion {}, seed {}, {} with {} on {} ({}, {}).\n",
        command_line(&report.command),
        escape(&report.version),
        report.seed,
        escape(&report.device),
        format::counted(report.threads, "thread"),
        escape(&machine.cpu),
        format::counted(machine.cores, "core"),
        format::bytes(machine.memory_bytes),
    );
    for section in &report.sections {
        out += &section_markdown(section);
    }
    out
}

fn section_markdown(section: &Section) -> String {
    let mut out = format!("\n## {}\n", escape(&section.title));
    if !section.prose.is_empty() {
        out += &format!("\n{}\n", escape(&section.prose));
    }
    if !section.protocol.is_empty() {
        let facts: Vec<String> = facts(section)
            .map(|(name, value)| format!("{}: {}", escape(name), escape(&value)))
            .collect();
        out += &format!("\n{}\n", facts.join(" · "));
    }
    let grid = Grid::new(section);
    if !grid.rows.is_empty() {
        let line = |cells: Vec<String>| format!("| {} |\n", cells.join(" | "));
        out.push('\n');
        out += &line(grid.heads.iter().map(|head| escape(&head.title)).collect());
        out += &line(
            grid.heads
                .iter()
                .map(|head| if head.numeric { "---:" } else { ":---" }.to_owned())
                .collect(),
        );
        for (i, (_, cells)) in grid.rows.iter().enumerate() {
            if grid.is_apart(i) {
                out += &line(vec![String::new(); cells.len()]);
            }
            out += &line(cells.iter().map(|cell| escape(cell)).collect());
        }
    }
    if !grid.notes.is_empty() {
        out.push('\n');
        out.extend(
            grid.notes
                .iter()
                .map(|note| format!("- {}\n", escape(note))),
        );
    }
    out
}

/// Text that Markdown shows as it is, also within a table cell.
fn escape(text: &str) -> String {
    let mut out = String::new();
    for c in text
        .split_whitespace()
        .collect::<Vec<_>>()
        .join(" ")
        .chars()
    {
        if "\\`*_[]<>|#".contains(c) {
            out.push('\\');
        }
        out.push(c);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_cannot_break_out_of_its_cell() {
        assert_eq!(escape("a|b\n<i>_c_"), r"a\|b \<i\>\_c\_");
    }
}
