//! Printing results.

use std::io::{ErrorKind, Write};

use anyhow::{Context, Result};

/// Print to stdout. A closed pipe, such as that of `head`, is not an error.
pub(crate) fn print(text: &str) -> Result<()> {
    match std::io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => Err(error).context("stdout"),
        _ => Ok(()),
    }
}
