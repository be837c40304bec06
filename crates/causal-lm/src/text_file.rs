//! Files of text, whole or in part.

use std::collections::{HashSet, VecDeque};
use std::hash::{BuildHasher, BuildHasherDefault, DefaultHasher};
use std::ops::Range;
use std::path::{Path, PathBuf};

use tensor_io::ContentHash;

use crate::{Error, Result};

/// Words in a row that two texts rarely have in common by chance.
const PASSAGE: usize = 32;
/// The share of the passages of the shorter text from which on two texts overlap. Below it lie quotations and boilerplate.
const OVERLAP: f64 = 0.01;

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
        let text = tensor_io::read_text(path).map_err(|e| error(path, e))?;
        if text.is_empty() {
            return Err(error(path, "the file is empty"));
        }
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

    /// Whether two files have text in common: parts of one file that overlap, files with the same bytes, or texts of which
    /// one has a hundredth or more of the other's passages of 32 words. Files that cannot be read have nothing in common;
    /// whoever reads them reports it.
    pub fn overlaps(&self, other: &Self) -> bool {
        let size = |file: &Self| std::fs::metadata(&file.path).map(|data| data.len()).ok();
        let hash = |file: &Self| ContentHash::of_path(&file.path).ok();
        if size(self).is_some() && size(self) == size(other) && hash(self) == hash(other) {
            let whole = || 0.0..100.0;
            let (a, b) = (
                self.part.clone().unwrap_or_else(whole),
                other.part.clone().unwrap_or_else(whole),
            );
            return a.start < b.end && b.start < a.end;
        }
        match (self.read(), other.read()) {
            (Ok(a), Ok(b)) => share_of_passages(&a, &b) >= OVERLAP,
            _ => false,
        }
    }
}

/// The share of the passages of the shorter of two texts that the other one has, however either is broken into lines.
fn share_of_passages(a: &str, b: &str) -> f64 {
    let (short, long) = if a.len() <= b.len() { (a, b) } else { (b, a) };
    let wanted: HashSet<u64> = passages(short).collect();
    let found: HashSet<u64> = passages(long)
        .filter(|hash| wanted.contains(hash))
        .collect();
    found.len() as f64 / wanted.len().max(1) as f64
}

/// Hashes of every [`PASSAGE`] words in a row, by a polynomial in the hashes of the words.
fn passages(text: &str) -> impl Iterator<Item = u64> {
    const BASE: u64 = 0x9E37_79B9_7F4A_7C15;
    let of_words = BuildHasherDefault::<DefaultHasher>::default();
    let oldest = (0..PASSAGE).fold(1u64, |power, _| power.wrapping_mul(BASE));
    let mut last = VecDeque::with_capacity(PASSAGE + 1);
    let mut sum = 0u64;
    text.split_whitespace().filter_map(move |word| {
        let hash = of_words.hash_one(word);
        last.push_back(hash);
        sum = sum.wrapping_mul(BASE).wrapping_add(hash);
        if last.len() > PASSAGE {
            let gone = last.pop_front().unwrap_or(0);
            sum = sum.wrapping_sub(gone.wrapping_mul(oldest));
        }
        (last.len() == PASSAGE).then_some(sum)
    })
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
    fn texts_overlap_where_one_has_passages_of_the_other_however_they_are_broken_into_lines() {
        let dir = tempfile::tempdir().unwrap();
        let words = |from: usize, to: usize, end: &str| -> String {
            (from..to).map(|i| format!("word{i}{end}")).collect()
        };
        let overlap = |a: &str, b: &str| {
            let path = |name: &str| dir.path().join(name);
            std::fs::write(path("a"), a).unwrap();
            std::fs::write(path("b"), b).unwrap();
            let (a, b) = (TextFile::new(path("a")), TextFile::new(path("b")));
            let (a, b) = (a.unwrap(), b.unwrap());
            assert_eq!(a.overlaps(&b), b.overlaps(&a));
            a.overlaps(&b)
        };
        let text = words(0, 4000, " ");
        assert!(overlap(&text, &words(3000, 9000, "\n")));
        assert!(!overlap(&text, &words(4000, 9000, " ")));
        // A quotation, and words that are the same in another order.
        assert!(!overlap(
            &text,
            &format!("{}{}", words(5000, 9000, " "), words(10, 60, " "))
        ));
        let backwards: Vec<String> = (0..4000).rev().map(|i| format!("word{i}")).collect();
        assert!(!overlap(&text, &backwards.join(" ")));
        // Each passage by a second way of counting.
        let few = "a b a c ".repeat(20);
        let list: Vec<&str> = few.split_whitespace().collect();
        let distinct: HashSet<&[&str]> = list.windows(PASSAGE).collect();
        assert_eq!(
            passages(&few).collect::<HashSet<u64>>().len(),
            distinct.len()
        );
        assert_eq!(passages(&few).count(), list.len() - PASSAGE + 1);
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
