//! Low-rank repair of compressed models, after EoRA (arXiv 2410.21271).
//!
//! Notation: a linear computes y = W x with W `m × n` (outputs × inputs); W_c is its compressed
//! form, D = W − W_c; X is `n × t`, tokens as columns, H = X Xᵀ. The repair is B A with B `m × r`
//! and A `r × n`, and y = W_c x + B (A x).
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
