//! Everything that can go wrong with a checkpoint.
//!
//! One enum for the crate: each case names the file and the tensor, key or option at fault and says what was expected.
//! The formats that can be read from bytes alone (the header of a safetensors file, the index of a sharded checkpoint,
//! GGUF) have an error of their own, which [`Error`] wraps with the file.

use std::io;
use std::path::{Path, PathBuf};

use candle_core::DType;
use safetensors::Dtype;

use crate::dtype::BadValue;
use crate::gguf::GgufError;
use crate::header::HeaderError;
use crate::index::IndexError;

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What was wrong with a checkpoint, a configuration or a request.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused: no such file, no permission, disk full.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried: "open", "write", ...
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// A checkpoint folder was expected.
    #[error("{} is not a folder; expected a checkpoint folder with config.json and model.safetensors", path.display())]
    NotAFolder {
        /// What was given.
        path: PathBuf,
    },
    /// A folder without weights in a known layout.
    #[error(
        "{} holds no weights: expected model.safetensors, model.safetensors.index.json, pytorch_model.bin or pytorch_model.bin.index.json",
        dir.display()
    )]
    NoWeights {
        /// The folder.
        dir: PathBuf,
    },
    /// A folder without `config.json`.
    #[error("{} holds no config.json", dir.display())]
    MissingConfig {
        /// The folder.
        dir: PathBuf,
    },
    /// `config.json` is not JSON.
    #[error("{}: not valid JSON: {source}", path.display())]
    ConfigJson {
        /// The file.
        path: PathBuf,
        /// Where and why the parser stopped.
        source: serde_json::Error,
    },
    /// `config.json` is JSON, but not an object.
    #[error("{}: expected a JSON object, found {found}", path.display())]
    ConfigNotObject {
        /// The file.
        path: PathBuf,
        /// The kind of JSON value found.
        found: &'static str,
    },
    /// A configuration field is absent or of another kind.
    #[error("{origin}: field `{key}`: expected {expected}, found {found}")]
    ConfigField {
        /// The file, or "config" for one that was never read from a file.
        origin: String,
        /// The field, dotted when nested.
        key: String,
        /// The kind asked for.
        expected: &'static str,
        /// What stands there.
        found: String,
    },
    /// The header of a safetensors file is malformed.
    #[error("{}: {source}", file.display())]
    Header {
        /// The safetensors file.
        file: PathBuf,
        /// The fault, with the tensor's name where one is to blame.
        source: HeaderError,
    },
    /// A GGUF file is malformed or not what it should be.
    #[error("{}: {source}", file.display())]
    Gguf {
        /// The GGUF file.
        file: PathBuf,
        /// The fault, with the key or tensor where one is to blame.
        source: GgufError,
    },
    /// A tensor cannot be decoded from the form that it is stored in.
    #[error("{}: tensor `{tensor}`: {reason}", file.display())]
    Decode {
        /// The file.
        file: PathBuf,
        /// The tensor, by its name in the file.
        tensor: String,
        /// Why not, with row and block where they are to blame.
        reason: String,
    },
    /// Files that a folder would need cannot be made from this source.
    #[error("{}: {reason}", file.display())]
    Unavailable {
        /// The source's file.
        file: PathBuf,
        /// What cannot be made and why.
        reason: String,
    },
    /// An importance matrix is malformed.
    #[error("{}: importance matrix: {reason}", file.display())]
    Imatrix {
        /// The file.
        file: PathBuf,
        /// The fault, with the entry where one is to blame.
        reason: String,
    },
    /// The index of a sharded checkpoint is malformed.
    #[error("{}: {source}", file.display())]
    Index {
        /// The index file.
        file: PathBuf,
        /// The fault.
        source: IndexError,
    },
    /// The index names a shard that does not exist.
    #[error("{}: names the shard {shard}, which does not exist", index.display())]
    MissingShard {
        /// The index file.
        index: PathBuf,
        /// The shard's file name.
        shard: String,
    },
    /// The index places a tensor in a shard that does not hold it.
    #[error("{}: places tensor `{tensor}` in {shard}, which does not hold it", index.display())]
    NotInShard {
        /// The index file.
        index: PathBuf,
        /// The tensor.
        tensor: String,
        /// The shard's file name.
        shard: String,
    },
    /// A shard holds a tensor that the index does not list.
    #[error("{}: holds tensor `{tensor}`, which {} does not list", shard.display(), index.display())]
    NotInIndex {
        /// The index file.
        index: PathBuf,
        /// The tensor.
        tensor: String,
        /// The shard.
        shard: PathBuf,
    },
    /// A shard holds a tensor that the index places elsewhere.
    #[error("{}: holds tensor `{tensor}`, which {} places in {indexed}", shard.display(), index.display())]
    Misplaced {
        /// The index file.
        index: PathBuf,
        /// The tensor.
        tensor: String,
        /// The shard that holds it.
        shard: PathBuf,
        /// The shard that the index names.
        indexed: String,
    },
    /// Two shards hold a tensor of the same name.
    #[error("tensor `{tensor}` is in both {} and {}", first.display(), second.display())]
    DuplicateTensor {
        /// The tensor.
        tensor: String,
        /// One shard.
        first: PathBuf,
        /// The other.
        second: PathBuf,
    },
    /// No tensor of this name.
    #[error("{}: no tensor `{tensor}`", file.display())]
    UnknownTensor {
        /// The checkpoint folder or file.
        file: PathBuf,
        /// The name asked for.
        tensor: String,
    },
    /// A row that a matrix does not have.
    #[error("{}: tensor `{tensor}`: no row {row}, it has {rows}", file.display())]
    UnknownRow {
        /// The file.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// The row asked for.
        row: usize,
        /// Its number of rows.
        rows: usize,
    },
    /// The dtype has no tensor form here; the raw bytes can still be read and written.
    #[error("{}: tensor `{tensor}`: dtype {dtype} cannot become a tensor of {wanted}", file.display())]
    UnsupportedDtype {
        /// The file.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// The stored dtype.
        dtype: Dtype,
        /// What was asked for.
        wanted: &'static str,
    },
    /// A tensor has another shape than the caller needs.
    #[error("{}: tensor `{tensor}`: expected shape {expected:?}, found {found:?}", file.display())]
    WrongShape {
        /// The file.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// The shape needed.
        expected: Vec<usize>,
        /// The shape found.
        found: Vec<usize>,
    },
    /// A NaN or an infinity among the weights.
    #[error("{}: tensor `{tensor}`: {value} at {index:?} (element {element}); expected finite values", file.display())]
    NonFinite {
        /// The file.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// Position in row-major order.
        element: usize,
        /// The same position, one index per dimension.
        index: Vec<usize>,
        /// NaN or ±∞.
        value: f64,
    },
    /// A finite value that the target dtype rounds to infinity.
    #[error("{}: tensor `{tensor}`: {value:e} at {index:?} (element {element}) is too large for {dtype:?}", file.display())]
    TooLarge {
        /// The file.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// Position in row-major order.
        element: usize,
        /// The same position, one index per dimension.
        index: Vec<usize>,
        /// The value as stored.
        value: f64,
        /// The dtype it was to be converted to.
        dtype: DType,
    },
    /// A PyTorch pickle that cannot be read.
    #[error(
        "{}: cannot read this PyTorch file: {reason}; convert it in Python: \
         AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR)",
        file.display()
    )]
    Pickle {
        /// The `.bin` file.
        file: PathBuf,
        /// Why.
        reason: String,
    },
    /// candle refused an operation, for instance a copy to a device.
    #[error("tensor `{tensor}`: {source}")]
    Tensor {
        /// The tensor.
        tensor: String,
        /// candle's reason.
        source: candle_core::Error,
    },
    /// The destination exists and overwriting was not asked for.
    #[error("{} exists already and overwriting was not asked for", path.display())]
    Exists {
        /// The destination.
        path: PathBuf,
    },
    /// The destination is replaced only where it is a folder of the kind that is written.
    #[error("{} will not be overwritten: it holds other files and no {marker}", path.display())]
    NotReplaceable {
        /// The destination.
        path: PathBuf,
        /// The file that a folder of this kind holds.
        marker: &'static str,
    },
    /// Another process, or another writer of this one, is writing the same destination.
    #[error("{} is being written by another writer (lock file {})", path.display(), lock.display())]
    Busy {
        /// The destination.
        path: PathBuf,
        /// The lock file that the other writer holds.
        lock: PathBuf,
    },
    /// A file name that is not a plain name inside the folder, or that the writer needs itself.
    #[error("cannot write a file named `{name}`: {reason}")]
    FileName {
        /// The name.
        name: String,
        /// Why not.
        reason: &'static str,
    },
    /// A tensor declaration that cannot be written.
    #[error("tensor `{tensor}` cannot be declared: {reason}")]
    BadDeclaration {
        /// The tensor.
        tensor: String,
        /// Why not.
        reason: &'static str,
    },
    /// A tensor was written that was never declared.
    #[error("tensor `{tensor}` was not declared to the writer of {}", path.display())]
    NotDeclared {
        /// The destination.
        path: PathBuf,
        /// The tensor.
        tensor: String,
    },
    /// A tensor was written before its turn, to a file that is written in order.
    #[error("tensor `{tensor}` was written to {} out of order: `{expected}` comes first", path.display())]
    OutOfOrder {
        /// The destination.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// The next tensor in order.
        expected: String,
    },
    /// A tensor was written twice.
    #[error("tensor `{tensor}` was written to {} twice", path.display())]
    WrittenTwice {
        /// The destination.
        path: PathBuf,
        /// The tensor.
        tensor: String,
    },
    /// The writer was finished before all declared tensors were written.
    #[error("{}: declared but not written: {}", path.display(), tensors.join(", "))]
    NotWritten {
        /// The destination.
        path: PathBuf,
        /// The missing tensors, in declared order.
        tensors: Vec<String>,
    },
    /// The bytes do not fill the declared tensor.
    #[error("{}: tensor `{tensor}`: expected {expected} bytes, found {found}", path.display())]
    WrongLength {
        /// The destination.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Bytes of the declared shape and dtype.
        expected: usize,
        /// Bytes given.
        found: usize,
    },
    /// A file does not hold what was written to it.
    #[error(
        "{}: the checksum is {found}, and {} was written: the file is damaged; delete it to make it again", path.display(),
        expected.as_deref().unwrap_or("none")
    )]
    Checksum {
        /// The file.
        path: PathBuf,
        /// The checksum in the file.
        expected: Option<String>,
        /// That of its contents.
        found: String,
    },
    /// A tensor that does not read back as it was written; the file was not kept.
    #[error("{}: tensor `{tensor}` does not read back as it was written", path.display())]
    ReadBack {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
    },
    /// The tensor cannot be converted to the declared dtype.
    #[error("{}: tensor `{tensor}`: declared as {expected}, cannot be written from {found}", path.display())]
    WrongDtype {
        /// The destination.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// The declared dtype.
        expected: Dtype,
        /// The dtype given.
        found: String,
    },
}

impl Error {
    /// Wraps an error of the operating system with what was tried on which path.
    pub fn io(action: &'static str, path: impl AsRef<Path>) -> impl FnOnce(io::Error) -> Self {
        let path = path.as_ref().to_path_buf();
        move |source| Self::Io {
            action,
            path,
            source,
        }
    }

    /// Wraps an error of candle with the tensor's name.
    pub(crate) fn tensor(name: &str) -> impl FnOnce(candle_core::Error) -> Self {
        move |source| Self::Tensor {
            tensor: name.to_string(),
            source,
        }
    }
}

impl Error {
    /// A value that a tensor of weights, of this shape and converted to `dtype`, must not hold.
    pub(crate) fn bad_value(
        file: PathBuf,
        tensor: &str,
        shape: &[usize],
        dtype: DType,
        bad: BadValue,
    ) -> Self {
        let BadValue { element, value } = bad;
        let tensor = tensor.to_string();
        let index = unravel(element, shape);
        if value.is_finite() {
            Self::TooLarge {
                file,
                tensor,
                element,
                index,
                value,
                dtype,
            }
        } else {
            Self::NonFinite {
                file,
                tensor,
                element,
                index,
                value,
            }
        }
    }
}

/// The row-major position `element` as one index per dimension.
fn unravel(element: usize, shape: &[usize]) -> Vec<usize> {
    let mut rest = element;
    let mut index: Vec<usize> = shape
        .iter()
        .rev()
        .map(|&dim| {
            let i = rest % dim;
            rest /= dim;
            i
        })
        .collect();
    index.reverse();
    index
}
