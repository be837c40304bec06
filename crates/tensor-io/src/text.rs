//! Files of text as editors leave them.

use std::fs;
use std::io;
use std::path::Path;

/// The byte-order mark that some editors put before UTF-8; it is no text.
const MARK: &str = "\u{feff}";

/// Reads a file of UTF-8 text, without a byte-order mark at its beginning.
///
/// # Errors
/// Those of [`fs::read_to_string`].
pub fn read_text(path: impl AsRef<Path>) -> io::Result<String> {
    let mut text = fs::read_to_string(path)?;
    if text.starts_with(MARK) {
        text.drain(..MARK.len());
    }
    Ok(text)
}

/// The bytes of a text without a byte-order mark at their beginning.
pub fn without_mark(bytes: &[u8]) -> &[u8] {
    bytes.strip_prefix(MARK.as_bytes()).unwrap_or(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{CONFIG_FILE, Config};

    #[test]
    fn one_byte_order_mark_is_no_text() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("text");
        for (written, read) in [("\u{feff}é", "é"), ("é\u{feff}", "é\u{feff}"), ("", "")] {
            fs::write(&path, written).unwrap();
            assert_eq!(read_text(&path).unwrap(), read);
            assert_eq!(without_mark(written.as_bytes()), read.as_bytes());
        }
    }

    #[test]
    fn a_configuration_behind_a_byte_order_mark_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(CONFIG_FILE);
        fs::write(&path, "\u{feff}{\"a\": 1}").unwrap();
        assert_eq!(Config::read(&path).unwrap().get("a"), Some(&1.into()));
    }
}
