#![doc = include_str!("../README.md")]

pub mod attention;
mod cache;
#[cfg(feature = "calibrate")]
pub mod calibrate;
mod error;
#[cfg(test)]
mod golden;
pub mod policy;
mod quantise;
mod rotary;
pub mod store;
#[cfg(feature = "trace")]
mod tensor_file;
#[cfg(feature = "trace")]
pub mod trace;

/// The guide: is eviction worth it, which policy, which budget.
pub mod guide {
    #![doc = include_str!("../docs/choosing.md")]

    /// A whole attention block of one's own.
    pub mod attention_block {
        #![doc = concat!("```rust\n", include_str!("../examples/attention_block.rs"), "\n```")]
    }
}

pub use cache::{
    CacheSet, LayerCache, LayerShape, LayerSnapshot, Snapshot, Step, bottom_right_mask,
};
pub use candle_core;
pub use error::{Error, Result};
pub use policy::{Budget, CacheConfig, PolicyConfig, Positions, Prompt};
pub use quantise::{KeyGroups, NumberFormat, StorageConfig};
pub use rotary::{Pairs, Rotary};
