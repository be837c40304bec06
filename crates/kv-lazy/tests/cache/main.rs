//! The crate as its users see it.

mod common;
mod eviction;
mod full_cache;
mod quantised;
mod state;
