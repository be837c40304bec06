//! Týr-the-Pruner (arXiv 2503.09657): widths found by an evolutionary search over a supernet.
//!
//! Every sublayer is pruned and refitted at several widths around a centre ([`crate::obs`]), block
//! by block, on inputs that already have the pruning error of the blocks before. A search then
//! picks a width for each sublayer so that the whole model's output stays closest to the dense
//! one's, under a budget that no step of it changes. Centre and spacing are refined over a few
//! iterations, each of which prunes the dense weights anew.
//!
//! ```text
//! space     widths of each sublayer: a centre, a spacing, four levels to each side
//! supernet  the sublayers at all their levels, on disk
//! evolve    paired mutations, selected as in [`crate::evolution`]; fitness is KL divergence from the dense model
//! search    iterations and generations, resumable after any step
//! ```
//!
//! The resulting plan is written with the statistics of the last supernet, on which
//! [`crate::Compensation::LeastSquares`] makes the columns that the search has measured.

mod data;
mod evolve;
mod options;
mod search;
mod space;
mod state;
mod supernet;

pub use crate::divergence::Sharing;
pub use crate::evolution::Stage;
pub use data::Data;
pub use options::{Accumulation, Options};
pub use search::{Found, Run, Start, search};
