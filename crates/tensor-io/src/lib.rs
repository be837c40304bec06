#![doc = include_str!("../README.md")]

mod checkpoint;
mod config;
mod dtype;
mod error;
mod folder;
mod header;
mod index;
mod map;
mod shard;
mod shard_writer;
mod single;
mod spec;
mod staging;
mod writer;

pub use checkpoint::{Checkpoint, TensorInfo};
pub use config::{CONFIG_FILE, Config};
pub use error::{Error, Result};
pub use header::{Entry, Header, HeaderError, MAX_HEADER_BYTES};
pub use index::{Index, IndexError};
pub use safetensors::Dtype;
pub use single::{TensorData, write_file};
pub use spec::TensorSpec;
pub use writer::{CheckpointWriter, WriteOptions, Written};
