//! Reading a checkpoint.
//!
//! Opening reads headers and checks everything that can be checked without looking at weights; after that, a tensor's
//! bytes are read from the mapped file when they are asked for. What was read stays resident until it is released, so
//! whoever walks through a model block by block releases each block behind it.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use half::{bf16, f16};
use safetensors::Dtype;

use crate::config::Config;
use crate::dtype::{self, BadValue, Float};
use crate::error::{Error, Result};
use crate::folder;
use crate::header::Entry;
use crate::shard::{Shard, SharedBytes};
use crate::source::TensorSource;
use crate::spec::TensorSpec;

/// What is known of a tensor without reading it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Dtype as stored; of a source, after decoding.
    pub dtype: Dtype,
    /// Shape, outermost dimension first.
    pub shape: Vec<usize>,
    /// Size in this dtype, in bytes.
    pub bytes: usize,
    /// The file that holds it, counted in [`Checkpoint::shards`].
    pub shard: usize,
    /// First byte, counted from the end of the file's header.
    start: usize,
}

impl TensorInfo {
    /// Number of elements.
    pub fn elements(&self) -> usize {
        // Opening has checked that this does not overflow.
        self.shape.iter().product()
    }

    /// The dtype of the tensor that [`Checkpoint::tensor`] returns; None if candle has none for it and only the bytes
    /// can be had.
    pub fn candle_dtype(&self) -> Option<DType> {
        dtype::candle_dtype(self.dtype)
    }

    fn range(&self) -> Range<usize> {
        self.start..self.start + self.bytes
    }
}

/// A checkpoint open for reading: a folder in Hugging Face's layout, or a single safetensors file.
///
/// Files are memory-mapped and must not be changed in place while this is open; replacing them by renaming, as
/// [`CheckpointWriter`](crate::CheckpointWriter) does, is fine. Tensors can be read from several threads at once.
pub struct Checkpoint {
    /// The folder or file, for errors.
    path: PathBuf,
    dir: PathBuf,
    config: Config,
    shards: Vec<Shard>,
    shard_paths: Vec<PathBuf>,
    tensors: Vec<(String, TensorInfo)>,
    by_name: HashMap<String, usize>,
    files_to_carry: Vec<PathBuf>,
}

impl fmt::Debug for Checkpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Checkpoint")
            .field("path", &self.path)
            .field("shards", &self.shard_paths)
            .field("tensors", &self.tensors.len())
            .finish_non_exhaustive()
    }
}

impl Checkpoint {
    /// Opens a folder with `config.json` and weights: `model.safetensors`, shards with `model.safetensors.index.json`,
    /// or the same two as `pytorch_model.bin`.
    ///
    /// # Errors
    /// Anything malformed, inconsistent or unreadable, naming file and tensor; see [`Error`].
    pub fn open(dir: impl AsRef<Path>) -> Result<Self> {
        let dir = dir.as_ref();
        let metadata = dir.metadata().map_err(Error::io("open", dir))?;
        if !metadata.is_dir() {
            return Err(Error::NotAFolder {
                path: dir.to_path_buf(),
            });
        }
        let config = Config::read_folder(dir)?;
        let weights = folder::open_weights(dir)?;
        let carried = folder::files_to_carry(dir)?;
        Ok(Self::new(dir, dir, config, weights, carried))
    }

    /// Opens a single safetensors file, which has no configuration ([`Checkpoint::config`] is empty) and carries no
    /// other files.
    ///
    /// # Errors
    /// As [`Checkpoint::open`].
    pub fn open_file(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let shard = Shard::open_safetensors(path.to_path_buf())?;
        let dir = path.parent().unwrap_or(Path::new(""));
        Ok(Self::new(
            path,
            dir,
            Config::default(),
            vec![shard],
            Vec::new(),
        ))
    }

    /// A checkpoint of the tensors that `source` decodes, declared by `tensors`, with this configuration. `path` is the
    /// file or folder that it stands for: in errors, and as [`Checkpoint::dir`].
    ///
    /// # Errors
    /// [`Error::BadDeclaration`] for a tensor that is declared twice or whose size overflows.
    pub fn from_source(
        path: impl AsRef<Path>,
        config: Config,
        tensors: Vec<TensorSpec>,
        source: Box<dyn TensorSource>,
    ) -> Result<Self> {
        let path = path.as_ref();
        let mut names = HashSet::new();
        let mut entries = Vec::new();
        for spec in &tensors {
            if !names.insert(&spec.name) {
                return Err(spec.refuse("it is declared twice"));
            }
            entries.push(Entry {
                name: spec.name.clone(),
                dtype: spec.dtype,
                shape: spec.shape.clone(),
                start: 0,
                end: spec.bytes()?,
            });
        }
        let shard = Shard::of_source(path.to_path_buf(), source);
        let weights = vec![(shard, entries)];
        Ok(Self::new(path, path, config, weights, Vec::new()))
    }

    fn new(
        path: &Path,
        dir: &Path,
        config: Config,
        weights: Vec<(Shard, Vec<Entry>)>,
        files_to_carry: Vec<PathBuf>,
    ) -> Self {
        let mut shards = Vec::new();
        let mut tensors = Vec::new();
        for (shard, entries) in weights {
            for entry in entries {
                let info = TensorInfo {
                    dtype: entry.dtype,
                    shape: entry.shape,
                    bytes: entry.end - entry.start,
                    shard: shards.len(),
                    start: entry.start,
                };
                tensors.push((entry.name, info));
            }
            shards.push(shard);
        }
        let by_name = tensors
            .iter()
            .enumerate()
            .map(|(i, (name, _))| (name.clone(), i))
            .collect();
        Self {
            path: path.to_path_buf(),
            dir: dir.to_path_buf(),
            config,
            shard_paths: shards.iter().map(|shard| shard.path.clone()).collect(),
            shards,
            tensors,
            by_name,
            files_to_carry,
        }
    }

    /// The folder (for a single safetensors file: the one it lies in; for a source: what it stands for).
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The configuration, whole.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The files with weights.
    pub fn shards(&self) -> &[PathBuf] {
        &self.shard_paths
    }

    /// Free text in the header of the first file with weights.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        // A checkpoint has at least one shard unless its index is empty.
        static EMPTY: BTreeMap<String, String> = BTreeMap::new();
        self.shards.first().map_or(&EMPTY, |shard| &shard.metadata)
    }

    /// Tokenizer and generation files, for [`CheckpointWriter::carry_from`](crate::CheckpointWriter::carry_from).
    pub fn files_to_carry(&self) -> &[PathBuf] {
        &self.files_to_carry
    }

    /// Names of all tensors in the order of the files: shard by shard, by offset.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.iter().map(|(name, _)| name.as_str())
    }

    /// Whether there is a tensor of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.by_name.contains_key(name)
    }

    /// Dtype, shape and size of a tensor.
    ///
    /// # Errors
    /// [`Error::UnknownTensor`].
    pub fn info(&self, name: &str) -> Result<&TensorInfo> {
        match self.by_name.get(name) {
            Some(&i) => Ok(&self.tensors[i].1),
            None => Err(Error::UnknownTensor {
                file: self.path.clone(),
                tensor: name.to_string(),
            }),
        }
    }

    /// As [`Checkpoint::info`], for a tensor that must have the given shape.
    ///
    /// # Errors
    /// [`Error::UnknownTensor`], [`Error::WrongShape`].
    pub fn expect_shape(&self, name: &str, shape: &[usize]) -> Result<&TensorInfo> {
        let info = self.info(name)?;
        if info.shape == shape {
            Ok(info)
        } else {
            Err(Error::WrongShape {
                file: self.shard_paths[info.shard].clone(),
                tensor: name.to_string(),
                expected: shape.to_vec(),
                found: info.shape.clone(),
            })
        }
    }

    /// The bytes of a tensor as stored: little endian, row-major. Borrowed from the mapped file, except for pickles.
    ///
    /// # Errors
    /// [`Error::UnknownTensor`], [`Error::Pickle`].
    pub fn bytes(&self, name: &str) -> Result<Cow<'_, [u8]>> {
        let info = self.info(name)?;
        self.shards[info.shard].bytes(name, info.range())
    }

    /// The bytes of neighbouring rows as stored, all dimensions but the last counted as rows. They stay part of the mapped
    /// file, which lives as long as they do; of pickles and sources they are a copy.
    ///
    /// # Errors
    /// [`Error::UnknownTensor`], [`Error::UnknownRow`], [`Error::Pickle`], and what a source reports.
    pub fn shared_rows(&self, name: &str, rows: Range<usize>) -> Result<SharedBytes> {
        let info = self.info(name)?;
        let count = self.check_rows(name, info, &rows)?;
        if self.source().is_some() {
            return Ok(Arc::new(self.bytes_of_rows(name, info, rows)?.into_owned()));
        }
        let row_bytes = info.bytes.checked_div(count).unwrap_or(0);
        let part = rows.start * row_bytes..rows.end * row_bytes;
        self.shards[info.shard].shared(name, info.range(), part)
    }

    /// The bytes of neighbouring rows that exist. A source is asked for these alone.
    fn bytes_of_rows(
        &self,
        name: &str,
        info: &TensorInfo,
        rows: Range<usize>,
    ) -> Result<Cow<'_, [u8]>> {
        let columns = info.shape.last().copied().unwrap_or(1);
        let count = info.elements().checked_div(columns).unwrap_or(0);
        if let Some(source) = self.source()
            && rows != (0..count)
        {
            return source.row_range(name, rows);
        }
        let row_bytes = info.bytes.checked_div(count).unwrap_or(0);
        let part = rows.start * row_bytes..rows.end * row_bytes;
        Ok(match self.bytes(name)? {
            Cow::Borrowed(bytes) => Cow::Borrowed(&bytes[part]),
            Cow::Owned(bytes) if part == (0..bytes.len()) => Cow::Owned(bytes),
            Cow::Owned(bytes) => Cow::Owned(bytes[part].to_vec()),
        })
    }

    /// The number of rows, all dimensions but the last counted as such, if `rows` are among them.
    fn check_rows(&self, name: &str, info: &TensorInfo, rows: &Range<usize>) -> Result<usize> {
        let columns = info.shape.last().copied().unwrap_or(1);
        let count = info.elements().checked_div(columns).unwrap_or(0);
        if rows.end <= count && rows.start <= rows.end {
            return Ok(count);
        }
        Err(Error::UnknownRow {
            file: self.shard_paths[info.shard].clone(),
            tensor: name.to_string(),
            row: rows.end.saturating_sub(1),
            rows: count,
        })
    }

    /// Rows of a matrix as stored, one after the other: of an embedding, those of some tokens. Of several matrices in one
    /// tensor, all dimensions but the last count as rows.
    ///
    /// # Errors
    /// [`Error::UnknownTensor`], [`Error::UnknownRow`], [`Error::Pickle`], and what a source reports.
    pub fn rows(&self, name: &str, rows: &[usize]) -> Result<Vec<u8>> {
        let info = self.info(name)?;
        let count = match info.shape.as_slice() {
            [count] | [count, _] => *count,
            [.., columns] => info.elements().checked_div(*columns).unwrap_or(0),
            [] => 0,
        };
        if let Some(&row) = rows.iter().find(|&&row| row >= count) {
            return Err(Error::UnknownRow {
                file: self.shard_paths[info.shard].clone(),
                tensor: name.to_string(),
                row,
                rows: count,
            });
        }
        let row_bytes = info.bytes.checked_div(count).unwrap_or(0);
        self.shards[info.shard].rows(name, info.range(), row_bytes, rows)
    }

    /// The source of the tensors, if they are not in files of safetensors or PyTorch.
    pub fn source(&self) -> Option<&dyn TensorSource> {
        self.shards.first().and_then(Shard::source)
    }

    /// A tensor in its stored dtype (booleans as 0 and 1 in u8), floats checked to be finite.
    ///
    /// # Errors
    /// [`Error::UnknownTensor`], [`Error::NonFinite`], [`Error::UnsupportedDtype`], [`Error::Tensor`].
    pub fn tensor(&self, name: &str, device: &Device) -> Result<Tensor> {
        let info = self.info(name)?;
        let Some(dtype) = info.candle_dtype() else {
            return Err(self.unsupported(name, info, "any dtype"));
        };
        if dtype::is_float(info.dtype) {
            return self.tensor_as(name, dtype, device);
        }
        let bytes = self.bytes(name)?;
        if info.dtype == Dtype::F8_E4M3 {
            // This format has no infinities and one NaN of either sign.
            if let Some(element) = bytes.iter().position(|byte| byte & 0x7F == 0x7F) {
                let value = f64::NAN;
                return Err(self.bad_value(name, info, dtype, BadValue { element, value }));
            }
        }
        Tensor::from_raw_buffer(&bytes, dtype, &info.shape, device).map_err(Error::tensor(name))
    }

    /// A tensor converted to `dtype`: between floats with one rounding to nearest even, else as candle converts.
    ///
    /// Floats are converted in parallel, straight from the mapped bytes into the new tensor's memory.
    ///
    /// # Errors
    /// As [`Checkpoint::tensor`], and [`Error::TooLarge`] for a finite value that `dtype` cannot hold.
    pub fn tensor_as(&self, name: &str, dtype: DType, device: &Device) -> Result<Tensor> {
        let info = self.info(name)?;
        if !dtype::is_float(info.dtype) {
            let tensor = self.tensor(name, &Device::Cpu)?;
            return tensor
                .to_dtype(dtype)
                .and_then(|tensor| tensor.to_device(device))
                .map_err(Error::tensor(name));
        }
        match dtype {
            DType::F32 => self.decode::<f32>(name, info, device),
            DType::F16 => self.decode::<f16>(name, info, device),
            DType::BF16 => self.decode::<bf16>(name, info, device),
            DType::F64 => self.decode::<f64>(name, info, device),
            other => Err(self.unsupported(name, info, other.as_str())),
        }
    }

    /// Rows of a tensor of floats converted to `dtype`, as `[rows, columns]`. All dimensions but the last count as rows, so
    /// that one matrix of several is a range.
    ///
    /// # Errors
    /// As [`Checkpoint::tensor_as`], [`Error::UnknownRow`], and [`Error::UnsupportedDtype`] for a tensor without floats.
    pub fn rows_as(
        &self,
        name: &str,
        rows: Range<usize>,
        dtype: DType,
        device: &Device,
    ) -> Result<Tensor> {
        let info = self.info(name)?;
        if !dtype::is_float(info.dtype) {
            return Err(self.unsupported(name, info, "a float"));
        }
        self.check_rows(name, info, &rows)?;
        let columns = info.shape.last().copied().unwrap_or(1);
        match dtype {
            DType::F32 => self.decode_rows::<f32>(name, info, rows, columns, device),
            DType::F16 => self.decode_rows::<f16>(name, info, rows, columns, device),
            DType::BF16 => self.decode_rows::<bf16>(name, info, rows, columns, device),
            DType::F64 => self.decode_rows::<f64>(name, info, rows, columns, device),
            other => Err(self.unsupported(name, info, other.as_str())),
        }
    }

    /// The bytes of neighbouring rows as stored, all dimensions but the last counted as rows, floats checked to be finite: for
    /// copies of weights that nothing reads as numbers.
    ///
    /// # Errors
    /// [`Error::UnknownTensor`], [`Error::UnknownRow`], [`Error::NonFinite`], [`Error::Pickle`], and what a source reports.
    pub fn finite_rows(&self, name: &str, rows: Range<usize>) -> Result<Cow<'_, [u8]>> {
        let info = self.info(name)?;
        self.check_rows(name, info, &rows)?;
        let bytes = self.bytes_of_rows(name, info, rows.clone())?;
        if let Some(bad) = dtype::first_not_finite(info.dtype, &bytes) {
            let columns = info.shape.last().copied().unwrap_or(1);
            let element = rows.start * columns + bad.element;
            let dtype = info.candle_dtype().unwrap_or(DType::F32);
            return Err(self.bad_value(name, info, dtype, BadValue { element, ..bad }));
        }
        Ok(bytes)
    }

    /// Lets go of the memory behind these tensors: their bytes no longer count toward the resident memory of the
    /// process and are read from the file again when they are next asked for. Unknown names are passed over.
    pub fn release<'a>(&self, names: impl IntoIterator<Item = &'a str>) {
        for name in names {
            if let Ok(info) = self.info(name) {
                self.shards[info.shard].release(name, info.range());
            }
        }
    }

    /// As [`Checkpoint::release`], for rows of a tensor, all dimensions but the last counted as such: one matrix of several.
    /// Unknown names and rows are passed over.
    pub fn release_rows(&self, name: &str, rows: Range<usize>) {
        let Ok(info) = self.info(name) else { return };
        let Ok(count) = self.check_rows(name, info, &rows) else {
            return;
        };
        match self.source() {
            Some(source) => source.release_rows(name, rows),
            None => {
                let row_bytes = info.bytes.checked_div(count).unwrap_or(0);
                let first = info.range().start;
                let range = first + rows.start * row_bytes..first + rows.end * row_bytes;
                self.shards[info.shard].release(name, range);
            }
        }
    }

    /// Size of all tensors as stored, in bytes; of a source, before decoding.
    pub fn total_bytes(&self) -> u64 {
        if let Some(source) = self.source() {
            return source.total_bytes();
        }
        self.tensors.iter().map(|(_, info)| info.bytes as u64).sum()
    }

    /// Number of elements of all tensors.
    pub fn parameters(&self) -> u64 {
        self.tensors
            .iter()
            .map(|(_, info)| info.elements() as u64)
            .sum()
    }

    fn decode<T: Float>(&self, name: &str, info: &TensorInfo, device: &Device) -> Result<Tensor> {
        let bytes = self.bytes(name)?;
        let elements = dtype::decode::<T>(info.dtype, &bytes)
            .map_err(|bad| self.bad_value(name, info, T::DTYPE, bad))?;
        Tensor::from_vec(elements, info.shape.as_slice(), device).map_err(Error::tensor(name))
    }

    fn decode_rows<T: Float>(
        &self,
        name: &str,
        info: &TensorInfo,
        rows: Range<usize>,
        columns: usize,
        device: &Device,
    ) -> Result<Tensor> {
        let first = rows.start;
        let bytes = self.bytes_of_rows(name, info, rows.clone())?;
        let elements = dtype::decode::<T>(info.dtype, &bytes).map_err(|bad| {
            let element = first * columns + bad.element;
            self.bad_value(name, info, T::DTYPE, BadValue { element, ..bad })
        })?;
        Tensor::from_vec(elements, (rows.len(), columns), device).map_err(Error::tensor(name))
    }

    fn unsupported(&self, name: &str, info: &TensorInfo, wanted: &'static str) -> Error {
        Error::UnsupportedDtype {
            file: self.shard_paths[info.shard].clone(),
            tensor: name.to_string(),
            dtype: info.dtype,
            wanted,
        }
    }

    fn bad_value(&self, name: &str, info: &TensorInfo, dtype: DType, bad: BadValue) -> Error {
        let file = self.shard_paths[info.shard].clone();
        Error::bad_value(file, name, &info.shape, dtype, bad)
    }
}
