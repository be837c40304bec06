//! How far models with pruned sublayers are from the dense one, measured on their predictions.
//!
//! ```text
//! teacher      top-k probabilities of the dense model on some windows, on disk
//! levels       sublayers at several widths, on disk
//! variant      a block with its halves at other widths
//! activations  hidden states between two blocks
//! fitness      KL divergence of candidates, which share the blocks that they agree on
//! ```

mod activations;
mod fitness;
mod levels;
mod sublayers;
mod teacher;
mod variant;

pub(crate) use activations::Activations;
pub use fitness::{Fitness, Place, Sharing, Sites};
pub use levels::Kept;
pub(crate) use levels::LevelStore;
pub(crate) use sublayers::Sublayers;
pub(crate) use teacher::hash_of;
pub use teacher::{Teacher, TopK};
pub use variant::Half;
pub(crate) use variant::narrowed_attention;
