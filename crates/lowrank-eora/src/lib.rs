//! Low-rank repair of compressed models, after EoRA (arXiv 2410.21271).
//!
//! Notation: a linear computes y = W x with W `m × n` (outputs × inputs); W_c is its compressed
//! form, D = W − W_c; X is `n × t`, tokens as columns, H = X Xᵀ. The repair is B A with B `m × r`
//! and A `r × n`, and y = W_c x + B (A x).
//!
//! One layer, from activations to factors:
//!
//! ```
//! use candle_core::{DType, Device, Tensor};
//! use lowrank_eora::matrix::from_tensor;
//! use lowrank_eora::solve::{Method, Options};
//! use lowrank_eora::stats::{Accumulation, InputCollector, Rows};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let device = &Device::Cpu;
//! # let weight = Tensor::randn(0f32, 1.0, (24, 32), device)?; // [outputs, inputs]
//! # let compressed = weight.round()?;
//! # let activations = Tensor::randn(0f32, 1.0, (200, 32), device)?; // [tokens, inputs]
//! let method: Method = "eora".parse()?;
//! let mut collector = InputCollector::new(32, method.needs(), Accumulation::Sum)?;
//! for batch in activations.chunk(4, 0)? {
//!     collector.update(&Rows::from_tensor(&batch)?, None)?;
//! }
//! let stats = collector.finish();
//! let w = from_tensor(&weight, "weight")?;
//! let w_c = from_tensor(&compressed, "compressed weight")?;
//! let repaired = method.solve(w.as_ref(), w_c.as_ref(), &stats, 8, &Options::default())?;
//! let (a, b) = repaired.factors.to_tensors(DType::F16, device)?; // [8, 32] and [24, 8]
//! # assert_eq!((a.dims(), b.dims()), ([8, 32].as_slice(), [24, 8].as_slice()));
//! assert!(repaired.spectrum.loss(8) < repaired.spectrum.loss(0));
//! # Ok(())
//! # }
//! ```
#![forbid(unsafe_code)]

pub mod compress;
mod error;
pub mod format;
pub mod matrix;
pub mod metrics;
pub mod solve;
pub mod stats;
#[cfg(test)]
mod testing;

pub use error::{Error, Result};
