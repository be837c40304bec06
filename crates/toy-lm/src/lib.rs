#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

pub mod bundled;
mod error;
mod generator;
mod train;

pub use candle_core;
pub use error::{Error, Result};
pub use generator::{Corpus, Document, Generator, Split};
pub use tensor_io::{Cancelled, NoProgress, Progress};
pub use train::{Batch, Stage, TrainOptions, TrainableDecoder, Trained, train};
