//! Reading a file, or all files of a split model.

use std::collections::HashMap;
use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use safetensors::Dtype;

use super::header::Header;
use super::{BlockLayout, GgufError, Metadata};
use crate::dtype;
use crate::error::{Error, Result};
use crate::hash::{ContentHash, Hasher};
use crate::map::{MappedFile, SharedPart};
use crate::shard::{SharedBytes, open_regular};

const SPLIT_NUMBER: &str = "split.no";
const SPLIT_COUNT: &str = "split.count";
const SPLIT_TENSORS: &str = "split.tensors.count";
/// Most parts of a split model: file names count them with five digits.
const MAX_PARTS: u64 = 99_999;

/// What is known of a tensor without reading it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Name in the file.
    pub name: String,
    /// How its values are stored.
    pub layout: BlockLayout,
    /// Shape, outermost dimension first: a linear is `[out, in]`.
    pub shape: Vec<usize>,
    /// Size as stored, in bytes.
    pub bytes: usize,
    /// The file that holds it, counted in [`Gguf::parts`].
    pub part: usize,
    /// First byte, counted from the start of the file.
    start: usize,
}

impl TensorInfo {
    /// Number of elements.
    pub fn elements(&self) -> usize {
        // Opening has checked that this does not overflow.
        self.shape.iter().product()
    }

    /// Values in a row: the last dimension.
    pub fn width(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }

    /// Bytes of a row.
    pub fn row_bytes(&self) -> usize {
        // Opening has checked that rows are whole blocks.
        self.width() / self.layout.values * self.layout.bytes
    }

    fn range(&self) -> Range<usize> {
        self.start..self.start + self.bytes
    }
}

/// A GGUF file open for reading; a split model is one of these, whichever of its files is named.
///
/// Files are memory-mapped and must not be changed in place while this is open. Tensors can be read from several threads
/// at once.
pub struct Gguf {
    path: PathBuf,
    parts: Vec<Part>,
    tensors: Vec<TensorInfo>,
    by_name: HashMap<String, usize>,
}

struct Part {
    path: PathBuf,
    content: Content,
    header: Header,
}

enum Content {
    Mapped(Arc<MappedFile>),
    Bytes(Arc<Vec<u8>>),
}

impl fmt::Debug for Gguf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Gguf")
            .field("path", &self.path)
            .field("parts", &self.parts.len())
            .field("tensors", &self.tensors.len())
            .finish_non_exhaustive()
    }
}

impl Content {
    fn bytes(&self) -> &[u8] {
        match self {
            Self::Mapped(map) => map,
            Self::Bytes(bytes) => bytes,
        }
    }
}

impl Part {
    fn open(path: PathBuf) -> Result<Self> {
        let file = open_regular(&path).map_err(Error::io("open", &path))?;
        let map = MappedFile::new(&file).map_err(Error::io("map", &path))?;
        Self::new(path, Content::Mapped(Arc::new(map)))
    }

    fn new(path: PathBuf, content: Content) -> Result<Self> {
        let header = Header::parse(content.bytes()).map_err(|source| Error::Gguf {
            file: path.clone(),
            source,
        })?;
        Ok(Self {
            path,
            content,
            header,
        })
    }

    fn metadata(&self) -> Metadata<'_> {
        Metadata {
            path: &self.path,
            file: self.content.bytes(),
            header: &self.header,
        }
    }
}

impl Gguf {
    /// Opens a file; for any part of a split model, all parts, which lie in one folder.
    ///
    /// # Errors
    /// [`Error::Io`], and [`Error::Gguf`] for anything malformed, truncated or inconsistent.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let part = Part::open(path.to_path_buf())?;
        let metadata = part.metadata();
        let count = metadata.get_u64(SPLIT_COUNT)?.unwrap_or(1);
        if count <= 1 {
            return Self::new(path, vec![part]);
        }
        let number = metadata.required(SPLIT_NUMBER, Metadata::get_u64)?;
        if count > MAX_PARTS || number >= count {
            return Err(metadata.error(GgufError::Value {
                key: SPLIT_NUMBER.to_string(),
                expected: format!("a number below {SPLIT_COUNT}, and that at most {MAX_PARTS}"),
                found: format!("{number} of {count}"),
            }));
        }
        let siblings = siblings(path, number, count).ok_or_else(|| {
            metadata.error(GgufError::SplitName {
                number: number + 1,
                count,
            })
        })?;
        let mut parts = Vec::new();
        for (at, sibling) in (0..count).zip(siblings) {
            if at != number && !sibling.exists() {
                return Err(metadata.error(GgufError::MissingPart {
                    path: sibling,
                    number: at + 1,
                    count,
                }));
            }
            let part = Part::open(sibling)?;
            let metadata = part.metadata();
            for (key, expected) in [(SPLIT_COUNT, count), (SPLIT_NUMBER, at)] {
                let found = metadata.required(key, Metadata::get_u64)?;
                if found != expected {
                    return Err(metadata.error(GgufError::Split {
                        key,
                        found: found.to_string(),
                        expected,
                    }));
                }
            }
            parts.push(part);
        }
        let whole = Self::new(path, parts)?;
        let metadata = whole.metadata();
        let declared = metadata.required(SPLIT_TENSORS, Metadata::get_u64)?;
        if declared != whole.tensors.len() as u64 {
            return Err(metadata.error(GgufError::Split {
                key: SPLIT_TENSORS,
                found: declared.to_string(),
                expected: whole.tensors.len() as u64,
            }));
        }
        Ok(whole)
    }

    /// Opens a file by itself, also where it is a part of a split model.
    pub(super) fn open_part(path: &Path) -> Result<Self> {
        Self::new(path, vec![Part::open(path.to_path_buf())?])
    }

    /// Reads a file that is in memory; `name` stands for it in errors.
    ///
    /// # Errors
    /// As [`Gguf::open`].
    pub fn from_bytes(name: impl Into<PathBuf>, bytes: Vec<u8>) -> Result<Self> {
        let path = name.into();
        let part = Part::new(path.clone(), Content::Bytes(Arc::new(bytes)))?;
        Self::new(&path, vec![part])
    }

    fn new(path: &Path, parts: Vec<Part>) -> Result<Self> {
        let mut tensors: Vec<TensorInfo> = Vec::new();
        let mut by_name = HashMap::new();
        for (number, part) in parts.iter().enumerate() {
            for tensor in &part.header.tensors {
                if let Some(other) = by_name.insert(tensor.name.clone(), tensors.len()) {
                    return Err(Error::DuplicateTensor {
                        tensor: tensor.name.clone(),
                        first: parts[tensors[other].part].path.clone(),
                        second: part.path.clone(),
                    });
                }
                tensors.push(TensorInfo {
                    name: tensor.name.clone(),
                    layout: tensor.layout,
                    shape: tensor.shape.clone(),
                    bytes: tensor.bytes,
                    part: number,
                    start: part.header.data_start + tensor.start,
                });
            }
        }
        Ok(Self {
            path: path.to_path_buf(),
            parts,
            tensors,
            by_name,
        })
    }

    /// The file that was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// All files of the model.
    pub fn parts(&self) -> impl Iterator<Item = &Path> {
        self.parts.iter().map(|part| part.path.as_path())
    }

    /// Version of the format.
    pub fn version(&self) -> u32 {
        self.parts[0].header.version
    }

    /// Keys and values, of the first part.
    pub fn metadata(&self) -> Metadata<'_> {
        self.parts[0].metadata()
    }

    /// All tensors in the order of the files.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    /// Whether there is a tensor of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.by_name.contains_key(name)
    }

    /// Type, shape and size of a tensor.
    ///
    /// # Errors
    /// [`Error::UnknownTensor`].
    pub fn info(&self, name: &str) -> Result<&TensorInfo> {
        match self.by_name.get(name) {
            Some(&at) => Ok(&self.tensors[at]),
            None => Err(Error::UnknownTensor {
                file: self.path.clone(),
                tensor: name.to_string(),
            }),
        }
    }

    /// As [`Gguf::info`], for a tensor that must have the given shape.
    ///
    /// # Errors
    /// [`Error::UnknownTensor`], [`Error::WrongShape`].
    pub fn expect_shape(&self, name: &str, shape: &[usize]) -> Result<&TensorInfo> {
        let info = self.info(name)?;
        if info.shape == shape {
            return Ok(info);
        }
        Err(Error::WrongShape {
            file: self.parts[info.part].path.clone(),
            tensor: name.to_string(),
            expected: shape.to_vec(),
            found: info.shape.clone(),
        })
    }

    /// The bytes of a tensor as stored: rows of blocks.
    ///
    /// # Errors
    /// [`Error::UnknownTensor`].
    pub fn bytes(&self, name: &str) -> Result<&[u8]> {
        let info = self.info(name)?;
        Ok(&self.parts[info.part].content.bytes()[info.range()])
    }

    /// Part of the bytes of a tensor, counted from its first. They stay part of the mapped file, which lives as long as they
    /// do.
    ///
    /// # Errors
    /// [`Error::UnknownTensor`]; [`GgufError::Content`] for a part that the tensor does not have.
    pub fn shared_bytes(&self, name: &str, part: Range<usize>) -> Result<SharedBytes> {
        let info = self.info(name)?;
        if part.start > part.end || part.end > info.bytes {
            let what = format!(
                "tensor `{name}` of {} bytes has no part {part:?}",
                info.bytes
            );
            return Err(self.error(info, GgufError::Content(what)));
        }
        let range = info.start + part.start..info.start + part.end;
        Ok(match &self.parts[info.part].content {
            Content::Mapped(file) => Arc::new(SharedPart {
                whole: Arc::clone(file),
                range,
            }),
            Content::Bytes(bytes) => Arc::new(SharedPart {
                whole: Arc::clone(bytes),
                range,
            }),
        })
    }

    /// The values of a tensor of plain floats, widened or narrowed to f32 and checked to be finite.
    ///
    /// # Errors
    /// [`Error::UnknownTensor`], [`GgufError::WrongType`] for blocks and integers, [`Error::NonFinite`],
    /// [`Error::TooLarge`].
    pub fn floats(&self, name: &str) -> Result<Vec<f32>> {
        let info = self.info(name)?;
        let bytes = self.bytes(name)?;
        let Some(stored) = float_dtype(info.layout) else {
            return Err(self.error(
                info,
                GgufError::WrongType {
                    tensor: name.to_string(),
                    found: info.layout.name,
                    expected: "F32, F16, BF16 or F64",
                },
            ));
        };
        dtype::decode::<f32>(stored, bytes).map_err(|bad| {
            let file = self.parts[info.part].path.clone();
            Error::bad_value(file, name, &info.shape, candle_core::DType::F32, bad)
        })
    }

    /// Lets go of the memory behind these tensors, which is read from the file again when they are next asked for.
    /// Unknown names are passed over.
    pub fn release<'a>(&self, names: impl IntoIterator<Item = &'a str>) {
        for name in names {
            if let Ok(info) = self.info(name)
                && let Content::Mapped(map) = &self.parts[info.part].content
            {
                map.release(info.range());
            }
        }
    }

    /// As [`Gguf::release`], for neighbouring rows of a tensor, all dimensions but the last counted as such. Unknown names and rows
    /// are passed over.
    pub fn release_rows(&self, name: &str, rows: Range<usize>) {
        let Ok(info) = self.info(name) else { return };
        let Content::Mapped(map) = &self.parts[info.part].content else {
            return;
        };
        let row_bytes = info.row_bytes();
        let count = info.bytes.checked_div(row_bytes).unwrap_or(0);
        if rows.start <= rows.end && rows.end <= count {
            let first = info.range().start;
            map.release(first + rows.start * row_bytes..first + rows.end * row_bytes);
        }
    }

    /// Size of all tensors as stored, in bytes.
    pub fn total_bytes(&self) -> u64 {
        self.tensors.iter().map(|info| info.bytes as u64).sum()
    }

    /// Number of elements of all tensors.
    pub fn parameters(&self) -> u64 {
        self.tensors.iter().map(|info| info.elements() as u64).sum()
    }

    /// Hash of the weights: names, types, shapes and all bytes of all tensors in the order of their names.
    ///
    /// # Errors
    /// Those of [`Gguf::bytes`].
    pub fn content_hash(&self) -> Result<ContentHash> {
        let mut sorted: Vec<&TensorInfo> = self.tensors.iter().collect();
        sorted.sort_by(|a, b| a.name.cmp(&b.name));
        let mut hasher = Hasher::new();
        for info in sorted {
            hasher
                .part(info.name.as_bytes())
                .part(format!("{} {:?}", info.layout.name, info.shape).as_bytes())
                .part(self.bytes(&info.name)?);
            self.release([info.name.as_str()]);
        }
        Ok(hasher.finish())
    }

    fn error(&self, info: &TensorInfo, source: GgufError) -> Error {
        Error::Gguf {
            file: self.parts[info.part].path.clone(),
            source,
        }
    }
}

/// The dtype of a type of plain floats.
fn float_dtype(layout: BlockLayout) -> Option<Dtype> {
    match layout.name {
        "F32" => Some(Dtype::F32),
        "F16" => Some(Dtype::F16),
        "BF16" => Some(Dtype::BF16),
        "F64" => Some(Dtype::F64),
        _ => None,
    }
}

/// The names of all parts, of which `path` is number `number` (from 0); `None` if it is not named like a part.
fn siblings(path: &Path, number: u64, count: u64) -> Option<impl Iterator<Item = PathBuf>> {
    let name = path.file_name()?.to_str()?;
    let part = move |number: u64| format!("-{:05}-of-{count:05}.gguf", number + 1);
    let prefix = name.strip_suffix(&part(number))?.to_string();
    let folder = path.parent().unwrap_or(Path::new("")).to_path_buf();
    Some((0..count).map(move |at| folder.join(format!("{prefix}{}", part(at)))))
}
