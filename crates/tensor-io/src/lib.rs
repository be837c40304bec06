#![doc = include_str!("../README.md")]

pub mod atomic;
mod checkpoint;
mod checksum;
mod config;
mod dtype;
mod error;
mod folder;
pub mod gguf;
mod hash;
mod header;
pub mod imatrix;
mod index;
mod map;
pub mod progress;
mod shard;
mod shard_writer;
mod single;
mod source;
mod spec;
mod writer;

pub use atomic::{PendingFile, PendingFolder};
pub use candle_core;
pub use checkpoint::{Checkpoint, TensorInfo};
pub use checksum::write_checked_file;
pub use config::{CONFIG_FILE, Config};
pub use error::{Error, Result};
pub use hash::{ContentHash, Hasher};
pub use header::{Entry, Header, HeaderError, MAX_HEADER_BYTES};
pub use index::{Index, IndexError};
pub use progress::{Cancelled, NoProgress, Progress};
pub use safetensors::Dtype;
pub use shard::SharedBytes;
pub use single::{TensorData, write_file};
pub use source::TensorSource;
pub use spec::TensorSpec;
pub use writer::{CheckpointWriter, WriteOptions, Written};
