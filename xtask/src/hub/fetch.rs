//! Fetching a model from the hub, or finding it in the cache.
//!
//! `HF_HUB_CACHE` or `HF_HOME` say where the cache lies, `HF_ENDPOINT` where the hub is, `HF_TOKEN` or the token file of a
//! login who asks; with `HF_HUB_OFFLINE=1` nobody is asked. All files are those of one commit.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use hf_hub::api::RepoInfo;
use hf_hub::api::sync::{ApiBuilder, ApiError};
use hf_hub::{Cache, Repo, RepoType};
use serde_json::Value;

use super::Name;
use crate::bar::Bar;
use crate::settings::Settings;

const CONFIG: &str = "config.json";
const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
/// How often an interrupted download goes on.
const RETRIES: usize = 3;

/// The folder of `name`, complete.
pub(super) fn model(name: &Name, settings: &Settings) -> Result<PathBuf> {
    let set = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
    let dir = set("HF_HUB_CACHE").map_or_else(|| Cache::from_env().path().clone(), PathBuf::from);
    let cache = Cache::new(dir.clone());
    if set("HF_HUB_OFFLINE").is_some_and(|value| value != "0") {
        return cached(&cache, name).context("HF_HUB_OFFLINE is set");
    }
    let api = ApiBuilder::from_env()
        .with_cache_dir(dir)
        .with_token(set("HF_TOKEN").or_else(|| Cache::from_env().token()))
        .with_progress(false)
        .with_retries(RETRIES)
        .build()
        .context("cannot ask the hub")?;
    let repo =
        |revision: &str| Repo::with_revision(name.id.clone(), RepoType::Model, revision.into());
    let info = match api.repo(repo(&name.revision)).info() {
        Ok(info) => info,
        Err(error) if status(&error).is_none() => {
            return cached(&cache, name)
                .with_context(|| format!("cannot reach the hub ({})", one_line(&error)));
        }
        Err(error) => return Err(explained(error)),
    };
    let folder = cache.repo(repo(&info.sha)).pointer_path(&info.sha);
    let fetch = |file: &str| -> Result<()> {
        if folder.join(file).exists() {
            return Ok(());
        }
        let download = Download::new(settings);
        api.repo(repo(&info.sha))
            .download_with_progress(file, download)
            .map_err(explained)
            .with_context(|| file.to_owned())?;
        Ok(())
    };
    files(&info)?.iter().try_for_each(|file| fetch(file))?;
    if !folder.join(WEIGHTS).exists() {
        shards(&folder)?.iter().try_for_each(|file| fetch(file))?;
    }
    cache
        .repo(repo(&name.revision))
        .create_ref(&info.sha)
        .context("cannot write the cache")?;
    Ok(folder)
}

/// The files to fetch before the shards of an index are known.
fn files(info: &RepoInfo) -> Result<Vec<String>> {
    let all: Vec<&str> = info
        .siblings
        .iter()
        .map(|file| file.rfilename.as_str())
        .collect();
    let has = |name: &str| all.contains(&name);
    if !has(CONFIG) {
        bail!("the repository has no {CONFIG}: it is no model of transformers");
    }
    let weights = match (has(WEIGHTS), has(INDEX)) {
        (true, _) => WEIGHTS,
        (false, true) => INDEX,
        (false, false) => bail!("the repository has neither {WEIGHTS} nor {INDEX}"),
    };
    let wanted = |name: &&str| *name == CONFIG || *name == weights || is_of_tokenizer(name);
    Ok(all.into_iter().filter(wanted).map(String::from).collect())
}

/// Files that tokenise, and the settings of generation, which name the tokens that end a text.
fn is_of_tokenizer(name: &str) -> bool {
    const NAMES: [&str; 4] = [
        "added_tokens.json",
        "generation_config.json",
        "merges.txt",
        "special_tokens_map.json",
    ];
    const PREFIXES: [&str; 4] = ["chat_template.", "tokenizer.", "tokenizer_", "vocab."];
    let is_plain = !name.contains('/');
    is_plain && (NAMES.contains(&name) || PREFIXES.iter().any(|start| name.starts_with(start)))
}

/// The shards that the index in `folder` names.
fn shards(folder: &Path) -> Result<BTreeSet<String>> {
    let bytes = std::fs::read(folder.join(INDEX)).context(INDEX)?;
    let index: Value = serde_json::from_slice(&bytes).context(INDEX)?;
    let map = index["weight_map"].as_object();
    let map = map.with_context(|| format!("{INDEX}: expected a weight_map"))?;
    let shard = |value: &Value| {
        let name = value
            .as_str()
            .filter(|name| !name.contains(['/', '\\']) && *name != "..");
        let name = name.with_context(|| format!("{INDEX}: {value} is no file name"));
        name.map(String::from)
    };
    map.values().map(shard).collect()
}

/// The folder of `name` as an earlier run, or another client of the hub, left it.
fn cached(cache: &Cache, name: &Name) -> Result<PathBuf> {
    let repo = Repo::with_revision(name.id.clone(), RepoType::Model, name.revision.clone());
    let root = cache.path().join(repo.folder_name());
    // A commit is its own name; branches and tags have a file that holds theirs.
    let commit = std::fs::read_to_string(root.join("refs").join(&name.revision));
    let commit = commit.unwrap_or_else(|_| name.revision.clone());
    let folder = cache.repo(repo).pointer_path(commit.trim());
    let has = |file: &str| folder.join(file).exists();
    let is_complete = has(CONFIG)
        && (has(WEIGHTS) || shards(&folder).is_ok_and(|shards| shards.iter().all(|s| has(s))));
    if !is_complete {
        bail!("the cache {} has no complete copy", cache.path().display());
    }
    Ok(folder)
}

/// The status with which the hub refused, or none where it was not reached.
fn status(error: &ApiError) -> Option<u16> {
    match error {
        ApiError::RequestError(error) => match **error {
            ureq::Error::StatusCode(code) => Some(code),
            _ => None,
        },
        ApiError::TooManyRetries(error) => status(error),
        _ => None,
    }
}

fn explained(error: ApiError) -> anyhow::Error {
    match status(&error) {
        Some(401 | 403) => anyhow!(
            "the hub refuses: there is no such model, or it is private or gated; HF_TOKEN takes the token of somebody who \
             may read it"
        ),
        Some(404) => anyhow!("the hub has no such model, revision or file"),
        Some(code) => anyhow!("the hub answers with status {code}"),
        None => anyhow!("the download failed: {}", one_line(&error)),
    }
}

fn one_line(error: &ApiError) -> String {
    error.to_string().lines().collect::<Vec<_>>().join(" ")
}

/// Shows how far the download of a file has come, in MiB.
struct Download<'a> {
    settings: &'a Settings,
    bar: Option<Bar>,
    done: usize,
    size: usize,
}

impl<'a> Download<'a> {
    fn new(settings: &'a Settings) -> Self {
        Self {
            settings,
            bar: None,
            done: 0,
            size: 0,
        }
    }
}

impl hf_hub::api::Progress for Download<'_> {
    fn init(&mut self, size: usize, file: &str) {
        (self.done, self.size) = (0, size);
        let label = format!("{file} (MiB)");
        self.bar = Some(self.settings.bar(label, (size >> 20) as u64));
    }

    fn update(&mut self, bytes: usize) {
        self.done += bytes;
        if let Some(bar) = &self.bar {
            bar.set((self.done >> 20) as u64, (self.size >> 20) as u64);
        }
    }

    fn finish(&mut self) {
        self.bar = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hf_hub::api::Siblings;

    fn info(files: &[&str]) -> RepoInfo {
        let sibling = |file: &&str| Siblings {
            rfilename: file.to_string(),
        };
        RepoInfo {
            siblings: files.iter().map(sibling).collect(),
            sha: "0".into(),
        }
    }

    #[test]
    fn only_what_is_needed_is_fetched() {
        let all = [
            "README.md",
            "config.json",
            "model.safetensors",
            "pytorch_model.bin",
            "tokenizer.json",
            "onnx/config.json",
            "onnx/tokenizer.json",
            "tokenizer_config.json",
            "generation_config.json",
            "model.safetensors.index.json",
        ];
        let expected = [
            "config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
            "generation_config.json",
        ];
        assert_eq!(files(&info(&all)).unwrap(), expected);
        let sharded = info(&[
            "config.json",
            "model-1.safetensors",
            "model.safetensors.index.json",
        ]);
        assert_eq!(files(&sharded).unwrap(), ["config.json", INDEX]);
        for missing in [
            &["config.json", "pytorch_model.bin"][..],
            &["model.safetensors"],
        ] {
            assert!(files(&info(missing)).is_err());
        }
    }

    #[test]
    fn an_index_cannot_name_files_elsewhere() {
        let dir = tempfile::tempdir().unwrap();
        let write = |shard: &str| {
            let json = serde_json::json!({"weight_map": {"a": shard, "b": shard}});
            std::fs::write(dir.path().join(INDEX), json.to_string()).unwrap();
        };
        write("model-1.safetensors");
        let found = shards(dir.path()).unwrap();
        assert_eq!(
            found.into_iter().collect::<Vec<_>>(),
            ["model-1.safetensors"]
        );
        for elsewhere in ["../x", "/x", "a\\b", ".."] {
            write(elsewhere);
            assert!(shards(dir.path()).is_err(), "{elsewhere}");
        }
    }
}
