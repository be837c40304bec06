//! From a plan to files: a smaller checkpoint, or an export to another format.
//!
//! ```text
//! form      sliced or masked, and who can load the result
//! layout    which tensors the result has: names, shapes, and where each comes from
//! config    its config.json, and the Python loader for widths that differ between layers
//! write     the checkpoint folder
//! gguf      a file for llama.cpp
//! nemotron  a folder with block_configs for vLLM
//! ```

mod config;
mod form;
pub mod gguf;
pub(crate) mod layout;
pub mod nemotron;
mod refits;
pub(crate) mod slice;
mod write;

pub use config::LOADER_FILE;
pub(crate) use config::PerLayer;
pub use form::{Form, Loading};
pub use layout::kept_features;
pub use refits::Refits;
pub use write::{Settings, write};
