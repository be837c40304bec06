//! Hugging Face decoder models, run block by block, with taps on the inputs of linears.
//!
//! Reads Llama, Mistral, Qwen2 and Qwen3 checkpoints through [`tensor_io`], checks every tensor
//! against the config, and runs them in two ways: sets of windows through one block at a time with
//! only that block's weights in memory ([`run_blocks`], [`Perplexity`]), and whole models that
//! generate with a replaceable KV cache.
//!
//! Widths are per layer. A pruned checkpoint lists them in its config under
//! [`WIDTHS_KEY`](config::WIDTHS_KEY); blocks without attention or without an MLP are allowed.
#![forbid(unsafe_code)]

mod attention;
pub mod block;
pub mod config;
mod decoder;
mod error;
mod generate;
mod linear;
mod model;
pub mod names;
mod ops;
mod perplexity;
mod rope;
mod stream;
pub mod synthetic;
mod tap;
mod text;
mod windows;

pub use attention::Mixer;
pub use block::Block;
pub use config::{ModelConfig, ModelType, Widths};
pub use decoder::{Decoder, Head};
pub use error::{Error, Result};
pub use generate::{GenerateOptions, Generated, Sampling, generate};
pub use kv_lazy::{CacheSet, LayerShape};
pub use linear::Linear;
pub use model::Model;
pub use names::LinearName;
pub use perplexity::Perplexity;
pub use rope::Rope;
pub use stream::{BATCH_TOKENS, Hidden, run_blocks};
pub use tap::{NoTap, Site, Tap, TapResult};
pub use text::TextTokenizer;
pub use windows::Windows;
