#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod error;
mod likelihood;
pub mod long_context;
mod memory;
mod perplexity;
mod protocol;
mod scored;
pub mod tasks;

pub use candle_core;
pub use causal_lm;
pub use error::{Error, Result};
pub use likelihood::{Continuations, Likelihoods};
pub use perplexity::Perplexity;
pub use protocol::{Protocol, ProtocolKind};
pub use scored::{ScoredWindows, TextSize};
pub use tensor_io;
pub use tensor_io::{Cancelled, NoProgress, Progress};
