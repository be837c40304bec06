//! The crate as its users see it.

mod common;
mod full_cache;
