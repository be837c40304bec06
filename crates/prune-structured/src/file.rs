//! Files that appear whole or not at all.

use std::fs::File;
use std::io;
use std::path::Path;

/// Writes a file beside `path`, then gives it that name; returns its size in bytes. When `write`
/// fails nothing is left and what was at `path` stays.
pub(crate) fn write_beside(
    path: &Path,
    write: impl FnOnce(&mut File) -> io::Result<()>,
) -> io::Result<u64> {
    let mut beside = path.as_os_str().to_owned();
    beside.push(format!(".partial-{}", std::process::id()));
    let run = || {
        let mut file = File::create(&beside)?;
        write(&mut file)?;
        file.sync_all()?;
        let bytes = file.metadata()?.len();
        std::fs::rename(&beside, path)?;
        Ok(bytes)
    };
    run().inspect_err(|_| {
        std::fs::remove_file(&beside).ok();
    })
}
