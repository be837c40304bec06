//! Writing a file, one tensor after the other.

use std::io::Write;
use std::path::PathBuf;

use super::header::{bad_key, bad_name, check_alignment, check_shape};
use super::value::encode_string;
use super::{
    ALIGNMENT_KEY, BlockLayout, DEFAULT_ALIGNMENT, Gguf, GgufError, MAGIC, MAX_DIMS, Value,
};
use crate::atomic::PendingFile;
use crate::error::{Error, Result};

/// Version that is written.
const VERSION: u32 = 3;

/// A tensor that a file will hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSpec {
    /// Name in the file.
    pub name: String,
    /// How its values are stored.
    pub layout: BlockLayout,
    /// Shape, outermost dimension first.
    pub shape: Vec<usize>,
}

impl TensorSpec {
    /// Plain data; [`Writer::create`] checks it.
    pub fn new(name: impl Into<String>, layout: BlockLayout, shape: impl Into<Vec<usize>>) -> Self {
        Self {
            name: name.into(),
            layout,
            shape: shape.into(),
        }
    }
}

/// A file that is being written. All tensors are declared up front, and then written in that order: memory holds no more
/// than what the caller hands over at once. The file appears under its name in [`Writer::finish`], or not at all: it is read
/// back before, and a tensor of each type compared with what was to be written.
#[derive(Debug)]
pub struct Writer {
    file: PendingFile,
    /// Names and sizes in the order of the file.
    tensors: Vec<(String, usize)>,
    alignment: usize,
    /// The tensor that is being written, and how much of it is.
    next: usize,
    filled: usize,
    /// The first tensor of each type by its place, with a hash of its bytes.
    hashes: Vec<(usize, blake3::Hasher)>,
}

impl Writer {
    /// Begins the file `path`, replacing one that is there when it is finished. A key `general.alignment` decides the
    /// alignment; it may be left out.
    ///
    /// # Errors
    /// [`Error::Gguf`] for keys, names and shapes that [`Gguf::open`](super::Gguf::open) would refuse, [`Error::Io`].
    pub fn create(
        path: impl Into<PathBuf>,
        metadata: &[(String, Value)],
        tensors: &[TensorSpec],
    ) -> Result<Self> {
        let path = path.into();
        let header = encode_header(metadata, tensors).map_err(|source| Error::Gguf {
            file: path.clone(),
            source,
        })?;
        let Encoded {
            bytes,
            alignment,
            sizes,
        } = header;
        let is_first = |&at: &usize| {
            let before = &tensors[..at];
            before
                .iter()
                .all(|tensor| tensor.layout != tensors[at].layout)
        };
        let first = (0..tensors.len()).filter(is_first);
        let mut writer = Self {
            file: PendingFile::create(path)?,
            hashes: first.map(|at| (at, blake3::Hasher::new())).collect(),
            tensors: tensors
                .iter()
                .zip(sizes)
                .map(|(tensor, size)| (tensor.name.clone(), size))
                .collect(),
            alignment,
            next: 0,
            filled: 0,
        };
        writer.put(&bytes)?;
        Ok(writer)
    }

    /// Writes the bytes of tensor `name`, or the next piece of them: tensors in the declared order, each in one or more
    /// pieces.
    ///
    /// # Errors
    /// [`Error::OutOfOrder`] and [`Error::NotDeclared`] for another tensor than the next in order, [`Error::WrongLength`] for more bytes than it
    /// has, [`Error::Io`].
    pub fn write(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let path = || self.file.path().to_path_buf();
        let size = match self.tensors.get(self.next) {
            Some((next, size)) if next == name => *size,
            Some((next, _)) => {
                return Err(Error::OutOfOrder {
                    path: path(),
                    tensor: name.to_string(),
                    expected: next.clone(),
                });
            }
            None => {
                return Err(Error::NotDeclared {
                    path: path(),
                    tensor: name.to_string(),
                });
            }
        };
        let filled = self.filled.saturating_add(bytes.len());
        if filled > size {
            return Err(Error::WrongLength {
                path: path(),
                tensor: name.to_string(),
                expected: size,
                found: filled,
            });
        }
        self.put(bytes)?;
        if let Some((_, hasher)) = self.hashes.iter_mut().find(|(at, _)| *at == self.next) {
            hasher.update_rayon(bytes);
        }
        self.filled = filled;
        if filled == size {
            self.put(&vec![0; size.next_multiple_of(self.alignment) - size])?;
            self.next += 1;
            self.filled = 0;
        }
        Ok(())
    }

    /// Reads the file back, brings it to disk and gives it its name; returns its size in bytes.
    ///
    /// # Errors
    /// [`Error::NotWritten`], [`Error::ReadBack`] for a tensor that is not what was written, [`Error::Io`]. In all cases what was
    /// at the path stays.
    pub fn finish(self) -> Result<u64> {
        if self.next < self.tensors.len() {
            let missing = self.tensors[self.next..].iter();
            return Err(Error::NotWritten {
                path: self.file.path().to_path_buf(),
                tensors: missing.map(|(name, _)| name.clone()).collect(),
            });
        }
        self.read_back()?;
        self.file.persist()
    }

    /// Opens what was written and compares a tensor of each type.
    fn read_back(&self) -> Result<()> {
        let written = Gguf::open_part(self.file.partial())?;
        for (at, hasher) in &self.hashes {
            let (name, _) = &self.tensors[*at];
            let mut found = blake3::Hasher::new();
            found.update_rayon(written.bytes(name)?);
            if found.finalize() != hasher.finalize() {
                return Err(Error::ReadBack {
                    path: self.file.path().to_path_buf(),
                    tensor: name.clone(),
                });
            }
        }
        Ok(())
    }

    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        match self.file.write_all(bytes) {
            Ok(()) => Ok(()),
            Err(source) => Err(Error::io("write", self.file.path())(source)),
        }
    }
}

/// Everything in front of the data.
struct Encoded {
    bytes: Vec<u8>,
    alignment: usize,
    /// Bytes of each tensor.
    sizes: Vec<usize>,
}

fn encode_header(
    metadata: &[(String, Value)],
    tensors: &[TensorSpec],
) -> Result<Encoded, GgufError> {
    let mut bytes = MAGIC.to_vec();
    bytes.extend(VERSION.to_le_bytes());
    bytes.extend((tensors.len() as u64).to_le_bytes());
    bytes.extend((metadata.len() as u64).to_le_bytes());
    let mut alignment = DEFAULT_ALIGNMENT;
    let mut keys: Vec<&str> = Vec::new();
    for (index, (key, value)) in metadata.iter().enumerate() {
        if let Some(reason) = bad_key(key.as_bytes()) {
            let index = index as u64;
            return Err(GgufError::BadKey { index, reason });
        }
        if key == ALIGNMENT_KEY {
            alignment = check_alignment(value)?;
        }
        keys.push(key);
        encode_string(key, &mut bytes);
        value.encode(&mut bytes);
    }
    if let Some(key) = twice(keys) {
        return Err(GgufError::DuplicateKey { key });
    }
    let alignment = alignment as usize;
    let mut sizes = Vec::new();
    let mut offset = 0usize;
    for (index, tensor) in tensors.iter().enumerate() {
        let name = &tensor.name;
        if let Some(reason) = bad_name(name.as_bytes()) {
            let index = index as u64;
            return Err(GgufError::BadName { index, reason });
        }
        if tensor.shape.is_empty() || tensor.shape.len() > MAX_DIMS {
            return Err(GgufError::Dimensions {
                tensor: name.clone(),
                found: tensor.shape.len() as u32,
            });
        }
        let shape: Vec<u64> = tensor.shape.iter().map(|&size| size as u64).collect();
        let (_, size) = check_shape(name, tensor.layout, &shape)?;
        encode_string(name, &mut bytes);
        bytes.extend((shape.len() as u32).to_le_bytes());
        bytes.extend(shape.iter().rev().flat_map(|size| size.to_le_bytes()));
        bytes.extend(tensor.layout.id.to_le_bytes());
        bytes.extend((offset as u64).to_le_bytes());
        sizes.push(size);
        let end = offset
            .checked_add(size)
            .and_then(|end| end.checked_next_multiple_of(alignment));
        offset = end.ok_or_else(|| GgufError::Shape {
            tensor: name.clone(),
            shape,
            reason: "makes the file's size overflow",
        })?;
    }
    if let Some(tensor) = twice(tensors.iter().map(|tensor| tensor.name.as_str()).collect()) {
        return Err(GgufError::DuplicateTensor { tensor });
    }
    bytes.resize(bytes.len().next_multiple_of(alignment), 0);
    Ok(Encoded {
        bytes,
        alignment,
        sizes,
    })
}

fn twice(mut names: Vec<&str>) -> Option<String> {
    names.sort_unstable();
    let pair = names.windows(2).find(|pair| pair[0] == pair[1])?;
    Some(pair[0].to_string())
}
