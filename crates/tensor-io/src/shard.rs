//! One file of tensors, open for reading: mapped safetensors, a PyTorch pickle read through candle, or a source of
//! tensors that somebody else decodes.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::pickle::PthTensors;
use safetensors::View;

use crate::error::{Error, Result};
use crate::header::{Entry, Header, byte_size};
use crate::map::{MappedFile, SharedPart};
use crate::source::TensorSource;

/// A file of tensors.
pub(crate) struct Shard {
    pub(crate) path: PathBuf,
    pub(crate) metadata: BTreeMap<String, String>,
    content: Content,
}

/// Bytes that are shared with a mapped file, or own memory.
pub type SharedBytes = Arc<dyn AsRef<[u8]> + Send + Sync>;

enum Content {
    /// A safetensors file and where its data begins.
    Mapped(Arc<MappedFile>, usize),
    Pickle(PthTensors),
    Source(Box<dyn TensorSource>),
}

impl Shard {
    /// Opens a safetensors file; also returns what it holds, by offset.
    pub(crate) fn open_safetensors(path: PathBuf) -> Result<(Self, Vec<Entry>)> {
        let file = open_regular(&path).map_err(Error::io("open", &path))?;
        let map = MappedFile::new(&file).map_err(Error::io("map", &path))?;
        let header = Header::parse(&map).map_err(|source| Error::Header {
            file: path.clone(),
            source,
        })?;
        let shard = Self {
            path,
            metadata: header.metadata,
            content: Content::Mapped(Arc::new(map), header.data_start),
        };
        Ok((shard, header.entries))
    }

    /// Tensors that `source` decodes.
    pub(crate) fn of_source(path: PathBuf, source: Box<dyn TensorSource>) -> Self {
        Self {
            path,
            metadata: BTreeMap::new(),
            content: Content::Source(source),
        }
    }

    /// Opens a `.bin` file of PyTorch; also returns what it holds, by name. Its entries have sizes but no place.
    pub(crate) fn open_pickle(path: PathBuf) -> Result<(Self, Vec<Entry>)> {
        let file = open_regular(&path).map_err(Error::io("open", &path))?;
        let file_bytes = file.metadata().map_err(Error::io("read", &path))?.len();
        let pickle = guard_pickle(&path, || PthTensors::new(&path, None))?;
        let mut entries = Vec::new();
        for (name, info) in pickle.tensor_infos() {
            let dtype = info.dtype.into();
            let shape = info.layout.dims().to_vec();
            // PyTorch does not compress: a tensor larger than its file is a lie that must not be allocated.
            let bytes = byte_size(dtype, &shape)
                .filter(|&bytes| bytes as u64 <= file_bytes)
                .ok_or_else(|| {
                    pickle_error(
                        &path,
                        format!("tensor `{name}` of shape {shape:?} does not fit in the file"),
                    )
                })?;
            entries.push(Entry {
                name: name.clone(),
                dtype,
                shape,
                start: 0,
                end: bytes,
            });
        }
        if entries.is_empty() {
            return Err(pickle_error(
                &path,
                "no tensors at its top level".to_string(),
            ));
        }
        entries.sort_by(|a, b| a.name.cmp(&b.name));
        let shard = Self {
            path,
            metadata: BTreeMap::new(),
            content: Content::Pickle(pickle),
        };
        Ok((shard, entries))
    }

    /// The bytes of a tensor, little endian; `range` counts from the start of the data.
    pub(crate) fn bytes(&self, name: &str, range: Range<usize>) -> Result<Cow<'_, [u8]>> {
        match &self.content {
            Content::Mapped(map, data_start) => Ok(Cow::Borrowed(
                &map[data_start + range.start..data_start + range.end],
            )),
            Content::Pickle(pickle) => guard_pickle(&self.path, || {
                let tensor = pickle.get(name)?.ok_or_else(|| {
                    candle_core::Error::Msg(format!("tensor `{name}` disappeared from the file"))
                })?;
                Ok(Cow::Owned(View::data(&tensor).into_owned()))
            }),
            Content::Source(source) => source.bytes(name),
        }
    }

    /// As [`Shard::bytes`], for part of a tensor that is not of a source: `part` counts from its first byte. What is returned
    /// keeps a mapped file alive.
    pub(crate) fn shared(
        &self,
        name: &str,
        range: Range<usize>,
        part: Range<usize>,
    ) -> Result<SharedBytes> {
        if let Content::Mapped(map, data_start) = &self.content {
            let start = data_start + range.start;
            return Ok(Arc::new(SharedPart {
                whole: Arc::clone(map),
                range: start + part.start..start + part.end,
            }));
        }
        let bytes = match self.bytes(name, range)? {
            Cow::Owned(bytes) if part == (0..bytes.len()) => bytes,
            bytes => bytes[part].to_vec(),
        };
        Ok(Arc::new(bytes))
    }

    /// Rows of a matrix, one after the other.
    pub(crate) fn rows(
        &self,
        name: &str,
        range: Range<usize>,
        row_bytes: usize,
        rows: &[usize],
    ) -> Result<Vec<u8>> {
        if let Content::Source(source) = &self.content {
            return source.rows(name, rows);
        }
        let all = self.bytes(name, range)?;
        let mut bytes = Vec::with_capacity(rows.len() * row_bytes);
        for row in rows {
            bytes.extend_from_slice(&all[row * row_bytes..][..row_bytes]);
        }
        Ok(bytes)
    }

    /// Lets go of the memory of a tensor.
    pub(crate) fn release(&self, name: &str, range: Range<usize>) {
        match &self.content {
            Content::Mapped(map, data_start) => {
                map.release(data_start + range.start..data_start + range.end);
            }
            Content::Pickle(_) => {}
            Content::Source(source) => source.release(name),
        }
    }

    /// The source behind it, if that is what it is.
    pub(crate) fn source(&self) -> Option<&dyn TensorSource> {
        match &self.content {
            Content::Source(source) => Some(&**source),
            Content::Mapped(..) | Content::Pickle(_) => None,
        }
    }
}

/// Opens a file for reading; refuses folders, pipes and the like, on which reading fails late or never returns.
pub(crate) fn open_regular(path: &Path) -> io::Result<File> {
    if !path.metadata()?.is_file() {
        return Err(io::Error::other("not a regular file"));
    }
    File::open(path)
}

/// Runs candle's pickle reader, which panics on some malformed files, and makes an error of all its refusals.
fn guard_pickle<T>(path: &Path, read: impl FnOnce() -> candle_core::Result<T>) -> Result<T> {
    match catch_unwind(AssertUnwindSafe(read)) {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(pickle_error(path, error.to_string())),
        Err(_) => Err(pickle_error(path, "malformed pickle".to_string())),
    }
}

fn pickle_error(path: &Path, reason: String) -> Error {
    Error::Pickle {
        file: path.to_path_buf(),
        reason,
    }
}
