//! Recurrent networks: an optional embedding, a stack of layers of one cell, a linear read-out.
//!
//! Candle tensors are how weights come and go. Training and inference run on flat f32 buffers with one matrix product per
//! time step ([`Tape`], explicit backward pass), because candle's autograd pays more per small operation than the operation
//! costs; [`graph`] is the same network in candle, differentiable, and the reference of the tests.

mod activation;
mod adam;
mod compact;
mod gemm;
#[cfg(test)]
mod gradient_tests;
pub mod graph;
mod loss;
mod model;
mod packed;
mod tape;
mod train;

pub use compact::CompactRnn;
pub use loss::Evaluation;
pub use model::{CheckpointNames, InputKind, Rnn, RnnConfig, Role};
pub use tape::{Input, State, Tape};
pub use train::{Epoch, TrainConfig, TrainReport, evaluate, train};
