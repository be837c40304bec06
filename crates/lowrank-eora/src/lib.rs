#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

pub mod compress;
mod error;
pub mod format;
pub mod matrix;
pub mod metrics;
pub mod output;
pub mod repair;
pub mod solve;
pub mod stats;
#[cfg(test)]
mod testing;

pub use error::{Error, Result};
