//! A report: what was run, on which machine, and the measured rows, grouped into sections.
//!
//! A suite hands over [`Section`]s; the report keeps their rows in one flat list, which is what scripts read from
//! `report.json`, and renders the same sections as terminal tables, Markdown and HTML. The JSON holds everything, so
//! a report that is read back renders to the same pages.

use std::fs;
use std::io::Write;
use std::ops::Range;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use tempfile::NamedTempFile;

use crate::column::Column;
use crate::machine::Machine;
use crate::plot::Plot;
use crate::row::{Role, Row};
use crate::{html, markdown, table};

/// Version of the layout of `report.json`.
pub const SCHEMA: u32 = 1;

/// What a suite contributes: one table with its explanation and plots.
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
    /// Measured rows. In JSON they stand in the report's own list and the section names their range.
    #[serde(skip)]
    pub rows: Vec<Row>,
    /// Whether the terminal shows the per-layer detail of rows; files always hold it.
    #[serde(skip)]
    pub print_layers: bool,
    /// What the rows show, in words.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub remarks: Vec<String>,
    /// Pictures that are no plots of rows.
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
    /// The picture, on a light ground.
    pub svg: String,
}

impl Section {
    /// The section with one more protocol fact.
    pub fn fact(mut self, name: impl Into<String>, value: impl Into<Value>) -> Self {
        self.protocol.insert(name.into(), value.into());
        self
    }
}

/// The result of one run of `cargo xtask eval`.
#[derive(Debug, Clone, PartialEq)]
pub struct Report {
    /// Command line, one argument each.
    pub command: Vec<String>,
    /// Version of the program, with the commit it was built from where that is known.
    pub version: String,
    /// Machine that ran it.
    pub machine: Machine,
    /// Device that computed: `cpu`, `cuda` or `metal`.
    pub device: String,
    /// Threads of the pool.
    pub threads: usize,
    /// Seed of everything random.
    pub seed: u64,
    /// Sections in the order they were run.
    pub sections: Vec<Section>,
}

/// `report.json` as it lies on disk.
#[derive(Serialize, Deserialize)]
struct File {
    schema: u32,
    command: Vec<String>,
    version: String,
    machine: Machine,
    device: String,
    threads: usize,
    seed: u64,
    rows: Vec<Row>,
    sections: Vec<FileSection>,
}

#[derive(Serialize, Deserialize)]
struct FileSection {
    #[serde(flatten)]
    section: Section,
    rows: Range<usize>,
}

impl Report {
    /// Add a section. Numbers that are not finite become absent and are named in the row's notes, points that are not
    /// finite are left out of the plots, and the dense rows go first.
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
        section.plots.retain_mut(Plot::settle);
        self.sections.push(section);
        Ok(())
    }

    /// All rows of all sections.
    pub fn rows(&self) -> impl Iterator<Item = &Row> {
        self.sections.iter().flat_map(|section| &section.rows)
    }

    /// The report as `report.json`.
    ///
    /// # Errors
    /// None for a report built with [`Report::push`].
    pub fn to_json(&self) -> Result<String> {
        let mut rows = Vec::new();
        let mut sections = Vec::new();
        for section in &self.sections {
            let start = rows.len();
            rows.extend(section.rows.iter().cloned());
            sections.push(FileSection {
                section: section.clone(),
                rows: start..rows.len(),
            });
        }
        let file = File {
            schema: SCHEMA,
            command: self.command.clone(),
            version: self.version.clone(),
            machine: self.machine.clone(),
            device: self.device.clone(),
            threads: self.threads,
            seed: self.seed,
            rows,
            sections,
        };
        Ok(serde_json::to_string_pretty(&file).context("report to JSON")? + "\n")
    }

    /// Read what [`Report::to_json`] wrote.
    ///
    /// # Errors
    /// JSON that is not a report, a schema other than [`SCHEMA`], or a section whose rows are not in the report.
    pub fn from_json(json: &str) -> Result<Self> {
        let value: Value = serde_json::from_str(json).context("not JSON")?;
        let schema = value.get("schema").and_then(Value::as_u64);
        ensure!(
            schema == Some(SCHEMA.into()),
            "expected a report with schema {SCHEMA}, found {}",
            schema.map_or("none".into(), |s| s.to_string())
        );
        let file: File = serde_json::from_value(value).context("not a report")?;
        let mut sections = Vec::new();
        for FileSection { mut section, rows } in file.sections {
            let found = file.rows.get(rows.clone());
            section.rows = found
                .with_context(|| {
                    format!(
                        "section {:?} has rows {rows:?} of {}",
                        section.title,
                        file.rows.len()
                    )
                })?
                .to_vec();
            sections.push(section);
        }
        let File {
            command,
            version,
            machine,
            device,
            threads,
            seed,
            ..
        } = file;
        Ok(Report {
            command,
            version,
            machine,
            device,
            threads,
            seed,
            sections,
        })
    }

    /// Read a `report.json`.
    ///
    /// # Errors
    /// As [`Report::from_json`], naming the file.
    pub fn read(path: &Path) -> Result<Self> {
        let named = || path.display().to_string();
        Self::from_json(&fs::read_to_string(path).with_context(named)?).with_context(named)
    }

    /// The report as tables for a terminal of [`table::WIDTH`] columns.
    pub fn to_text(&self) -> String {
        table::text(&self.sections)
    }

    /// The first section alone, as [`Report::to_text`] shows it.
    pub fn summary_text(&self) -> String {
        table::text(&self.sections[..self.sections.len().min(1)])
    }

    /// Write `report.json`, `report.md` and `report.html` into `dir`, which is made if need be. Each file is complete
    /// or untouched: all are rendered first, written beside and renamed.
    ///
    /// # Errors
    /// A folder or file that cannot be written, named.
    pub fn write(&self, dir: &Path) -> Result<()> {
        let files = [
            ("report.json", self.to_json()?),
            ("report.md", markdown::render(self)),
            ("report.html", html::render(self)?),
        ];
        prepare(dir)?;
        let mut written = Vec::new();
        for (name, content) in &files {
            written.push(Beside::write(dir.join(name), content)?);
        }
        written.into_iter().try_for_each(Beside::rename)
    }
}

/// A file that is complete under a passing name, and removed unless it is renamed.
pub(crate) struct Beside {
    file: NamedTempFile,
    path: PathBuf,
}

impl Beside {
    /// Write `content` beside `path`.
    pub(crate) fn write(path: PathBuf, content: &str) -> Result<Self> {
        let cannot = || format!("cannot write {}", path.display());
        let mut file = beside(path.parent().unwrap_or(Path::new(""))).with_context(cannot)?;
        file.write_all(content.as_bytes()).with_context(cannot)?;
        Ok(Self { file, path })
    }

    /// Put it where it belongs.
    pub(crate) fn rename(self) -> Result<()> {
        let Self { file, path } = self;
        file.persist(&path)
            .map_err(|e| e.error)
            .with_context(|| format!("cannot write {}", path.display()))?;
        Ok(())
    }
}

/// Make the report folder and see that files can be made in it: a run of hours should fail before it starts, not after.
///
/// # Errors
/// A folder that cannot be made or written, named.
pub fn prepare(dir: &Path) -> Result<()> {
    fs::create_dir_all(dir)
        .and_then(|()| beside(dir).map(drop))
        .with_context(|| format!("cannot write into report folder {}", dir.display()))
}

/// A file under a passing name in `dir`, removed unless it is renamed.
fn beside(dir: &Path) -> std::io::Result<NamedTempFile> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(".report-");
    // A report is for everybody whom the umask lets read, not private like other temporary files.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    builder.tempfile_in(dir)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::row::Spread;

    fn report(rows: Vec<Row>) -> Report {
        let mut report = Report {
            command: vec!["cargo".into(), "xtask".into(), "eval".into()],
            version: "0.1.0".into(),
            machine: Machine {
                cpu: "test".into(),
                cores: 2,
                memory_bytes: 1 << 30,
            },
            device: "cpu".into(),
            threads: 2,
            seed: 7,
            sections: Vec::new(),
        };
        let section = Section {
            title: "A".into(),
            columns: vec![Column::Method, Column::Perplexity],
            rows,
            ..Section::default()
        };
        report.push(section.fact("window", 256)).unwrap();
        report
    }

    #[test]
    fn what_was_not_measured_is_absent_and_not_zero() {
        let json = report(vec![Row {
            nll: Some(0.0),
            ..Row::new("structured", "flap")
        }])
        .to_json()
        .unwrap();
        let value: Value = serde_json::from_str(&json).unwrap();
        let row = value["rows"][0].as_object().unwrap();
        let names: Vec<&str> = row.keys().map(String::as_str).collect();
        assert_eq!(names, ["suite", "method", "nll", "seconds"]);
        assert_eq!(value["schema"], 1);
        assert_eq!(
            value["machine"]
                .as_object()
                .unwrap()
                .keys()
                .collect::<Vec<_>>(),
            ["cpu", "cores", "memory_bytes"]
        );
    }

    #[test]
    fn a_number_that_is_not_finite_becomes_absent_with_a_note() {
        let mut row = Row {
            perplexity: Some(f64::INFINITY),
            nll: Some(900.0),
            ..Row::new("structured", "random")
        };
        let spread = Spread {
            runs: 3,
            min: 9.0,
            max: f64::INFINITY,
        };
        row.spread.insert("perplexity".into(), spread);
        let report = report(vec![row]);
        let row = report.rows().next().unwrap();
        assert_eq!((row.perplexity, row.nll), (None, Some(900.0)));
        assert_eq!(row.notes, ["not a finite number: perplexity"]);
        let json = report.to_json().unwrap();
        assert!(!json.contains("null"));
        assert_eq!(Report::from_json(&json).unwrap(), report);
    }

    #[test]
    fn the_dense_row_comes_first_and_the_others_keep_their_order() {
        let report = report(["b", "a", "dense"].map(|m| Row::new("s", m)).to_vec());
        assert_eq!(
            report.rows().map(|r| r.method.as_str()).collect::<Vec<_>>(),
            ["dense", "b", "a"]
        );
    }

    #[test]
    fn another_schema_is_refused_by_number() {
        let json = report(vec![])
            .to_json()
            .unwrap()
            .replace("\"schema\": 1", "\"schema\": 2");
        assert_eq!(
            Report::from_json(&json).unwrap_err().to_string(),
            "expected a report with schema 1, found 2"
        );
    }

    #[test]
    fn a_section_must_name_rows_that_exist() {
        let json = report(vec![])
            .to_json()
            .unwrap()
            .replace("\"end\": 0", "\"end\": 3");
        assert!(
            Report::from_json(&json)
                .unwrap_err()
                .to_string()
                .contains("rows 0..3 of 0")
        );
    }
}
