//! The repair of whole models, as its user sees it.

mod common;
mod driver;
mod families;
mod gguf;
mod options;
mod outputs;
mod streaming;
mod threads;
