//! The crate as its users see it.

mod bad_input;
mod bytes;
mod common;
mod eviction;
mod exact;
mod full_cache;
mod handle;
mod positions;
mod quantised;
mod state;
