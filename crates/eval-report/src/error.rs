//! What can go wrong with a report.

use std::io;
use std::ops::Range;
use std::path::PathBuf;

use crate::schema::SCHEMA;

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a report could not be made, written or read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file that cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// A file that cannot be written.
    #[error(transparent)]
    Write(#[from] tensor_io::Error),
    /// A report folder that cannot be made.
    #[error("cannot create report folder {}: {source}", path.display())]
    Folder {
        /// The folder.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// A file that is not a report.
    #[error("{}: {source}", path.display())]
    NotAReport {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: Box<Error>,
    },
    /// JSON that does not have the fields of a report.
    #[error("not a report: {0}")]
    Json(#[from] serde_json::Error),
    /// JSON of another schema, or of none.
    #[error("expected a report with schema {SCHEMA}, found {}", found.map_or("none".into(), |s| s.to_string()))]
    Schema {
        /// Its schema.
        found: Option<u64>,
    },
    /// A section that names rows which the report does not have.
    #[error("section {title:?} has rows {rows:?} of {count}")]
    SectionRows {
        /// Title of the section.
        title: String,
        /// The rows it names.
        rows: Range<usize>,
        /// Rows in the report.
        count: usize,
    },
    /// A folder that has the cells of another run.
    #[error("{}: {difference}", dir.display())]
    OtherRun {
        /// The folder.
        dir: PathBuf,
        /// What the runs differ in.
        difference: String,
    },
    /// Files of parts that do not fit together.
    #[error("{} and {}: {difference}", first.display(), second.display())]
    Parts {
        /// A part.
        first: PathBuf,
        /// Another.
        second: PathBuf,
        /// Why not.
        difference: String,
    },
    /// Parts of a run whose files were not given.
    #[error("the reports of these parts are missing: {0}")]
    PartsMissing(String),
    /// A file that is not the report of a part.
    #[error("{0}")]
    Part(String),
    /// Two cells of one name.
    #[error("cell {name:?} is measured twice in one run")]
    CellTwice {
        /// The name.
        name: String,
    },
    /// A mean over no rows.
    #[error("no runs to average")]
    NoRuns,
    /// A plot without points.
    #[error("plot {title:?} has no points")]
    EmptyPlot {
        /// Title of the plot.
        title: String,
    },
    /// A value that a logarithmic axis cannot show.
    #[error("plot {title:?}: axis {axis:?} is logarithmic and cannot show {value}")]
    NotPositive {
        /// Title of the plot.
        title: String,
        /// Title of the axis.
        axis: String,
        /// The value.
        value: f64,
    },
    /// A plot that the plotting library refused.
    #[error("plot {title:?}: {reason}")]
    Draw {
        /// Title of the plot.
        title: String,
        /// The library's reason.
        reason: String,
    },
}
