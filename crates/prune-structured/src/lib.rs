#![doc = include_str!("../README.md")]
//!
//! # The way of the data
//!
//! ```text
//! Calibration::run   one pass of windows through the dense model, statistics per column
//! Plan::make         score, rank, allocate: plain data, printable and saveable
//! write              a second streaming pass: slice, compensate, write a new checkpoint
//! ```
#![forbid(unsafe_code)]

mod allocate;
mod calibrate;
mod compensate;
pub mod config;
mod cost;
mod error;
mod files;
pub mod flap;
pub mod gguf;
mod layout;
pub mod nemotron;
pub mod obs;
mod plan;
mod ranking;
pub mod rate_distortion;
mod recipe;
mod score;
mod slice;
pub mod stats;
pub mod structprune;
mod tensor;
pub mod tyr;
mod uniform;
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
