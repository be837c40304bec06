//! The index of a sharded checkpoint: which shard holds which tensor.
//!
//! `model.safetensors.index.json` is `{"metadata": {"total_size": bytes}, "weight_map": {tensor: shard file}}`.
//! [`Index::parse`] takes bytes and checks what can be checked without the shards: that it has this form, that no
//! tensor stands twice, and that shard names stay inside the folder.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::{Component, Path};

use serde::de::{Error as _, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

/// What was wrong with an index.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IndexError {
    /// Not UTF-8, not even in a field that nobody reads.
    #[error("index is not UTF-8: {0}")]
    NotUtf8(#[source] std::str::Utf8Error),
    /// Not a JSON object with a `weight_map` from tensors to strings, or a tensor stands twice.
    #[error("index is not valid: {0}")]
    Json(#[source] serde_json::Error),
    /// A shard name that is not a plain file name.
    #[error(
        "tensor `{tensor}`: shard name `{shard}` is not a plain file name in the checkpoint folder"
    )]
    UnsafeName {
        /// The tensor.
        tensor: String,
        /// The shard's name as written.
        shard: String,
    },
}

/// The checked index of a sharded checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Index {
    metadata: IndexMetadata,
    weight_map: BTreeMap<String, String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct IndexMetadata {
    total_size: u64,
}

impl Index {
    /// Reads and checks an index.
    ///
    /// # Errors
    /// See [`IndexError`].
    pub fn parse(bytes: &[u8]) -> Result<Self, IndexError> {
        let text = std::str::from_utf8(bytes).map_err(IndexError::NotUtf8)?;
        let raw: RawIndex = serde_json::from_str(text)
            .and_then(|raw| match text.trim_start().starts_with('{') {
                true => Ok(raw),
                // serde would take an array of the fields' values for an object.
                false => Err(serde_json::Error::custom("expected an object")),
            })
            .map_err(IndexError::Json)?;
        for (tensor, shard) in &raw.weight_map.0 {
            if !is_plain_file_name(shard) {
                return Err(IndexError::UnsafeName {
                    tensor: tensor.clone(),
                    shard: shard.clone(),
                });
            }
        }
        // Published indices carry sizes of every kind, wrong ones too: nothing here relies on them.
        Ok(Self::new(0, raw.weight_map.0))
    }

    /// An index over `weight_map`, from tensor names to shard file names, for `total_size` bytes of tensors.
    pub(crate) fn new(total_size: u64, weight_map: BTreeMap<String, String>) -> Self {
        Self {
            metadata: IndexMetadata { total_size },
            weight_map,
        }
    }

    /// The file as written: indented by two spaces, as the ecosystem's tools do.
    pub(crate) fn to_file_bytes(&self) -> Vec<u8> {
        let mut bytes =
            serde_json::to_vec_pretty(self).expect("strings and integers always have a JSON form");
        bytes.push(b'\n');
        bytes
    }

    /// File names of the shards, sorted.
    pub fn shards(&self) -> BTreeSet<&str> {
        self.weight_map.values().map(String::as_str).collect()
    }

    /// The shard that holds `tensor`.
    pub fn shard_of(&self, tensor: &str) -> Option<&str> {
        self.weight_map.get(tensor).map(String::as_str)
    }

    /// All tensors with their shards, by name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.weight_map
            .iter()
            .map(|(tensor, shard)| (tensor.as_str(), shard.as_str()))
    }
}

/// True for a name that stays in its folder on every system: no separators, no `..`, no drive, not empty.
pub(crate) fn is_plain_file_name(name: &str) -> bool {
    let mut components = Path::new(name).components();
    let single = matches!(components.next(), Some(Component::Normal(part)) if part == name)
        && components.next().is_none();
    single && !name.contains(['/', '\\', ':', '\0'])
}

#[derive(Deserialize)]
struct RawIndex {
    weight_map: WeightMap,
}

/// `weight_map`, refusing a tensor that stands twice (a plain map would keep the last).
struct WeightMap(BTreeMap<String, String>);

impl<'de> Deserialize<'de> for WeightMap {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct WeightMapVisitor;

        impl<'de> Visitor<'de> for WeightMapVisitor {
            type Value = WeightMap;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object from tensor names to shard file names")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<WeightMap, A::Error> {
                let mut weights = BTreeMap::new();
                while let Some(tensor) = map.next_key::<String>()? {
                    let shard = map
                        .next_value()
                        .map_err(|error| A::Error::custom(format!("tensor `{tensor}`: {error}")))?;
                    if weights.contains_key(&tensor) {
                        return Err(A::Error::custom(format!(
                            "tensor `{tensor}` is listed twice"
                        )));
                    }
                    weights.insert(tensor, shard);
                }
                Ok(WeightMap(weights))
            }
        }

        deserializer.deserialize_map(WeightMapVisitor)
    }
}
