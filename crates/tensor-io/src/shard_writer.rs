//! One safetensors file under construction: laid out up front, filled in any order.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::thread::{self, JoinHandle};

use candle_core::{CpuStorage, DType, Device, Storage, Tensor};
use safetensors::{Dtype, View};

use crate::dtype::{self, Float};
use crate::error::{Error, Result};
use crate::header::{Entry, Header, HeaderError, MAX_HEADER_BYTES};
use crate::spec::TensorSpec;

/// Bytes written to a file before a thread beside the writer forces them to disk. The next such thread waits for the
/// last one, so that no more than twice this is ever in memory on its way to the disk, and the disk is never idle.
const SYNC_BYTES: usize = 256 << 20;

/// Largest single write, and the step at which `SYNC_BYTES` is looked at.
const WRITE_BYTES: usize = 16 << 20;

/// Elements converted at a time: the converted bytes of a tensor are never all in memory.
const CONVERT_ELEMENTS: usize = 1 << 20;

/// A safetensors file whose header is written and whose tensors are being written.
#[derive(Debug)]
pub(crate) struct ShardWriter {
    path: PathBuf,
    entries: Vec<Entry>,
    data_start: usize,
    /// Bytes written since the last sync was started.
    dirty: usize,
    syncing: Option<JoinHandle<io::Result<()>>>,
}

impl ShardWriter {
    /// Lays out `specs` by decreasing size of dtype, which aligns every tensor, then in the given order; creates the
    /// file at its full length and writes the header.
    pub(crate) fn create(
        path: PathBuf,
        specs: &[&TensorSpec],
        metadata: BTreeMap<String, String>,
    ) -> Result<Self> {
        let mut specs = specs.to_vec();
        specs.sort_by_key(|spec| std::cmp::Reverse(spec.dtype.bitsize()));
        let mut entries = Vec::with_capacity(specs.len());
        let mut start = 0usize;
        for spec in specs {
            let end = start
                .checked_add(spec.bytes()?)
                .ok_or_else(|| spec.refuse("the file's size overflows"))?;
            entries.push(Entry {
                name: spec.name.clone(),
                dtype: spec.dtype,
                shape: spec.shape.clone(),
                start,
                end,
            });
            start = end;
        }
        let header = Header {
            metadata,
            entries,
            data_start: 0,
        };
        let head = header.encode().ok_or_else(|| Error::Header {
            file: path.clone(),
            source: HeaderError::TooLarge {
                length: MAX_HEADER_BYTES + 1,
            },
        })?;

        let mut file = File::create(&path).map_err(Error::io("create", &path))?;
        file.write_all(&head).map_err(Error::io("write", &path))?;
        file.set_len((head.len() + start) as u64)
            .map_err(Error::io("extend", &path))?;
        Ok(Self {
            path,
            entries: header.entries,
            data_start: head.len(),
            dirty: 0,
            syncing: None,
        })
    }

    /// The tensors in the order of the file.
    pub(crate) fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// Writes entry `i` from its stored form; `destination` is what errors call the file.
    pub(crate) fn write_bytes(&mut self, i: usize, bytes: &[u8], destination: &Path) -> Result<()> {
        self.write_parts(i, [Ok::<_, Error>(bytes)], destination)
    }

    /// The same from its parts, one behind the other.
    pub(crate) fn write_parts<E: From<Error>>(
        &mut self,
        i: usize,
        parts: impl IntoIterator<Item = std::result::Result<impl AsRef<[u8]>, E>>,
        destination: &Path,
    ) -> std::result::Result<(), E> {
        let entry = self.entries[i].clone();
        let expected = entry.end - entry.start;
        let wrong = |found| Error::WrongLength {
            path: destination.to_path_buf(),
            tensor: entry.name.clone(),
            expected,
            found,
        };
        let mut sink = self.sink(i)?;
        let mut found = 0;
        for part in parts {
            let part = part?;
            let part = part.as_ref();
            found += part.len();
            // The next tensor begins there.
            if found > expected {
                return Err(wrong(found).into());
            }
            sink.write(part)?;
        }
        match found == expected {
            true => Ok(()),
            false => Err(wrong(found).into()),
        }
    }

    /// Writes entry `i` from a tensor of its shape, converting floats to its dtype.
    pub(crate) fn write_tensor(
        &mut self,
        i: usize,
        tensor: &Tensor,
        destination: &Path,
    ) -> Result<()> {
        let entry = &self.entries[i];
        if tensor.dims() != entry.shape {
            return Err(Error::WrongShape {
                file: destination.to_path_buf(),
                tensor: entry.name.clone(),
                expected: entry.shape.clone(),
                found: tensor.dims().to_vec(),
            });
        }
        let mut tensor = tensor
            .to_device(&Device::Cpu)
            .and_then(|tensor| tensor.contiguous())
            .map_err(Error::tensor(&entry.name))?;
        if !dtype::is_float(entry.dtype) {
            check_integer(entry, &tensor, destination)?;
            let bytes = View::data(&tensor);
            return self.write_bytes(i, &bytes, destination);
        }
        if tensor.dtype().is_int() {
            tensor = tensor
                .to_dtype(DType::F64)
                .map_err(Error::tensor(&entry.name))?;
        }
        let (storage, layout) = tensor.storage_and_layout();
        let elements = layout.start_offset()..layout.start_offset() + tensor.elem_count();
        match &*storage {
            Storage::Cpu(CpuStorage::F32(all)) => self.convert(i, &all[elements], destination),
            Storage::Cpu(CpuStorage::F16(all)) => self.convert(i, &all[elements], destination),
            Storage::Cpu(CpuStorage::BF16(all)) => self.convert(i, &all[elements], destination),
            Storage::Cpu(CpuStorage::F64(all)) => self.convert(i, &all[elements], destination),
            _ => Err(wrong_dtype(entry, tensor.dtype().as_str(), destination)),
        }
    }

    /// Forces everything to disk.
    pub(crate) fn sync(&mut self) -> Result<()> {
        self.wait_for_sync()?;
        File::options()
            .write(true)
            .open(&self.path)
            .and_then(|file| file.sync_all())
            .map_err(Error::io("sync", &self.path))
    }

    /// Forces what was written so far to disk, without waiting for it.
    fn start_sync(&mut self, file: &File) -> Result<()> {
        self.wait_for_sync()?;
        let thread = file.try_clone().and_then(|file| {
            let name = "tensor-io-sync".to_string();
            thread::Builder::new()
                .name(name)
                .spawn(move || file.sync_data())
        });
        self.syncing = Some(thread.map_err(Error::io("sync", &self.path))?);
        self.dirty = 0;
        Ok(())
    }

    fn wait_for_sync(&mut self) -> Result<()> {
        match self.syncing.take().map(JoinHandle::join) {
            None => Ok(()),
            Some(result) => result
                .expect("nothing in syncing a file panics")
                .map_err(Error::io("sync", &self.path)),
        }
    }

    fn convert<S: Float>(&mut self, i: usize, elements: &[S], destination: &Path) -> Result<()> {
        let entry = self.entries[i].clone();
        let mut sink = self.sink(i)?;
        let mut bytes = Vec::new();
        for (chunk, elements) in elements.chunks(CONVERT_ELEMENTS).enumerate() {
            bytes.clear();
            dtype::encode(elements, entry.dtype, &mut bytes).map_err(|mut bad| {
                bad.element += chunk * CONVERT_ELEMENTS;
                let dtype = dtype::candle_dtype(entry.dtype).unwrap_or(S::DTYPE);
                Error::bad_value(
                    destination.to_path_buf(),
                    &entry.name,
                    &entry.shape,
                    dtype,
                    bad,
                )
            })?;
            sink.write(&bytes)?;
        }
        Ok(())
    }

    /// The file, open at the place of entry `i`. Files are opened for each tensor, so that a checkpoint of any number of
    /// shards needs one file handle.
    fn sink(&mut self, i: usize) -> Result<Sink<'_>> {
        let offset = (self.data_start + self.entries[i].start) as u64;
        let mut file = File::options()
            .write(true)
            .open(&self.path)
            .map_err(Error::io("open", &self.path))?;
        file.seek(SeekFrom::Start(offset))
            .map_err(Error::io("seek in", &self.path))?;
        Ok(Sink { file, shard: self })
    }
}

struct Sink<'a> {
    file: File,
    shard: &'a mut ShardWriter,
}

impl Sink<'_> {
    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        for piece in bytes.chunks(WRITE_BYTES) {
            self.file
                .write_all(piece)
                .map_err(Error::io("write", &self.shard.path))?;
            self.shard.dirty += piece.len();
            if self.shard.dirty >= SYNC_BYTES {
                self.shard.start_sync(&self.file)?;
            }
        }
        Ok(())
    }
}

/// Integers and small floats are stored as they are; booleans are bytes of 0 and 1.
fn check_integer(entry: &Entry, tensor: &Tensor, destination: &Path) -> Result<()> {
    if dtype::candle_dtype(entry.dtype) != Some(tensor.dtype()) {
        return Err(wrong_dtype(entry, tensor.dtype().as_str(), destination));
    }
    if entry.dtype == Dtype::BOOL && View::data(tensor).iter().any(|&byte| byte > 1) {
        return Err(wrong_dtype(entry, "u8 with values above 1", destination));
    }
    Ok(())
}

fn wrong_dtype(entry: &Entry, found: &str, destination: &Path) -> Error {
    Error::WrongDtype {
        path: destination.to_path_buf(),
        tensor: entry.name.clone(),
        expected: entry.dtype,
        found: found.to_string(),
    }
}
