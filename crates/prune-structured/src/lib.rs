#![doc = include_str!("../README.md")]
//!
//! # Data flow
//!
//! ```text
//! Calibration::run   one pass of windows through the dense model, statistics per column
//! Plan::make         score, rank, allocate: plain data, printable and saveable
//! write              a second streaming pass: slice, compensate, write a new checkpoint
//! ```
#![forbid(unsafe_code)]

pub mod allocation;
mod calibrate;
pub mod compensation;
mod cost;
pub mod divergence;
mod error;
pub mod evolution;
pub mod experts;
mod methods;
pub mod obs;
pub mod output;
mod parts;
mod plan;
mod ranking;
pub mod rate_distortion;
mod recipe;
pub mod score;
pub mod stats;
mod stored;
pub mod structprune;
mod tensor;
pub mod tyr;

pub use allocation::Allocation;
pub use calibrate::{Calibration, Collect};
pub use candle_core;
pub use causal_lm;
pub use causal_lm::{Cancelled, NoProgress, Progress};
pub use compensation::{Compensation, DEFAULT_RIDGE};
pub use cost::{BlockCost, Cost};
pub use error::{Error, Result};
pub use output::{Form, Loading, Settings, gguf, nemotron, write};
pub use plan::{LayerPlan, Plan};
pub use ranking::{AttentionUnit, Ranking, Shape, Step};
pub use recipe::Recipe;
pub use score::Score;
pub use tensor_io;
