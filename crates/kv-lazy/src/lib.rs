//! KV caches that evict: LazyEviction and the policies it is compared with.
#![forbid(unsafe_code)]

pub mod attention;
mod cache_set;
mod error;
pub mod store;

pub use cache_set::{CacheSet, LayerShape, Snapshot, Step};
pub use error::{Error, Result};
