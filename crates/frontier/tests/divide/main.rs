//! A model measured, divided, written and opened again, as a user does it.

mod caches;
mod common;
mod dense;
mod experts;
