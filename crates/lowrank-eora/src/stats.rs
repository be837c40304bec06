//! Statistics of the inputs of a linear, X with one token per column.
//!
//! A batch of activations becomes [`Rows`], checked once for NaN and infinities, optionally
//! weighted or sampled ([`Sampler`]), and goes into sums: the Gram matrix H = Σ w x xᵀ,
//! per-channel sums and K = Σ w x x̂ᵀ ([`InputCollector`]), or G = Σ w (D x)(D x)ᵀ of one residual
//! D ([`OutputCollector`]), for inputs too wide for H, and Σ w ‖E x‖² of one error E
//! ([`EnergyCollector`]). Sums over parts of the tokens can be
//! merged, saved and taken up again.

mod cross;
mod diagonal;
mod energy;
mod gram;
mod input;
mod output;
mod rows;
mod sample;
#[cfg(test)]
mod tests;
mod triangular;

pub(crate) use cross::CrossCollector;
pub use diagonal::Diagonal;
pub(crate) use energy::EnergyCollector;
pub use gram::{Accumulation, Gram, GramCollector};
pub use input::{Collect, InputCollector, InputStats};
pub use output::OutputCollector;
pub use rows::Rows;
pub use sample::{Importance, Pick, Sampler};
pub use triangular::FactorCollector;
