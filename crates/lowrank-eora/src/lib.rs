#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

pub mod compress;
mod error;
pub mod experts;
mod format;
mod matrix;
pub mod metrics;
pub mod output;
pub mod repair;
mod solve;
mod stats;
#[cfg(test)]
mod testing;

pub use candle_core;
pub use error::{Error, Result};
pub use faer;
pub use packed;
