//! A folder that appears when it is complete.

use crate::Result;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

fn io(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> tensor_io::Error {
    let path = path.to_owned();
    move |source| tensor_io::Error::Io {
        action,
        path,
        source,
    }
}

/// Removes what it names unless that was renamed.
struct Partial(PathBuf);

impl Drop for Partial {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).ok();
    }
}

/// Lets `fill` write into a hidden folder beside `dst` and gives that its name. An existing folder
/// is replaced if `overwrite`, and if it holds a file called `marker` or nothing.
pub(super) fn write(
    dst: &Path,
    overwrite: bool,
    marker: &'static str,
    fill: impl FnOnce(&Path) -> Result<()>,
) -> Result<()> {
    check(dst, overwrite, marker)?;
    let parent = dst
        .parent()
        .filter(|p| !p.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    fs::create_dir_all(parent).map_err(io("create", parent))?;
    let name = dst.file_name().unwrap_or_default().to_string_lossy();
    let sibling = |what| parent.join(format!(".{name}.{what}-{}", std::process::id()));
    let partial = Partial(sibling("partial"));
    fs::create_dir(&partial.0).map_err(io("create", &partial.0))?;
    fill(&partial.0)?;
    check(dst, overwrite, marker)?;
    let old = sibling("old");
    match fs::rename(dst, &old) {
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        moved => moved.map_err(io("rename", dst))?,
    }
    if let Err(error) = fs::rename(&partial.0, dst) {
        fs::rename(&old, dst).ok();
        return Err(io("rename", &partial.0)(error).into());
    }
    fs::remove_dir_all(&old).ok();
    Ok(())
}

fn check(dst: &Path, overwrite: bool, marker: &'static str) -> Result<()> {
    let path = dst.to_owned();
    let is_empty = |dst| fs::read_dir(dst).is_ok_and(|mut entries| entries.next().is_none());
    match dst.try_exists().map_err(io("look at", dst))? {
        false => Ok(()),
        true if !overwrite => Err(tensor_io::Error::Exists { path }.into()),
        true if dst.join(marker).is_file() || is_empty(dst) => Ok(()),
        true => Err(tensor_io::Error::NotReplaceable {
            path,
            expected: "an adapter folder or an empty one",
        }
        .into()),
    }
}

/// Writes a file and brings it to disk.
pub(super) fn file(path: &Path, contents: &[u8]) -> Result<()> {
    fs::write(path, contents).map_err(io("write", path))?;
    let file = fs::File::open(path).map_err(io("open", path))?;
    Ok(file.sync_all().map_err(io("sync", path))?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Error;

    #[test]
    fn a_folder_appears_whole_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let dst = dir.path().join("a/adapter");
        let fill =
            |text: &'static str| move |folder: &Path| file(&folder.join("mark"), text.as_bytes());
        write(&dst, false, "mark", fill("one")).unwrap();
        let again = write(&dst, false, "mark", fill("two"));
        assert!(matches!(
            again,
            Err(Error::Checkpoint(tensor_io::Error::Exists { .. }))
        ));
        let failed = write(&dst, true, "mark", |folder| {
            file(&folder.join("mark"), b"half")?;
            file(&folder.join("no/such/folder"), b"")
        });
        assert!(failed.is_err());
        assert_eq!(fs::read_to_string(dst.join("mark")).unwrap(), "one");
        write(&dst, true, "mark", fill("two")).unwrap();
        assert_eq!(fs::read_to_string(dst.join("mark")).unwrap(), "two");
        let other = write(&dst, true, "another mark", fill("three"));
        assert!(matches!(
            other,
            Err(Error::Checkpoint(tensor_io::Error::NotReplaceable { .. }))
        ));
        assert_eq!(fs::read_dir(dst.parent().unwrap()).unwrap().count(), 1);
    }
}
