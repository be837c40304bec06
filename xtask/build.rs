//! Puts the version with the commit of the sources into the program, as `XTASK_VERSION`.
//!
//! It is that of the build: where the program is copied to, and what is checked out or edited later, changes nothing. Whether
//! sources differ from the commit is not said, since cargo runs this at a new commit and not at every edit.

use std::fs;
use std::path::Path;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    let version = env!("CARGO_PKG_VERSION");
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let commit = commit(&root.join(".git"));
    let commit = commit.map_or_else(String::new, |commit| format!("+{commit}"));
    println!("cargo:rustc-env=XTASK_VERSION={version}{commit}");
}

/// The first digits of the commit that is checked out; none outside of a git checkout.
fn commit(git: &Path) -> Option<String> {
    // A worktree has a file that names its folder, which in turn names the folder of what all worktrees share.
    let folder = match fs::read_to_string(git) {
        Ok(text) => git.parent()?.join(text.strip_prefix("gitdir:")?.trim()),
        Err(_) if git.is_dir() => git.to_path_buf(),
        Err(_) => return None,
    };
    let shared = match fs::read_to_string(folder.join("commondir")) {
        Ok(text) => folder.join(text.trim()),
        Err(_) => folder.clone(),
    };
    let head = watched(&folder.join("HEAD"))?;
    let hash = match head.trim().strip_prefix("ref: ") {
        None => head,
        // A branch is a file of its own, or a line among others.
        Some(branch) => watched(&shared.join(branch)).or_else(|| {
            let packed = watched(&shared.join("packed-refs"))?;
            let mut lines = packed.lines().filter_map(|line| line.split_once(' '));
            let (hash, _) = lines.find(|(_, name)| *name == branch)?;
            Some(hash.into())
        })?,
    };
    let hash = hash.trim();
    let is_hash = hash.len() >= 40 && hash.bytes().all(|byte| byte.is_ascii_hexdigit());
    is_hash.then(|| hash[..12].into())
}

/// The text of a file at whose next change this runs again; where it is not there, at the next change of its folder.
fn watched(file: &Path) -> Option<String> {
    let existing = file.ancestors().find(|path| path.exists())?;
    println!("cargo:rerun-if-changed={}", existing.display());
    fs::read_to_string(file).ok()
}
