//! Týr-the-Pruner (arXiv 2503.09657): widths found by an evolutionary search over a supernet.
//!
//! Every sublayer is pruned and refitted at several widths around a centre ([`crate::obs`]), block
//! by block, on inputs that already carry the pruning error of the blocks before. A search then
//! picks a width for each sublayer so that the whole model's output stays closest to the dense
//! one's, under a budget that no step of it changes. Centre and spacing are refined over a few
//! iterations, each of which prunes the dense weights anew.
//!
//! ```text
//! space     widths of each sublayer: a centre, a spacing, four levels to each side
//! supernet  the sublayers at all their levels, on disk
//! teacher   top-k logits of the dense model on the windows of the search
//! fitness   KL divergence from the teacher; candidates share the blocks that they agree on
//! evolve    paired mutations, successive halving, elitism
//! search    iterations and generations, resumable after any step
//! ```
//!
//! The plan that comes out goes with the statistics of the last supernet, on which
//! [`crate::Compensation::LeastSquares`] makes the very columns that the search has measured.

mod evolve;
mod fitness;
mod options;
mod search;
mod space;
mod state;
mod store;
mod supernet;
mod teacher;
mod variant;

pub(crate) use fitness::Fitness;
pub use options::{Accumulation, Options, Sharing, Stage};
pub use search::{Data, Found, Start, search};
pub(crate) use store::LevelStore;
pub(crate) use teacher::Teacher;
