//! The files of a report.

use std::fs;
use std::io::Write;
use std::path::Path;

use tensor_io::PendingFile;

use crate::error::{Error, Result};
use crate::report::Report;

/// Name of the file that scripts read.
const JSON: &str = "report.json";

impl Report {
    /// Write `report.json`, `report.md` and `report.html` into `dir`, which is created if necessary. Each file is
    /// complete or untouched: all are rendered first, written under temporary names and renamed.
    ///
    /// # Errors
    /// A folder or file that cannot be written, named, and what the renderers refuse.
    pub fn write(&self, dir: &Path) -> Result<()> {
        let files = [
            (JSON, self.to_json()?),
            ("report.md", self.to_markdown()),
            ("report.html", self.to_html()?),
        ];
        prepare(dir)?;
        let mut written = Vec::new();
        for (name, content) in &files {
            let path = dir.join(name);
            let mut file = PendingFile::create(&path)?;
            file.write_all(content.as_bytes())
                .map_err(|source| tensor_io::Error::Io {
                    action: "write",
                    path,
                    source,
                })?;
            written.push(file);
        }
        for file in written {
            file.persist()?;
        }
        Ok(())
    }
}

/// Create the report folder and check that files can be written there: a run of hours should fail before it starts, not
/// after.
///
/// # Errors
/// A folder that cannot be created or written, named.
pub fn prepare(dir: &Path) -> Result<()> {
    fs::create_dir_all(dir).map_err(|source| Error::Folder {
        path: dir.into(),
        source,
    })?;
    PendingFile::create(dir.join(JSON))?;
    Ok(())
}
