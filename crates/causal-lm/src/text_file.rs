//! Files of text, whole or in part.

use std::ops::Range;
use std::path::{Path, PathBuf};

use tensor_io::ContentHash;

use crate::{Error, Result};

/// A file of UTF-8 text, or a part of one: `FILE[0..80%]` is its first four fifths.
///
/// Parts are shares of the file's length, moved on to the end of a line, so that parts that follow one another share
/// nothing and leave nothing out.
#[derive(Debug, Clone, PartialEq)]
pub struct TextFile {
    path: PathBuf,
    /// In percent.
    part: Option<Range<f64>>,
}

impl TextFile {
    /// A file by its path, behind which a part may stand in brackets. A file that is called like that is taken whole.
    ///
    /// # Errors
    /// [`Error::Text`] for brackets with anything but two percentages in order, from 0 to 100.
    pub fn new(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let whole = || Self {
            path: path.into(),
            part: None,
        };
        let Some((file, part)) = path
            .to_str()
            .and_then(|text| text.strip_suffix(']')?.rsplit_once('['))
        else {
            return Ok(whole());
        };
        if path.exists() {
            return Ok(whole());
        }
        let percent = |text: &str| text.trim_end_matches('%').parse::<f64>().ok();
        let range = part
            .split_once("..")
            .and_then(|(from, to)| Some(percent(from)?..percent(to)?));
        match range {
            Some(part) if part.start >= 0.0 && part.start < part.end && part.end <= 100.0 => {
                Ok(Self {
                    path: file.into(),
                    part: Some(part),
                })
            }
            _ => Err(error(
                path,
                "expected a part such as [0..80%], from 0 to 100",
            )),
        }
    }

    /// Reads the text. CRLF and CR become one line feed, as in every tool that opens texts in text mode: perplexities
    /// would differ by a tenth otherwise. A byte-order mark is dropped.
    ///
    /// # Errors
    /// [`Error::Text`] when it cannot be read, is not UTF-8 or is empty.
    pub fn read(&self) -> Result<String> {
        let path = &self.path;
        let text = std::fs::read_to_string(path).map_err(|e| error(path, e))?;
        if text.is_empty() {
            return Err(error(path, "the file is empty"));
        }
        // The mark that some editors put before UTF-8 is no text.
        let text = text.strip_prefix('\u{feff}').unwrap_or(&text);
        let text = text.replace("\r\n", "\n").replace('\r', "\n");
        let Some(part) = &self.part else {
            return Ok(text);
        };
        let part = &text[line_end(&text, part.start)..line_end(&text, part.end)];
        match part.is_empty() {
            true => Err(error(
                path,
                "the part is empty: no line of the file ends in it",
            )),
            false => Ok(part.into()),
        }
    }

    /// Whether two files have text in common: parts of one file that overlap, or files with the same bytes. Files that
    /// cannot be read have nothing in common; whoever reads them reports it.
    pub fn overlaps(&self, other: &Self) -> bool {
        let size = |file: &Self| std::fs::metadata(&file.path).map(|data| data.len()).ok();
        if size(self).is_none() || size(self) != size(other) {
            return false;
        }
        let hash = |file: &Self| ContentHash::of_path(&file.path).ok();
        let whole = || 0.0..100.0;
        let (a, b) = (
            self.part.clone().unwrap_or_else(whole),
            other.part.clone().unwrap_or_else(whole),
        );
        hash(self) == hash(other) && a.start < b.end && b.start < a.end
    }
}

/// Reads a file of text, or a part of one: [`TextFile::read`].
///
/// # Errors
/// Those of [`TextFile::new`] and [`TextFile::read`].
pub fn read_text(path: impl AsRef<Path>) -> Result<String> {
    TextFile::new(path)?.read()
}

/// The end of the line that `percent` of a text lies in.
fn line_end(text: &str, percent: f64) -> usize {
    let at = (text.len() as f64 * percent / 100.0) as usize;
    if at == 0 {
        return 0;
    }
    // The byte before decides, so that the end of a line is its own end.
    let from = at.min(text.len()) - 1;
    let rest = &text.as_bytes()[from..];
    let line = rest.iter().position(|&byte| byte == b'\n');
    line.map_or(text.len(), |line| from + line + 1)
}

fn error(path: &Path, reason: impl ToString) -> Error {
    Error::Text {
        path: path.into(),
        reason: reason.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(dir: &tempfile::TempDir, text: &str) -> String {
        let path = dir.path().join("text");
        std::fs::write(&path, text).unwrap();
        path.to_str().unwrap().into()
    }

    #[test]
    fn parts_that_follow_one_another_make_the_whole() {
        let dir = tempfile::tempdir().unwrap();
        let lines: String = (0..37).map(|i| "é".repeat(i % 9) + "\n").collect();
        let path = file(&dir, &lines);
        for cuts in [vec![0.0, 80.0, 100.0], vec![0.0, 12.5, 33.3, 61.0, 100.0]] {
            let parts = cuts.windows(2).map(|cut| {
                let part = format!("{path}[{}..{}%]", cut[0], cut[1]);
                read_text(part).unwrap()
            });
            assert_eq!(parts.collect::<String>(), lines, "{cuts:?}");
        }
        let first = read_text(format!("{path}[0..50%]")).unwrap();
        assert!(first.ends_with('\n'));
        assert!(first.len().abs_diff(lines.len() / 2) < 20);
    }

    #[test]
    fn parts_overlap_where_they_share_text() {
        let dir = tempfile::tempdir().unwrap();
        let path = file(&dir, "a\nb\nc\nd\n");
        let copy = dir.path().join("copy");
        std::fs::copy(&path, &copy).unwrap();
        let copy = copy.to_str().unwrap();
        let overlap = |a: &str, b: &str| {
            let (a, b) = (TextFile::new(a).unwrap(), TextFile::new(b).unwrap());
            assert_eq!(a.overlaps(&b), b.overlaps(&a));
            a.overlaps(&b)
        };
        assert!(overlap(&path, &path));
        assert!(overlap(&path, copy));
        assert!(!overlap(
            &format!("{path}[0..50%]"),
            &format!("{copy}[50..100%]")
        ));
        assert!(overlap(
            &format!("{path}[0..51%]"),
            &format!("{copy}[50..100%]")
        ));
        assert!(!overlap(&path, "absent"));
        let other = dir.path().join("other");
        std::fs::write(&other, "a\nb\nc\ne\n").unwrap();
        assert!(!overlap(&path, other.to_str().unwrap()));
    }

    #[test]
    fn parts_that_mean_nothing_are_errors_and_files_called_like_that_are_files() {
        let dir = tempfile::tempdir().unwrap();
        let path = file(&dir, "a\nb\n");
        for part in [
            "[80..20%]",
            "[0..101%]",
            "[-1..5%]",
            "[a]",
            "[0..]",
            "[5..5%]",
            "[nan..5%]",
        ] {
            let error = read_text(format!("{path}{part}")).unwrap_err();
            assert!(error.to_string().contains("[0..80%]"), "{part}: {error}");
        }
        let error = read_text(format!("{path}[30..40%]")).unwrap_err();
        assert!(error.to_string().contains("the part is empty"), "{error}");
        let odd = format!("{path}[0..50%]");
        std::fs::write(&odd, "whole\n").unwrap();
        assert_eq!(read_text(odd).unwrap(), "whole\n");
    }
}
