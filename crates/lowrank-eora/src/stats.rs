//! Statistics of the inputs of a linear, X with one token per column.
//!
//! A batch of activations becomes [`Rows`], checked once for NaN and infinities, optionally
//! weighted or sampled ([`Sampler`]), and goes into sums: the Gram matrix H = Σ w x xᵀ and
//! per-channel sums ([`InputCollector`]), or G = Σ w (D x)(D x)ᵀ of one residual D
//! ([`OutputCollector`]), for inputs too wide for H. Sums of parts of the tokens can be merged,
//! saved and taken up again.

mod gram;
mod rows;

pub use gram::{Accumulation, Gram, GramCollector};
pub use rows::Rows;
