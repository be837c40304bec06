//! What can be wrong with a GGUF file.

use std::path::PathBuf;

use super::{MAX_ALIGNMENT, MAX_DIMS};

/// What was wrong with a GGUF file, naming the key or tensor; [`Error::Gguf`](crate::Error::Gguf) adds the file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GgufError {
    /// Not even a magic number and a version.
    #[error("{found} bytes are too few for a GGUF file")]
    TooShort {
        /// Length of the file.
        found: u64,
    },
    /// Another magic number.
    #[error("not a GGUF file: it begins with \"{found}\", expected \"GGUF\"")]
    Magic {
        /// The first four bytes, escaped.
        found: String,
    },
    /// A version that is not read.
    #[error("GGUF version {found} is not supported; expected 2 or 3")]
    Version {
        /// The version.
        found: u32,
    },
    /// The bytes of the version are swapped.
    #[error("a big-endian GGUF file, which is not supported; expected little endian")]
    BigEndian,
    /// More entries than the rest of the file could hold.
    #[error(
        "{count} {what} do not fit in the {left} bytes that follow; the file is damaged or truncated"
    )]
    Count {
        /// "metadata keys" or "tensors".
        what: &'static str,
        /// The declared number.
        count: u64,
        /// Bytes left.
        left: u64,
    },
    /// The file ends inside its header.
    #[error(
        "{what} needs {needed} bytes at offset {offset}, found {left}; the file is damaged or truncated"
    )]
    Ended {
        /// What was being read.
        what: String,
        /// Where.
        offset: u64,
        /// Bytes needed.
        needed: u64,
        /// Bytes left.
        left: u64,
    },
    /// A key that is empty, too long or not UTF-8.
    #[error("metadata key number {index}: {reason}")]
    BadKey {
        /// Counted from 0.
        index: u64,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A key stands twice.
    #[error("metadata key `{key}` is in the file twice")]
    DuplicateKey {
        /// The key.
        key: String,
    },
    /// A value type that the format does not know.
    #[error("metadata key `{key}`: unknown value type {id}")]
    UnknownValueType {
        /// The key.
        key: String,
        /// The type's id.
        id: u32,
    },
    /// An array of arrays.
    #[error("metadata key `{key}`: arrays in arrays are not supported")]
    NestedArray {
        /// The key.
        key: String,
    },
    /// An array whose size cannot be counted.
    #[error("metadata key `{key}`: an array of {count} elements overflows")]
    ArrayOverflow {
        /// The key.
        key: String,
        /// Declared number of elements.
        count: u64,
    },
    /// A boolean other than 0 and 1.
    #[error("metadata key `{key}`: expected a boolean as 0 or 1, found {found}")]
    BadBool {
        /// The key.
        key: String,
        /// The byte.
        found: u8,
    },
    /// An alignment that is no power of two up to [`MAX_ALIGNMENT`], or no u32.
    #[error("general.alignment: expected a u32 power of two up to {MAX_ALIGNMENT}, found {found}")]
    Alignment {
        /// The value and its type.
        found: String,
    },
    /// A tensor name that is empty, too long or not UTF-8.
    #[error("tensor number {index}: {reason}")]
    BadName {
        /// Counted from 0.
        index: u64,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A tensor name stands twice.
    #[error("tensor `{tensor}` is in the file twice")]
    DuplicateTensor {
        /// The tensor.
        tensor: String,
    },
    /// No dimensions, or too many.
    #[error("tensor `{tensor}`: {found} dimensions, expected 1 to {MAX_DIMS}")]
    Dimensions {
        /// The tensor.
        tensor: String,
        /// The declared number.
        found: u32,
    },
    /// A dimension of 0, or more elements or bytes than can be counted.
    #[error("tensor `{tensor}`: shape {shape:?} {reason}")]
    Shape {
        /// The tensor.
        tensor: String,
        /// Its shape, outermost dimension first.
        shape: Vec<u64>,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A type that no file may hold.
    #[error("tensor `{tensor}`: type {id} {reason}")]
    Type {
        /// The tensor.
        tensor: String,
        /// The type's id.
        id: u32,
        /// Why not.
        reason: &'static str,
    },
    /// Rows that are not whole blocks.
    #[error(
        "tensor `{tensor}`: rows of {width} values are no multiple of the {block} in a block of {type_name}"
    )]
    PartialBlock {
        /// The tensor.
        tensor: String,
        /// Values in a row.
        width: u64,
        /// Values in a block.
        block: usize,
        /// The type.
        type_name: &'static str,
    },
    /// An offset that is no multiple of the alignment.
    #[error("tensor `{tensor}`: offset {offset} is no multiple of the alignment {alignment}")]
    Misaligned {
        /// The tensor.
        tensor: String,
        /// Its offset in the data.
        offset: u64,
        /// The alignment.
        alignment: u32,
    },
    /// A tensor begins before the one in front of it ends.
    #[error("tensor `{tensor}` begins at {start}, inside `{other}`, which ends at {other_end}")]
    Overlap {
        /// The tensor.
        tensor: String,
        /// Its offset in the data.
        start: u64,
        /// The tensor in front of it.
        other: String,
        /// Where that one ends.
        other_end: u64,
    },
    /// The file ends before a tensor does.
    #[error(
        "tensor `{tensor}`: the file ends {missing} bytes before it does; a truncated download?"
    )]
    Truncated {
        /// The first such tensor, by offset.
        tensor: String,
        /// Bytes of it that are missing.
        missing: u64,
    },
    /// A key that is needed is absent.
    #[error("metadata key `{key}` is missing")]
    MissingKey {
        /// The key.
        key: String,
    },
    /// A value of another kind than needed.
    #[error("metadata key `{key}`: expected {expected}, found {found}")]
    Value {
        /// The key.
        key: String,
        /// The kind needed.
        expected: String,
        /// What was found.
        found: String,
    },
    /// Part of a split model, but its name does not say which.
    #[error("part of a split model must be named PREFIX-{number:05}-of-{count:05}.gguf")]
    SplitName {
        /// The part's number, from 1.
        number: u64,
        /// Number of parts.
        count: u64,
    },
    /// A part of a split model is absent.
    #[error("part {number} of {count} is missing: {}", path.display())]
    MissingPart {
        /// The absent file.
        path: PathBuf,
        /// Its number, from 1.
        number: u64,
        /// Number of parts.
        count: u64,
    },
    /// A part that contradicts the first about the split.
    #[error("{key} is {found}, expected {expected}")]
    Split {
        /// The key.
        key: &'static str,
        /// Value in this part.
        found: String,
        /// Value needed.
        expected: u64,
    },
    /// A tensor of another type than needed.
    #[error("tensor `{tensor}`: type {found}, expected {expected}")]
    WrongType {
        /// The tensor.
        tensor: String,
        /// Its type.
        found: &'static str,
        /// What is needed.
        expected: &'static str,
    },
    /// The file is well formed and says something else than is needed.
    #[error("{0}")]
    Content(String),
}

/// Longest part of a key or name that a message repeats.
const SHOWN: usize = 80;

/// A key or name as messages show it: on one line and not too long, whatever a file says.
pub(crate) fn shown(name: &[u8]) -> String {
    let text = String::from_utf8_lossy(name);
    let mut shown: String = text
        .chars()
        .take(SHOWN)
        .flat_map(char::escape_debug)
        .collect();
    if text.chars().nth(SHOWN).is_some() {
        shown.push('…');
    }
    shown
}
