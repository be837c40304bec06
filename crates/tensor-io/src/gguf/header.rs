//! Everything in front of the data: which keys and tensors a file has and where they lie.
//!
//! [`Header::parse`] is the one door: every refusal is in it, and it takes bytes, so that it can be tested and fuzzed
//! without files. It allocates in proportion to the entries it has seen, never to a number that a file declares.

use std::collections::HashSet;
use std::ops::Range;

use super::cursor::Cursor;
use super::error::shown;
use super::types::NotStored;
use super::value::{self, Value, ValueType};
use super::{
    ALIGNMENT_KEY, BlockLayout, DEFAULT_ALIGNMENT, GgufError, MAGIC, MAX_ALIGNMENT, MAX_DIMS,
    MAX_KEY_BYTES, MAX_NAME_BYTES,
};

/// Smallest entry of the metadata: a key of one byte with its length, a type, a value of one byte.
const MIN_KEY_BYTES: u64 = 8 + 1 + 4 + 1;
/// Smallest entry of the tensors: a name of one byte with its length, one dimension, a type, an offset.
const MIN_TENSOR_BYTES: u64 = 8 + 1 + 4 + 8 + 4 + 8;

/// A checked header.
#[derive(Debug)]
pub(crate) struct Header {
    pub(crate) version: u32,
    pub(crate) entries: Vec<Entry>,
    /// Positions in `entries`, sorted by key.
    pub(crate) order: Vec<usize>,
    /// In the order of the file.
    pub(crate) tensors: Vec<Tensor>,
    /// Where the data begin.
    pub(crate) data_start: usize,
}

/// A metadata key and where its value lies.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) key: Range<usize>,
    pub(crate) ty: ValueType,
    /// Element type and number of elements of an array.
    pub(crate) array: Option<(ValueType, u64)>,
    /// The value's bytes: of a string its text, of an array its elements.
    pub(crate) value: Range<usize>,
}

/// A tensor as the header declares it.
#[derive(Debug, Clone)]
pub(crate) struct Tensor {
    pub(crate) name: String,
    pub(crate) layout: BlockLayout,
    /// Outermost dimension first.
    pub(crate) shape: Vec<usize>,
    /// Counted from the start of the data.
    pub(crate) start: usize,
    pub(crate) bytes: usize,
}

impl Header {
    pub(crate) fn parse(file: &[u8]) -> Result<Self, GgufError> {
        let mut cursor = Cursor::new(file);
        if file.len() < MAGIC.len() + size_of::<u32>() {
            return Err(GgufError::TooShort {
                found: file.len() as u64,
            });
        }
        let magic = cursor.take(MAGIC.len() as u64, String::new)?;
        if magic != MAGIC {
            return Err(GgufError::Magic {
                found: magic.escape_ascii().to_string(),
            });
        }
        let version = cursor.u32(String::new)?;
        match version {
            2 | 3 => {}
            // The versions so far fit in 16 bits: their bytes in the other order have zeros below.
            _ if version != 0 && version & 0xFFFF == 0 => return Err(GgufError::BigEndian),
            found => return Err(GgufError::Version { found }),
        }
        let tensor_count = cursor.u64(|| "the number of tensors".into())?;
        let key_count = cursor.u64(|| "the number of metadata keys".into())?;
        check_count("tensors", tensor_count, MIN_TENSOR_BYTES, &cursor)?;
        check_count("metadata keys", key_count, MIN_KEY_BYTES, &cursor)?;
        let (entries, order) = entries(file, &mut cursor, key_count)?;
        let alignment = alignment(file, &entries, &order)?;
        check_count("tensors", tensor_count, MIN_TENSOR_BYTES, &cursor)?;
        let tensors = tensors(&mut cursor, tensor_count, alignment)?;
        // A file without tensors may end without the padding.
        let data_start = cursor.at().next_multiple_of(alignment as usize);
        check_places(&tensors, file.len().saturating_sub(data_start))?;
        Ok(Self {
            version,
            entries,
            order,
            tensors,
            data_start,
        })
    }
}

fn check_count(
    what: &'static str,
    count: u64,
    min_bytes: u64,
    cursor: &Cursor<'_>,
) -> Result<(), GgufError> {
    let left = cursor.left() as u64;
    match count > left / min_bytes {
        true => Err(GgufError::Count { what, count, left }),
        false => Ok(()),
    }
}

/// Why a key cannot be one.
pub(crate) fn bad_key(key: &[u8]) -> Option<&'static str> {
    match key {
        [] => Some("the key is empty"),
        key if key.len() > MAX_KEY_BYTES => Some("the key is longer than 65,535 bytes"),
        key if std::str::from_utf8(key).is_err() => Some("the key is not UTF-8"),
        _ => None,
    }
}

/// Why a tensor name cannot be one.
pub(crate) fn bad_name(name: &[u8]) -> Option<&'static str> {
    match name {
        [] => Some("the name is empty"),
        name if name.len() > MAX_NAME_BYTES => {
            Some("the name is longer than 63 bytes, llama.cpp's limit")
        }
        name if std::str::from_utf8(name).is_err() => Some("the name is not UTF-8"),
        _ => None,
    }
}

/// The metadata's entries, and their positions sorted by key.
fn entries(
    file: &[u8],
    cursor: &mut Cursor<'_>,
    count: u64,
) -> Result<(Vec<Entry>, Vec<usize>), GgufError> {
    let mut entries: Vec<Entry> = Vec::new();
    for index in 0..count {
        let key = cursor.string(|| format!("metadata key number {index}"))?;
        if let Some(reason) = bad_key(key) {
            return Err(GgufError::BadKey { index, reason });
        }
        let key_end = cursor.at();
        let key_range = key_end - key.len()..key_end;
        let key = shown(key);
        let ty = value::value_type(cursor, &key)?;
        let start = cursor.at();
        let array = value::skip(cursor, &key, ty)?;
        // The length of a string stands in front of it; element type and length in front of an array.
        let prefix = match ty {
            ValueType::String => 8,
            ValueType::Array => 12,
            _ => 0,
        };
        entries.push(Entry {
            key: key_range,
            ty,
            array,
            value: start + prefix..cursor.at(),
        });
    }
    let key = |entry: &Entry| &file[entry.key.clone()];
    let mut order: Vec<usize> = (0..entries.len()).collect();
    order.sort_by_key(|&entry| key(&entries[entry]));
    let twice = order
        .windows(2)
        .find(|pair| key(&entries[pair[0]]) == key(&entries[pair[1]]));
    match twice {
        Some(pair) => Err(GgufError::DuplicateKey {
            key: shown(key(&entries[pair[0]])),
        }),
        None => Ok((entries, order)),
    }
}

fn alignment(file: &[u8], entries: &[Entry], order: &[usize]) -> Result<u32, GgufError> {
    let found = order.binary_search_by_key(&ALIGNMENT_KEY.as_bytes(), |&entry| {
        &file[entries[entry].key.clone()]
    });
    let Ok(found) = found else {
        return Ok(DEFAULT_ALIGNMENT);
    };
    let entry = &entries[order[found]];
    match Value::decode(entry.ty, &file[entry.value.clone()]) {
        Some(value) => check_alignment(&value),
        None => Err(GgufError::Alignment {
            found: entry.ty.name().to_string(),
        }),
    }
}

/// The alignment that `value` states.
pub(crate) fn check_alignment(value: &Value) -> Result<u32, GgufError> {
    match value {
        &Value::U32(alignment) if alignment.is_power_of_two() && alignment <= MAX_ALIGNMENT => {
            Ok(alignment)
        }
        other => Err(GgufError::Alignment {
            found: format!("{other:?}"),
        }),
    }
}

fn tensors(cursor: &mut Cursor<'_>, count: u64, alignment: u32) -> Result<Vec<Tensor>, GgufError> {
    let mut tensors: Vec<Tensor> = Vec::new();
    for index in 0..count {
        let name = cursor.string(|| format!("the name of tensor number {index}"))?;
        if let Some(reason) = bad_name(name) {
            return Err(GgufError::BadName { index, reason });
        }
        let in_errors = shown(name);
        let name = String::from_utf8_lossy(name).into_owned();
        let what = || format!("the entry of tensor `{in_errors}`");
        let dims = cursor.u32(what)?;
        if dims == 0 || dims as usize > MAX_DIMS {
            return Err(GgufError::Dimensions {
                tensor: in_errors,
                found: dims,
            });
        }
        let mut shape = Vec::new();
        for _ in 0..dims {
            shape.push(cursor.u64(what)?);
        }
        shape.reverse();
        let id = cursor.u32(what)?;
        let start = cursor.u64(what)?;
        let layout = BlockLayout::of_id(id).map_err(|why| GgufError::Type {
            tensor: in_errors.clone(),
            id,
            reason: match why {
                NotStored::Removed => "was removed from the format; convert the model again",
                NotStored::Activation => "is a type of activations, not of weights",
                NotStored::Unknown => "is unknown",
            },
        })?;
        let (shape, bytes) = check_shape(&in_errors, layout, &shape)?;
        if !start.is_multiple_of(u64::from(alignment)) {
            return Err(GgufError::Misaligned {
                tensor: in_errors,
                offset: start,
                alignment,
            });
        }
        let start = usize::try_from(start).map_err(|_| GgufError::Truncated {
            tensor: in_errors,
            missing: start,
        })?;
        tensors.push(Tensor {
            name,
            layout,
            shape,
            start,
            bytes,
        });
    }
    let mut names = HashSet::new();
    match tensors.iter().find(|tensor| !names.insert(&tensor.name)) {
        Some(tensor) => Err(GgufError::DuplicateTensor {
            tensor: shown(tensor.name.as_bytes()),
        }),
        None => Ok(tensors),
    }
}

/// A shape, outermost dimension first, and the bytes it takes.
pub(crate) fn check_shape(
    tensor: &str,
    layout: BlockLayout,
    shape: &[u64],
) -> Result<(Vec<usize>, usize), GgufError> {
    let refuse = |reason| GgufError::Shape {
        tensor: tensor.to_string(),
        shape: shape.to_vec(),
        reason,
    };
    if shape.contains(&0) {
        return Err(refuse("has a dimension of 0"));
    }
    let sizes: Option<Vec<usize>> = shape.iter().map(|&n| usize::try_from(n).ok()).collect();
    let sizes = sizes.ok_or_else(|| refuse("overflows"))?;
    let elements = sizes
        .iter()
        .try_fold(1usize, |n, &size| n.checked_mul(size));
    let elements = elements.ok_or_else(|| refuse("overflows"))?;
    let width = sizes.last().copied().unwrap_or(1);
    if !width.is_multiple_of(layout.values) {
        return Err(GgufError::PartialBlock {
            tensor: tensor.to_string(),
            width: width as u64,
            block: layout.values,
            type_name: layout.name,
        });
    }
    let row = layout.row_bytes(width);
    let bytes = row.and_then(|row| row.checked_mul(elements / width));
    // No file maps to more.
    match bytes.filter(|&bytes| bytes <= isize::MAX as usize) {
        Some(bytes) => Ok((sizes, bytes)),
        None => Err(refuse("overflows")),
    }
}

/// Checks that tensors lie within `data_bytes` bytes and apart from each other.
fn check_places(tensors: &[Tensor], data_bytes: usize) -> Result<(), GgufError> {
    let mut sorted: Vec<&Tensor> = tensors.iter().collect();
    sorted.sort_by_key(|tensor| (tensor.start, tensor.bytes));
    let mut before: Option<&Tensor> = None;
    for tensor in sorted {
        let end = tensor.start.saturating_add(tensor.bytes);
        if end > data_bytes {
            return Err(GgufError::Truncated {
                tensor: shown(tensor.name.as_bytes()),
                missing: (end - data_bytes.max(tensor.start)) as u64,
            });
        }
        if let Some(other) = before
            && tensor.start < other.start + other.bytes
        {
            return Err(GgufError::Overlap {
                tensor: shown(tensor.name.as_bytes()),
                start: tensor.start as u64,
                other: shown(other.name.as_bytes()),
                other_end: (other.start + other.bytes) as u64,
            });
        }
        before = Some(tensor);
    }
    Ok(())
}
