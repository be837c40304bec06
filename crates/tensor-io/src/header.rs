//! The header of a safetensors file: which tensor lies where.
//!
//! A file is eight bytes of header length (little endian), the header (a JSON object, padded with spaces) and the
//! tensors' bytes. [`Header::parse`] is the one door: it accepts what the `safetensors` crate accepts, except that a
//! name must not stand twice, and every refusal names the tensor. It takes bytes, so that it can be tested and fuzzed
//! without files. Format: <https://github.com/huggingface/safetensors#format>.

use std::collections::BTreeMap;
use std::fmt;

use safetensors::Dtype;
use serde::de::value::{Error as ValueError, StrDeserializer};
use serde::de::{Error as _, IntoDeserializer, MapAccess, Visitor};
use serde::ser::SerializeMap;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Largest header accepted, in bytes: the format's own limit.
pub const MAX_HEADER_BYTES: u64 = 100_000_000;

/// Bytes of the header length in front of the header, and the alignment of what follows the header.
pub(crate) const PREFIX_BYTES: usize = 8;

/// The key under which a header keeps free text.
pub(crate) const METADATA_KEY: &str = "__metadata__";

/// What was wrong with the header of a safetensors file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HeaderError {
    /// Not even a header length.
    #[error(
        "{found} bytes are too few for a safetensors file; it starts with 8 bytes of header length"
    )]
    TooShort {
        /// Length of the file.
        found: u64,
    },
    /// The header length is beyond [`MAX_HEADER_BYTES`].
    #[error(
        "header of {length} bytes is over the limit of {MAX_HEADER_BYTES}; is this a safetensors file?"
    )]
    TooLarge {
        /// Declared header length.
        length: u64,
    },
    /// The header does not fit in the file.
    #[error(
        "header of {length} bytes does not fit in a file of {file_bytes} bytes; the file is truncated or not safetensors"
    )]
    BeyondFile {
        /// Declared header length.
        length: u64,
        /// Length of the file.
        file_bytes: u64,
    },
    /// The header is not UTF-8.
    #[error("header is not UTF-8: {0}")]
    NotUtf8(#[source] std::str::Utf8Error),
    /// The header is not the JSON that the format asks for.
    #[error("header is not valid: {0}")]
    Json(#[source] serde_json::Error),
    /// A name stands twice in the header.
    #[error("tensor `{tensor}` is in the header twice")]
    Duplicate {
        /// The name.
        tensor: String,
    },
    /// A dtype that the format does not know.
    #[error("tensor `{tensor}`: unknown dtype `{dtype}`")]
    UnknownDtype {
        /// The tensor.
        tensor: String,
        /// The dtype as written.
        dtype: String,
    },
    /// The shape has more elements or bytes than can be counted.
    #[error("tensor `{tensor}`: shape {shape:?} overflows")]
    Overflow {
        /// The tensor.
        tensor: String,
        /// Its shape.
        shape: Vec<usize>,
    },
    /// A dtype smaller than a byte whose elements do not fill whole bytes.
    #[error("tensor `{tensor}`: shape {shape:?} of {dtype} does not fill whole bytes")]
    PartialByte {
        /// The tensor.
        tensor: String,
        /// Its dtype.
        dtype: Dtype,
        /// Its shape.
        shape: Vec<usize>,
    },
    /// The end stands before the start.
    #[error("tensor `{tensor}`: offsets {start}..{end} run backwards")]
    Backwards {
        /// The tensor.
        tensor: String,
        /// Start offset.
        start: usize,
        /// End offset.
        end: usize,
    },
    /// The offsets do not span what dtype and shape need.
    #[error(
        "tensor `{tensor}`: shape {shape:?} of {dtype} takes {expected} bytes, the offsets span {found}"
    )]
    SizeMismatch {
        /// The tensor.
        tensor: String,
        /// Its dtype.
        dtype: Dtype,
        /// Its shape.
        shape: Vec<usize>,
        /// Bytes that dtype and shape need.
        expected: usize,
        /// Bytes between the offsets.
        found: usize,
    },
    /// A tensor begins before the one in front of it ends.
    #[error("tensor `{tensor}` begins at {start}, inside `{other}`, which ends at {other_end}")]
    Overlap {
        /// The tensor.
        tensor: String,
        /// Its start offset.
        start: usize,
        /// The tensor in front of it.
        other: String,
        /// Where that one ends.
        other_end: usize,
    },
    /// Bytes that belong to no tensor.
    #[error("bytes {from}..{to} in front of tensor `{tensor}` belong to no tensor")]
    Hole {
        /// The tensor behind the hole.
        tensor: String,
        /// First byte of the hole.
        from: usize,
        /// Byte after the hole.
        to: usize,
    },
    /// A tensor ends beyond the end of the file.
    #[error(
        "tensor `{tensor}` ends at byte {end} of the data, which has {data_bytes}; the file is truncated"
    )]
    Truncated {
        /// The tensor.
        tensor: String,
        /// Its end offset.
        end: usize,
        /// Bytes behind the header.
        data_bytes: usize,
    },
    /// Bytes behind the last tensor.
    #[error("{extra} bytes behind the last tensor")]
    Trailing {
        /// How many.
        extra: usize,
    },
}

/// Where one tensor lies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Name of the tensor.
    pub name: String,
    /// Stored dtype.
    pub dtype: Dtype,
    /// Shape, outermost dimension first.
    pub shape: Vec<usize>,
    /// First byte, counted from the end of the header.
    pub start: usize,
    /// Byte after the last, counted from the end of the header.
    pub end: usize,
}

/// The checked header of a safetensors file.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Header {
    /// Free text from `__metadata__`.
    pub metadata: BTreeMap<String, String>,
    /// All tensors, by offset, without gaps.
    pub entries: Vec<Entry>,
    /// Where the tensors' bytes begin in the file.
    pub data_start: usize,
}

impl Header {
    /// Reads and checks the header of `file`, the bytes of a whole safetensors file (only the header is looked at).
    ///
    /// # Errors
    /// Any deviation from the format, see [`HeaderError`].
    pub fn parse(file: &[u8]) -> Result<Self, HeaderError> {
        let file_bytes = file.len() as u64;
        let (prefix, rest) = file
            .split_first_chunk::<PREFIX_BYTES>()
            .ok_or(HeaderError::TooShort { found: file_bytes })?;
        let length = u64::from_le_bytes(*prefix);
        if length > MAX_HEADER_BYTES {
            return Err(HeaderError::TooLarge { length });
        }
        let (json, data) = usize::try_from(length)
            .ok()
            .and_then(|length| rest.split_at_checked(length))
            .ok_or(HeaderError::BeyondFile { length, file_bytes })?;
        let json = std::str::from_utf8(json).map_err(HeaderError::NotUtf8)?;
        let raw: RawHeader = serde_json::from_str(json).map_err(HeaderError::Json)?;

        let mut entries = raw
            .tensors
            .into_iter()
            .map(|(name, raw)| raw.check(name))
            .collect::<Result<Vec<_>, _>>()?;
        refuse_duplicates(&entries)?;
        entries.sort_by_key(|entry| (entry.start, entry.end));
        refuse_gaps(&entries, data.len())?;
        Ok(Self {
            metadata: raw.metadata.unwrap_or_default(),
            entries,
            data_start: PREFIX_BYTES + json.len(),
        })
    }

    /// The header as it stands at the start of a file: length, JSON, spaces up to a multiple of eight bytes.
    /// None if it is longer than a reader accepts.
    pub(crate) fn encode(&self) -> Option<Vec<u8>> {
        let mut json =
            serde_json::to_vec(self).expect("strings and integers always have a JSON form");
        json.resize(json.len().next_multiple_of(PREFIX_BYTES), b' ');
        let length = json.len() as u64;
        (length <= MAX_HEADER_BYTES).then(|| [&length.to_le_bytes(), json.as_slice()].concat())
    }
}

impl Serialize for Header {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        if !self.metadata.is_empty() {
            map.serialize_entry(METADATA_KEY, &self.metadata)?;
        }
        for entry in &self.entries {
            let info = safetensors::tensor::TensorInfo {
                dtype: entry.dtype,
                shape: entry.shape.clone(),
                data_offsets: (entry.start, entry.end),
            };
            map.serialize_entry(&entry.name, &info)?;
        }
        map.end()
    }
}

/// Number of bytes of a tensor; None where it cannot be counted or is not whole.
pub(crate) fn byte_size(dtype: Dtype, shape: &[usize]) -> Option<usize> {
    let bits = element_count(shape)?.checked_mul(dtype.bitsize())?;
    bits.is_multiple_of(8).then_some(bits / 8)
}

/// Number of elements of a shape; None where it overflows.
pub(crate) fn element_count(shape: &[usize]) -> Option<usize> {
    shape
        .iter()
        .try_fold(1, |n: usize, &dim| n.checked_mul(dim))
}

fn refuse_duplicates(entries: &[Entry]) -> Result<(), HeaderError> {
    let mut names: Vec<&str> = entries.iter().map(|entry| entry.name.as_str()).collect();
    names.sort_unstable();
    match names.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => Err(HeaderError::Duplicate {
            tensor: pair[0].to_string(),
        }),
        None => Ok(()),
    }
}

/// Checks that entries sorted by offset cover `data_bytes` bytes exactly.
fn refuse_gaps(entries: &[Entry], data_bytes: usize) -> Result<(), HeaderError> {
    let mut end = 0;
    for (i, entry) in entries.iter().enumerate() {
        if entry.start < end {
            return Err(HeaderError::Overlap {
                tensor: entry.name.clone(),
                start: entry.start,
                other: entries[i - 1].name.clone(),
                other_end: end,
            });
        }
        if entry.end > data_bytes {
            return Err(HeaderError::Truncated {
                tensor: entry.name.clone(),
                end: entry.end,
                data_bytes,
            });
        }
        if entry.start > end {
            return Err(HeaderError::Hole {
                tensor: entry.name.clone(),
                from: end,
                to: entry.start,
            });
        }
        end = entry.end;
    }
    match data_bytes - end {
        0 => Ok(()),
        extra => Err(HeaderError::Trailing { extra }),
    }
}

/// The header as written, names in order and possibly repeated.
struct RawHeader {
    metadata: Option<BTreeMap<String, String>>,
    tensors: Vec<(String, RawEntry)>,
}

#[derive(Deserialize)]
struct RawEntry {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: (usize, usize),
}

impl RawEntry {
    fn check(self, name: String) -> Result<Entry, HeaderError> {
        let Self {
            dtype,
            shape,
            data_offsets: (start, end),
        } = self;
        let text: StrDeserializer<'_, ValueError> = dtype.as_str().into_deserializer();
        let Ok(dtype) = Dtype::deserialize(text) else {
            return Err(HeaderError::UnknownDtype {
                tensor: name,
                dtype,
            });
        };
        let Some(bits) = element_count(&shape).and_then(|n| n.checked_mul(dtype.bitsize())) else {
            return Err(HeaderError::Overflow {
                tensor: name,
                shape,
            });
        };
        if !bits.is_multiple_of(8) {
            return Err(HeaderError::PartialByte {
                tensor: name,
                dtype,
                shape,
            });
        }
        if end < start {
            return Err(HeaderError::Backwards {
                tensor: name,
                start,
                end,
            });
        }
        if end - start != bits / 8 {
            return Err(HeaderError::SizeMismatch {
                tensor: name,
                dtype,
                shape,
                expected: bits / 8,
                found: end - start,
            });
        }
        Ok(Entry {
            name,
            dtype,
            shape,
            start,
            end,
        })
    }
}

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(RawHeaderVisitor)
    }
}

struct RawHeaderVisitor;

impl<'de> Visitor<'de> for RawHeaderVisitor {
    type Value = RawHeader;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object from tensor names to dtype, shape and data_offsets")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawHeader, A::Error> {
        let mut metadata = None;
        let mut tensors = Vec::new();
        while let Some(name) = map.next_key::<String>()? {
            if name != METADATA_KEY {
                let entry = map
                    .next_value()
                    .map_err(|error| A::Error::custom(format!("tensor `{name}`: {error}")))?;
                tensors.push((name, entry));
            } else if metadata.replace(map.next_value()?).is_some() {
                return Err(A::Error::duplicate_field(METADATA_KEY));
            }
        }
        Ok(RawHeader {
            metadata: metadata.flatten(),
            tensors,
        })
    }
}
