#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod adapter;
mod attention;
pub mod block;
pub mod compressed;
pub mod config;
mod decoder;
mod error;
mod forest;
mod generate;
pub mod gguf;
mod linear;
pub mod mixture;
mod model;
pub mod names;
mod open;
mod ops;
mod packing;
mod rope;
mod stream;
pub mod synthetic;
mod tap;
#[cfg(feature = "testing")]
pub mod testing;
mod text;
mod text_file;
mod vocabulary;
mod weights;
mod windows;

pub use adapter::{Adapter, Factors, open_adapted};
pub use attention::Mixer;
pub use block::Block;
pub use candle_core;
pub use config::{ModelConfig, Widths};
pub use decoder::Decoder;
pub use error::{Error, Result};
pub use forest::{Forest, Tree};
pub use generate::{GenerateOptions, Generated, Sampling, generate};
pub use kv_lazy::{CacheSet, LayerShape, Snapshot};
pub use linear::Linear;
pub use model::Model;
pub use names::LinearName;
pub use open::open;
pub use ops::{cross_entropy, first_non_finite, sum_exp};
pub use packed::{Kind, LEVEL_VARIABLE, Level, Team};
pub use packing::{Arithmetic, Execution};
pub use rope::{Long, Pairs, QueryScale, Rope, Yarn};
pub use stream::{BATCH_TOKENS, Hidden, run_blocks};
pub use tap::{ExpertPass, NoTap, Routed, Site, Tap, TapResult};
pub use tensor_io::{Cancelled, NoProgress, Progress};
pub use text::TextTokenizer;
pub use text_file::{TextFile, read_text};
pub use vocabulary::{Embedding, Head};
pub use weights::{DenseReason, WeightSummary};
pub use windows::Windows;
