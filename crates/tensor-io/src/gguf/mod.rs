//! GGUF, the single-file format of llama.cpp: metadata and tensors of quantised blocks.
//!
//! [`Gguf`] opens a file (or all files of a split model) memory-mapped; [`Writer`] writes one, tensor by tensor. This
//! module knows the container and the size of each block type, and nothing of models or of the values in a block.
//!
//! A file is, in little endian: magic, version, the two counts, the metadata (key, type, value), the tensors' names,
//! dimensions, types and offsets, padding to the alignment, the data. Dimensions are stored with the fastest first;
//! everywhere here a shape is outermost first, as in the rest of the crate.
//!
//! [`Gguf::open`] checks everything that can be checked without reading weights: malformed, truncated and foreign files
//! are a [`GgufError`] that names the key or tensor. Format: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>.

pub(crate) mod cursor;
mod error;
mod file;
mod header;
mod metadata;
mod types;
mod value;
mod writer;

pub use error::GgufError;
pub use file::{Gguf, TensorInfo};
pub use metadata::Metadata;
pub use types::BlockLayout;
pub use value::{Array, Value, ValueType};
pub use writer::{TensorSpec, Writer};

/// First bytes of a file.
pub const MAGIC: [u8; 4] = *b"GGUF";
/// Alignment of the tensors where the metadata state no other, in bytes.
pub const DEFAULT_ALIGNMENT: u32 = 32;
/// Largest alignment accepted: a larger one pads every tensor to more than most of them hold.
pub const MAX_ALIGNMENT: u32 = 1 << 20;
/// Longest metadata key, in bytes: the format's own limit.
pub const MAX_KEY_BYTES: usize = 65_535;
/// Longest tensor name, in bytes: llama.cpp holds names in 64 bytes with a terminator.
pub const MAX_NAME_BYTES: usize = 63;
/// Most dimensions of a tensor: ggml's limit.
pub const MAX_DIMS: usize = 4;

/// Metadata key that states the alignment.
pub(crate) const ALIGNMENT_KEY: &str = "general.alignment";
