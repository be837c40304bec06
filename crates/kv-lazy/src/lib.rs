//! KV caches that evict: LazyEviction and the policies it is compared with.
#![forbid(unsafe_code)]

pub mod attention;
mod cache;
pub mod calibrate;
mod error;
pub mod policy;
pub mod store;
pub mod trace;

pub use cache::{CacheSet, LayerShape, Snapshot, Step};
pub use error::{Error, Result};
pub use policy::{Budget, CacheConfig, PolicyConfig, Prompt};
