//! Files and folders that appear whole or not at all.
//!
//! [`PendingFile`] is one file, [`PendingFolder`] a folder of files. Both are written beside their destination, brought to
//! disk and renamed; dropped before that, they leave the destination as it was.

mod file;
mod folder;
mod sealed;

use std::path::Path;

pub use file::{PendingFile, read_json, write, write_json};
pub use folder::{Overwrite, PendingFolder};
pub use sealed::{read_sealed_json, write_sealed_json};

/// The folder that a path lies in.
fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    }
}
