//! Mixtures of experts: dropping, merging and narrowing experts, and the checkpoints that result.

mod common;
mod errors;
mod golden;
mod properties;
mod reconstruct;
mod rows;
mod terms;
