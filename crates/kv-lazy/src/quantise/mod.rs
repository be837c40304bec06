//! Quantised storage: what a cache's keys and values are stored as.
//!
//! Tokens are quantised once, when they leave the newest `residual` ones; the first tokens stay f16. Codes, scales and lows of a token move
//! together, so eviction works as for other storage. Attention widens codes in registers.

mod config;
mod format;
pub(crate) mod hadamard;
mod packed;

pub(crate) use config::{BLOCK, Layout, MOST_GROUPS, Side};
pub use config::{KeyGroups, NumberFormat, StorageConfig};
pub(crate) use format::Format;
pub(crate) use packed::{Packed, PackedView};
