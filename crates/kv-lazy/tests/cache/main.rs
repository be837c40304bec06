//! The crate as its users see it.

mod common;
mod eviction;
mod full_cache;
mod handle;
mod positions;
mod quantised;
mod state;
