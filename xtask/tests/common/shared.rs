//! Trained models beside the checkout, where there are any.

use std::path::{Path, PathBuf};

/// Folder with trained models and texts beside the checkout, if it is there.
pub(crate) fn shared() -> Option<PathBuf> {
    let dir = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../shared"));
    if !dir.is_dir() {
        eprintln!("skipped: no trained models at {}", dir.display());
        return None;
    }
    Some(dir.to_path_buf())
}
