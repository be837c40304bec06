//! The layout of a Hugging Face checkpoint folder: which files hold weights, and which travel with them.

use std::collections::HashMap;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::header::Entry;
use crate::index::Index;
use crate::shard::Shard;

/// Weights in one file.
pub(crate) const SINGLE_FILE: &str = "model.safetensors";
/// Index of weights in shards.
pub(crate) const INDEX_FILE: &str = "model.safetensors.index.json";
const PICKLE_FILE: &str = "pytorch_model.bin";
const PICKLE_INDEX_FILE: &str = "pytorch_model.bin.index.json";

/// File name of shard `number` (from 1) of `count`.
pub(crate) fn shard_file_name(number: usize, count: usize) -> String {
    format!("model-{number:05}-of-{count:05}.safetensors")
}

type OpenShard = fn(PathBuf) -> Result<(Shard, Vec<Entry>)>;

/// Opens all files with weights, in the order in which the ecosystem's loaders look for them.
pub(crate) fn open_weights(dir: &Path) -> Result<Vec<(Shard, Vec<Entry>)>> {
    let layouts: [(&str, &str, OpenShard); 2] = [
        (SINGLE_FILE, INDEX_FILE, Shard::open_safetensors),
        (PICKLE_FILE, PICKLE_INDEX_FILE, Shard::open_pickle),
    ];
    for (single, index, open) in layouts {
        let (single, index) = (dir.join(single), dir.join(index));
        // A link that leads nowhere counts: opening it names it.
        if single.symlink_metadata().is_ok() {
            return Ok(vec![open(single)?]);
        }
        if index.symlink_metadata().is_ok() {
            return open_shards(dir, &index, open);
        }
    }
    Err(Error::NoWeights {
        dir: dir.to_path_buf(),
    })
}

fn open_shards(dir: &Path, index_file: &Path, open: OpenShard) -> Result<Vec<(Shard, Vec<Entry>)>> {
    let bytes = fs::read(index_file).map_err(Error::io("read", index_file))?;
    let index = Index::parse(&bytes).map_err(|source| Error::Index {
        file: index_file.to_path_buf(),
        source,
    })?;
    let mut shards = Vec::new();
    for name in index.shards() {
        match open(dir.join(name)) {
            Err(Error::Io { source, .. }) if source.kind() == ErrorKind::NotFound => {
                return Err(Error::MissingShard {
                    index: index_file.to_path_buf(),
                    shard: name.to_string(),
                });
            }
            shard => shards.push(shard?),
        }
    }
    check_index(index_file, &index, &shards)?;
    Ok(shards)
}

/// Index and shards must tell the same story: each tensor in exactly the shard that the index names.
fn check_index(index_file: &Path, index: &Index, shards: &[(Shard, Vec<Entry>)]) -> Result<()> {
    let mut found: HashMap<&str, &Path> = HashMap::new();
    for (shard, entries) in shards {
        for entry in entries {
            if let Some(first) = found.insert(&entry.name, &shard.path) {
                return Err(Error::DuplicateTensor {
                    tensor: entry.name.clone(),
                    first: first.to_path_buf(),
                    second: shard.path.clone(),
                });
            }
        }
    }
    for (shard, entries) in shards {
        let file_name = shard.path.file_name();
        for entry in entries {
            match index.shard_of(&entry.name) {
                Some(indexed) if file_name.is_some_and(|name| name == indexed) => {}
                Some(indexed) => {
                    return Err(Error::Misplaced {
                        index: index_file.to_path_buf(),
                        tensor: entry.name.clone(),
                        shard: shard.path.clone(),
                        indexed: indexed.to_string(),
                    });
                }
                None => {
                    return Err(Error::NotInIndex {
                        index: index_file.to_path_buf(),
                        tensor: entry.name.clone(),
                        shard: shard.path.clone(),
                    });
                }
            }
        }
    }
    match index.iter().find(|(tensor, _)| !found.contains_key(tensor)) {
        None => Ok(()),
        Some((tensor, shard)) => Err(Error::NotInShard {
            index: index_file.to_path_buf(),
            tensor: tensor.to_string(),
            shard: shard.to_string(),
        }),
    }
}

/// The files that belong to the model without being its weights or its configuration, sorted by name.
pub(crate) fn files_to_carry(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir).map_err(Error::io("list", dir))? {
        let path = entry.map_err(Error::io("list", dir))?.path();
        let carried = path
            .file_name()
            .and_then(|name| name.to_str())
            .is_some_and(is_carried);
        if carried && path.is_file() {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

/// Whether a file is part of a checkpoint, so that it goes when the checkpoint is replaced: also the same model as a GGUF file
/// beside it, which would be another model's then. Python code only by the names that loaders have.
pub(crate) fn is_of_checkpoint(name: &str) -> bool {
    const NAMES: [&str; 3] = ["config.json", "quantize_config.json", "quant_config.json"];
    const CODE: [&str; 4] = [
        "configuration_",
        "modeling_",
        "processing_",
        "tokenization_",
    ];
    let weights = ["model", "pytorch_model"]
        .iter()
        .any(|stem| name.starts_with(stem))
        && [".safetensors", ".bin", ".index.json", ".gguf"]
            .iter()
            .any(|suffix| name.ends_with(suffix));
    let code = name.ends_with(".py");
    NAMES.contains(&name)
        || weights
        || code && CODE.iter().any(|prefix| name.starts_with(prefix))
        || !code && is_carried(name)
}

/// Tokenizers, chat templates, generation and preprocessing settings, and the Python code that a configuration's
/// `auto_map` points to.
fn is_carried(name: &str) -> bool {
    const NAMES: [&str; 8] = [
        "added_tokens.json",
        "generation_config.json",
        "merges.txt",
        "preprocessor_config.json",
        "processor_config.json",
        "special_tokens_map.json",
        "tekken.json",
        "vocabulary.json",
    ];
    const PREFIXES: [&str; 5] = [
        "chat_template.",
        "tokenizer.",
        "tokenizer_",
        "vocab.",
        "video_preprocessor",
    ];
    const SUFFIXES: [&str; 3] = [".model", ".tiktoken", ".py"];
    NAMES.contains(&name)
        || PREFIXES.iter().any(|prefix| name.starts_with(prefix))
        || SUFFIXES.iter().any(|suffix| name.ends_with(suffix))
}
