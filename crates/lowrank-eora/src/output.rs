//! What runtimes load: adapters, compressed and merged checkpoints, and probes to check a runtime with.
//!
//! Everything is made from a finished [`Repaired`](crate::repair::Repaired), block by block:
//!
//! - [`Adapter`]: a LoRA adapter folder for PEFT, vLLM and whatever else reads those, to be loaded
//!   on top of the compressed model; or a LoRA in a GGUF file for llama.cpp;
//! - [`write_checkpoint`]: the compressed model itself, dense or packed as GPTQ or compressed-tensors, or W_c + B A
//!   merged into dense weights, or merged by requantisation;
//! - [`write_gguf`]: the compressed model as a GGUF file for llama.cpp;
//! - [`rest`]: embedding and head of such a file, rounded as llama.cpp's quantiser does;
//! - [`imatrix`]: mean squares of the inputs of every linear, for llama.cpp's quantiser, and back;
//! - [`Probe`]: inputs and expected outputs of each linear, with which a runtime shows that it
//!   applies the factors, and with the right scale.
//!
//! Files and folders appear under their names when they are complete.

mod adapter;
mod checkpoint;
mod gguf_model;
mod gguf_others;
mod imatrix;
mod lora_gguf;
mod mixed;
mod options;
pub(crate) mod peft;
mod probe;
mod rest;
mod types;

pub use crate::format::{compressed_tensors, gguf, gptq};
pub use adapter::{Adapter, AdapterFactors, AdapterOptions, AdapterRanks};
pub use checkpoint::{check_layout, write_checkpoint};
pub use gguf_model::{GgufModelOptions, ImatrixOrigin, write_gguf};
pub use imatrix::{imatrix, importance};
pub use lora_gguf::GgufAdapterOptions;
pub use options::{CheckpointOptions, Layout, Weights};
pub use probe::{Deviation, Probe, ProbeLayer};
pub use rest::rest;
pub use types::{Fallback, TypeCount, TypeTable, gguf_types};
