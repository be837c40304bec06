//! Optimal brain surgeon on the columns of an output projection, with Týr-the-Pruner's local
//! pruner (arXiv 2503.09657).
//!
//! With B = Wᵀ (`[columns, outputs]`), the damped Gram matrix H of the inputs and G = H B, removing
//! a unit of columns g costs
//!
//! ```text
//! s_g = ½ tr(B_gᵀ ([H⁻¹]_gg)⁻¹ B_g) + tr(B_gᵀ G_g)
//! ```
//!
//! of which the first term is the least-squares loss of removing it and the second how far its
//! contribution points along the whole output. [`sweep`] removes the lowest units in rounds and
//! lets the others take over after each, so that at every width the running weights are the
//! least-squares refit on the columns that are left. [`Nested`] gives the errors and refits of any
//! other order of columns.

mod nested;
mod problem;
mod rank;
mod sweep;
mod units;

pub use nested::{Nested, error_curve};
pub use problem::Problem;
pub(crate) use rank::{rank, step_errors};
pub use sweep::{Level, Rounds, Sweep, sweep};
pub use units::Units;
