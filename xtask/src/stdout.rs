//! Printing results.

use std::io::{self, ErrorKind, Write};
use std::ops::ControlFlow;

use anyhow::{Context, Result};

/// Print to stdout. A closed pipe, such as that of `head`, is not an error.
pub(crate) fn print(text: &str) -> Result<()> {
    print_while_read(text).map(|_| ())
}

/// Print to stdout at once; a break where nobody reads it any more.
pub(crate) fn print_while_read(text: &str) -> Result<ControlFlow<()>> {
    let mut stdout = io::stdout().lock();
    let written = stdout.write_all(text.as_bytes());
    match written.and_then(|()| stdout.flush()) {
        Ok(()) => Ok(ControlFlow::Continue(())),
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(ControlFlow::Break(())),
        Err(error) => Err(error).context("stdout"),
    }
}
