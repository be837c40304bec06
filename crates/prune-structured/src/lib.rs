//! Structured pruning of Hugging Face decoders without retraining.
//!
//! Attention heads and MLP neurons are removed whole, so that what is left is a smaller dense
//! model. Every method is a [`Score`] of columns, an [`Allocation`] of the budget and a
//! [`Compensation`]; a [`Recipe`] names the three.
//!
//! ```text
//! Calibration::run   one pass of windows through the dense model, statistics per column
//! Plan::make         score, rank, allocate: plain data, printable and saveable
//! write              a second streaming pass: slice, compensate, write a new checkpoint
//! ```
//!
//! # Who can open the result
//!
//! | widths | biases | transformers, vLLM | this workspace |
//! |---|---|---|---|
//! | equal in all layers | none, or in the architecture's own slots (Llama) | as any checkpoint | yes |
//! | equal, but Llama's hidden size is no multiple of the head count | | transformers through the loader in the folder; its Llama config refuses the head count | yes |
//! | differ between layers | any | transformers through the loader in the folder (`trust_remote_code=True`) | yes |
//! | any | where the architecture has no slot (Mistral, Qwen) | transformers through the loader | yes |
//! | masked ([`Form::Masked`]) | as above | as any checkpoint, at the dense size | yes |
#![forbid(unsafe_code)]

mod allocate;
mod calibrate;
mod compensate;
pub mod config;
mod cost;
mod error;
pub mod flap;
mod layout;
mod plan;
mod ranking;
mod recipe;
mod score;
mod slice;
pub mod stats;
mod write;

pub use allocate::Allocation;
pub use calibrate::{Calibration, Collect};
pub use compensate::{Compensation, DEFAULT_RIDGE};
pub use config::Loading;
pub use cost::{BlockCost, Cost};
pub use error::{Error, Result};
pub use layout::Form;
pub use plan::{LayerPlan, Plan};
pub use ranking::{AttentionUnit, Ranking, Shape, Step};
pub use recipe::Recipe;
pub use score::{Score, standardise};
pub use write::write;
