//! A report: what was run, on which machine, and the measured rows, grouped into sections.
//!
//! This is data alone. [`crate::json`], [`crate::text`], [`crate::markdown`] and [`crate::html`] show it, and
//! [`crate::files`] writes it; they know this module, and it knows none of them.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::column::Column;
use crate::error::Result;
use crate::machine::Machine;
use crate::plot::Plot;
use crate::row::{Role, Row};

/// One table with its explanation and plots.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Section {
    /// Heading.
    pub title: String,
    /// A few sentences: what was run and how to read it.
    pub prose: String,
    /// Facts of the protocol by name, such as window, BOS, windows, targets, and the names of the texts.
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    pub protocol: Map<String, Value>,
    /// Columns of the table, left to right.
    pub columns: Vec<Column>,
    /// Measured rows. In JSON they are in the report's own list and the section has their range.
    #[serde(skip)]
    pub rows: Vec<Row>,
    /// Whether the terminal shows the per-layer detail of rows; files always hold it.
    #[serde(skip)]
    pub print_layers: bool,
    /// What the rows show, in words.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub remarks: Vec<String>,
    /// What could not be measured, with the reason: the rows are those of the rest.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub failures: Vec<String>,
    /// Pictures other than plots of rows.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub figures: Vec<Figure>,
    /// Plots of the rows.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub plots: Vec<Plot>,
}

/// A picture.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Figure {
    /// What it shows and how to read it.
    pub caption: String,
    /// The picture as an `<svg>` element, made for a white background. It is inserted into the page as it is.
    pub svg: String,
}

impl Section {
    /// The section with one more protocol fact.
    pub fn fact(mut self, name: impl Into<String>, value: impl Into<Value>) -> Self {
        self.protocol.insert(name.into(), value.into());
        self
    }
}

/// The result of one run.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Report {
    /// Command line, one argument each.
    pub command: Vec<String>,
    /// Version of the program, with the commit it was built from where that is known.
    pub version: String,
    /// Machine that ran it.
    pub machine: Machine,
    /// Device that computed, such as `cpu` or `cuda`.
    pub device: String,
    /// Threads of the pool.
    pub threads: usize,
    /// Seed of everything random.
    pub seed: u64,
    /// Sections in the order they were run.
    pub sections: Vec<Section>,
}

impl Report {
    /// Add a section. Numbers that are not finite become absent and are named in the row's notes, points that are not
    /// finite are left out of the plots, and reference rows go first.
    ///
    /// # Errors
    /// None in practice: rows are converted to JSON and back.
    pub fn push(&mut self, mut section: Section) -> Result<()> {
        section.rows = section
            .rows
            .into_iter()
            .map(Row::without_non_finite)
            .collect::<Result<_>>()?;
        section.rows.sort_by_key(|row| row.role != Role::Reference);
        section.plots.retain_mut(Plot::make_drawable);
        self.sections.push(section);
        Ok(())
    }

    /// All rows of all sections.
    pub fn rows(&self) -> impl Iterator<Item = &Row> {
        self.sections.iter().flat_map(|section| &section.rows)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_dense_row_comes_first_and_the_others_keep_their_order() {
        let mut report = Report::default();
        let section = Section {
            rows: ["b", "a", "dense"].map(|m| Row::new("s", m)).to_vec(),
            ..Section::default()
        };
        report.push(section).unwrap();
        assert_eq!(
            report.rows().map(|r| r.method.as_str()).collect::<Vec<_>>(),
            ["dense", "b", "a"]
        );
    }
}
