//! The suites: a typed description of what to measure, calls of the crates, and rows.

pub mod chain;
mod damping;
pub mod frontier;
mod held_out;
mod hidden;
pub mod kv;
pub mod lattice;
mod lazy;
pub mod lowrank;
pub mod perplexity;
mod sizes;
pub mod structured;
pub mod tasks;
