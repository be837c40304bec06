//! Content hashes: whether a file, a checkpoint or a set of windows is the one that earlier work was done on.

use std::fmt;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use safetensors::Dtype;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};

/// BLAKE3 hash of some content, 256 bits; as text and in JSON, 64 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct ContentHash([u8; 32]);

impl ContentHash {
    /// Hash of `bytes`.
    pub fn of(bytes: &[u8]) -> Self {
        let mut hasher = Hasher::new();
        hasher.0.update_rayon(bytes);
        hasher.finish()
    }

    /// Hash of a file, or of a folder's files with their names; folders in it do not count.
    ///
    /// # Errors
    /// [`Error::Io`] that names the file or folder.
    pub fn of_path(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let mut hasher = Hasher::new();
        if path.is_dir() {
            let failed = Error::io("read", path);
            let files = fs::read_dir(path).and_then(|entries| {
                let paths = entries.map(|entry| Ok(entry?.path()));
                paths.collect::<std::io::Result<Vec<PathBuf>>>()
            });
            let mut files = files.map_err(failed)?;
            files.retain(|file| file.is_file());
            files.sort();
            for file in files {
                let name = file.file_name().unwrap_or_default();
                hasher.part(name.as_encoded_bytes());
                hasher.part(Self::of_path(&file)?.as_bytes());
            }
            return Ok(hasher.finish());
        }
        let mut hash = || -> std::io::Result<()> {
            let mut file = File::open(path)?;
            let mut bytes = Vec::with_capacity(PIECE as usize);
            while file.by_ref().take(PIECE).read_to_end(&mut bytes)? > 0 {
                hasher.0.update_rayon(&bytes);
                bytes.clear();
            }
            Ok(())
        };
        hash().map_err(Error::io("read", path))?;
        Ok(hasher.finish())
    }

    /// The 32 bytes.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The first eight bytes as a number, where a short key will do: to divide documents into groups, to derive seeds.
    pub fn to_u64(self) -> u64 {
        let mut first = [0; 8];
        first.copy_from_slice(&self.0[..8]);
        u64::from_le_bytes(first)
    }
}

impl fmt::Display for ContentHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&blake3::Hash::from_bytes(self.0), f)
    }
}

impl fmt::Debug for ContentHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ContentHash({self})")
    }
}

impl FromStr for ContentHash {
    type Err = blake3::HexError;

    fn from_str(text: &str) -> std::result::Result<Self, Self::Err> {
        Ok(Self(*blake3::Hash::from_hex(text)?.as_bytes()))
    }
}

impl Serialize for ContentHash {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for ContentHash {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// Bytes of a file that are in memory at a time.
const PIECE: u64 = 1 << 22;

/// Hashes content that comes in parts. Every part is preceded by its length, so that parts cannot run into each other.
#[derive(Debug, Clone, Default)]
pub struct Hasher(blake3::Hasher);

impl Hasher {
    /// Nothing hashed yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds one part.
    pub fn part(&mut self, bytes: &[u8]) -> &mut Self {
        self.0.update(&(bytes.len() as u64).to_le_bytes());
        self.0.update_rayon(bytes);
        self
    }

    /// Adds one part of numbers, little endian.
    pub fn tokens(&mut self, tokens: &[u32]) -> &mut Self {
        self.0.update(&(4 * tokens.len() as u64).to_le_bytes());
        for token in tokens {
            self.0.update(&token.to_le_bytes());
        }
        self
    }

    /// Adds a tensor: name, dtype, shape and bytes.
    pub(crate) fn tensor(&mut self, name: &str, dtype: Dtype, shape: &[usize], bytes: &[u8]) {
        self.part(name.as_bytes())
            .part(format!("{dtype} {shape:?}").as_bytes())
            .part(bytes);
    }

    /// The hash of what was added.
    pub fn finish(&self) -> ContentHash {
        ContentHash(*self.0.finalize().as_bytes())
    }
}

impl Checkpoint {
    /// Hash of the weights: names, dtypes, shapes and all bytes of all tensors in the order of their names, whatever
    /// files they lie in; of a source, the bytes before decoding. Configuration and tokenizer do not count.
    ///
    /// # Errors
    /// Those of [`Checkpoint::bytes`].
    pub fn content_hash(&self) -> Result<ContentHash> {
        self.add_tensors(Hasher::new())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use candle_core::{Device, Tensor};

    use super::*;

    #[test]
    fn the_hash_of_a_file_is_that_of_its_bytes_and_of_a_folder_that_of_its_files() {
        let dir = tempfile::tempdir().unwrap();
        let bytes: Vec<u8> = (0..PIECE + 5).map(|i| (i % 251) as u8).collect();
        let file = dir.path().join("b");
        fs::write(&file, &bytes).unwrap();
        assert_eq!(
            ContentHash::of_path(&file).unwrap(),
            ContentHash::of(&bytes)
        );
        let before = ContentHash::of_path(dir.path()).unwrap();
        fs::rename(&file, dir.path().join("c")).unwrap();
        assert_ne!(ContentHash::of_path(dir.path()).unwrap(), before);
        let error = ContentHash::of_path(&file).unwrap_err();
        assert!(
            error.to_string().contains(file.to_str().unwrap()),
            "{error}"
        );
    }

    #[test]
    fn the_hash_is_blake3_and_survives_json() {
        let hash = ContentHash::of(b"abc");
        let expected = "6437b3ac38465133ffb63b75273a8db548c558465d79db03fd359c6cd5bd9d85";
        assert_eq!(hash.to_string(), expected);
        let json = serde_json::to_string(&hash).unwrap();
        assert_eq!(serde_json::from_str::<ContentHash>(&json).unwrap(), hash);
        assert!(serde_json::from_str::<ContentHash>("\"64\"").is_err());
    }

    #[test]
    fn parts_do_not_run_into_each_other() {
        let of = |parts: &[&[u8]]| {
            let mut hasher = Hasher::new();
            for part in parts {
                hasher.part(part);
            }
            hasher.finish()
        };
        assert_ne!(of(&[b"ab", b"c"]), of(&[b"a", b"bc"]));
        let mut tokens = Hasher::new();
        assert_eq!(
            tokens.tokens(&[1, 2]).finish(),
            of(&[&[1, 0, 0, 0, 2, 0, 0, 0]])
        );
    }

    #[test]
    fn an_edit_at_the_end_of_a_large_tensor_changes_the_hash() {
        let dir = tempfile::tempdir().unwrap();
        let hash = |name: &str, last: f32| {
            let mut values = vec![0.0f32; 1 << 18];
            values[(1 << 18) - 1] = last;
            let tensor = Tensor::from_vec(values, (512, 512), &Device::Cpu).unwrap();
            let path = dir.path().join(name);
            crate::write_file(&path, [("w", &tensor)], &BTreeMap::new()).unwrap();
            Checkpoint::open_file(&path)
                .unwrap()
                .content_hash()
                .unwrap()
        };
        assert_eq!(hash("a", 1.0), hash("b", 1.0));
        assert_ne!(hash("a", 1.0), hash("b", 2.0));
    }
}
