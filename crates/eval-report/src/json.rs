//! A report as `report.json`.
//!
//! All rows are in one flat list, which is what scripts read. The file holds everything, so a report that is read back
//! renders to the same pages.

use std::fs;
use std::ops::Range;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::{Error, Result};
use crate::machine::Machine;
use crate::part_file::PART;
use crate::report::{Report, Section};
use crate::row::Row;
use crate::schema::SCHEMA;

/// `report.json` as it is on disk.
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
        Ok(serde_json::to_string_pretty(&file)? + "\n")
    }

    /// Read what [`Report::to_json`] wrote.
    ///
    /// # Errors
    /// [`Error::Json`] for text that is not a report, [`Error::Schema`] for another schema than [`SCHEMA`],
    /// [`Error::SectionRows`] for a section whose rows are not in the report, and [`Error::Part`] for the report of a part,
    /// which has no rows.
    pub fn from_json(json: &str) -> Result<Self> {
        let value: Value = serde_json::from_str(json)?;
        if value.get(PART).is_some() {
            return Err(Error::Part(
                "the report of one part; `report --merge` with the files of all parts makes the whole".into(),
            ));
        }
        Self::from_value(value)
    }

    /// The same of the head of a part.
    pub(crate) fn from_value(value: Value) -> Result<Self> {
        let schema = value.get("schema").and_then(Value::as_u64);
        if schema != Some(SCHEMA.into()) {
            return Err(Error::Schema { found: schema });
        }
        let file: File = serde_json::from_value(value)?;
        let mut sections = Vec::new();
        for FileSection { mut section, rows } in file.sections {
            let Some(found) = file.rows.get(rows.clone()) else {
                return Err(Error::SectionRows {
                    title: section.title,
                    rows,
                    count: file.rows.len(),
                });
            };
            section.rows = found.to_vec();
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
    /// As [`Report::from_json`], naming the file, and [`Error::Read`].
    pub fn read(path: &Path) -> Result<Self> {
        let json = fs::read_to_string(path).map_err(|source| Error::Read {
            path: path.into(),
            source,
        })?;
        Self::from_json(&json).map_err(|error| Error::NotAReport {
            path: path.into(),
            source: Box::new(error),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::column::Column;
    use crate::row::Spread;

    fn report(rows: Vec<Row>) -> Report {
        let mut report = Report {
            seed: 7,
            ..Report::default()
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
        let spread = Spread::of(&[9.0, f64::INFINITY], Default::default()).unwrap();
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
