//! Models named `hf:OWNER/NAME[@REVISION]`, wherever a checkpoint folder is asked for.
//!
//! With the feature `hub` they are fetched from the Hugging Face hub into the cache that its other clients share; without
//! it they are an error that says so.

#[cfg(feature = "hub")]
mod fetch;

use std::path::{Component, Path, PathBuf};

use anyhow::{Context, Result};

use crate::settings::Settings;

/// What a model on the hub begins with.
const SCHEME: &str = "hf:";

/// A model on the hub.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Name {
    /// `OWNER/NAME`.
    id: String,
    /// Branch, tag or commit.
    revision: String,
}

/// The folder of `model`: itself, or where the named model lies after it was fetched.
///
/// # Errors
/// A name that is none, a build without the feature `hub`, and what fetching reports.
pub(crate) fn open_model(model: &Path, settings: &Settings) -> Result<PathBuf> {
    let text = model.to_string_lossy();
    let Some(name) = text.strip_prefix(SCHEME) else {
        return Ok(model.to_path_buf());
    };
    let name = Name::parse(name).with_context(|| {
        format!("--model {text}: expected a folder, or hf:OWNER/NAME or hf:OWNER/NAME@REVISION")
    })?;
    fetch(&name, settings).with_context(|| format!("--model {text}"))
}

#[cfg(feature = "hub")]
fn fetch(name: &Name, settings: &Settings) -> Result<PathBuf> {
    fetch::model(name, settings)
}

#[cfg(not(feature = "hub"))]
fn fetch(_: &Name, _: &Settings) -> Result<PathBuf> {
    anyhow::bail!(
        "this build cannot fetch models; it was made without the feature `hub`, which is on by default"
    )
}

impl Name {
    fn parse(text: &str) -> Option<Self> {
        let (id, revision) = text.split_once('@').unwrap_or((text, "main"));
        let (owner, name) = id.split_once('/')?;
        let is_plain = |part: &str| {
            let is_allowed = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
            !part.is_empty() && !part.starts_with('.') && part.chars().all(is_allowed)
        };
        // A revision becomes a path in the cache; branches may have slashes in their names.
        let is_named = is_plain(owner) && is_plain(name) && revision.split('/').all(is_plain);
        is_named.then(|| Self {
            id: id.into(),
            revision: revision.into(),
        })
    }
}

/// `OWNER/NAME` of a model folder in the hub's cache, which is itself named after a commit.
pub(crate) fn name_in_cache(folder: &Path) -> Option<String> {
    let mut parts = folder.components().rev().map(|part| match part {
        Component::Normal(part) => part.to_str(),
        _ => None,
    });
    let (_commit, snapshots, model) = (parts.next()??, parts.next()??, parts.next()??);
    let name = model.strip_prefix("models--")?.replacen("--", "/", 1);
    (snapshots == "snapshots").then_some(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_owner_name_and_perhaps_revision() {
        let name = |id: &str, revision: &str| {
            Some(Name {
                id: id.into(),
                revision: revision.into(),
            })
        };
        assert_eq!(Name::parse("a-b/c.d_1"), name("a-b/c.d_1", "main"));
        assert_eq!(Name::parse("a/b@refs/pr/1"), name("a/b", "refs/pr/1"));
        for wrong in [
            "a", "a/", "/b", "a/b/c", "a/..", "a/b@", "a/b@../x", "a b/c", "../b",
        ] {
            assert_eq!(Name::parse(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn a_folder_in_the_cache_is_known_by_its_model() {
        let folder = Path::new("cache/hub/models--owner--a--b/snapshots/0123abc");
        assert_eq!(name_in_cache(folder).as_deref(), Some("owner/a--b"));
        assert_eq!(name_in_cache(Path::new("models/a")), None);
        assert_eq!(name_in_cache(Path::new("a")), None);
    }
}
