//! Recurrent networks: an optional embedding, a stack of layers of one cell, a linear read-out.
//!
//! Candle tensors are how weights come and go. Training and inference run on flat f32 buffers with one matrix product per
//! time step ([`Tape`], explicit backward pass), because candle's autograd pays more per small operation than the operation
//! costs; [`graph`] is the same network in candle, differentiable, and the reference of the tests.

#[cfg(feature = "train")]
mod activation;
#[cfg(feature = "train")]
mod adam;
#[cfg(feature = "train")]
mod block_sparse;
#[cfg(feature = "train")]
mod compact;
#[cfg(feature = "train")]
mod evaluate;
#[cfg(all(test, feature = "train"))]
mod gradient_tests;
#[cfg(feature = "train")]
mod gradual;
#[cfg(feature = "train")]
pub mod graph;
pub(crate) mod input;
#[cfg(feature = "train")]
mod loss;
mod model;
#[cfg(feature = "train")]
mod packed;
#[cfg(feature = "train")]
mod product;
#[cfg(feature = "train")]
mod step;
#[cfg(feature = "train")]
mod tape;
#[cfg(feature = "train")]
mod train;

pub use input::InputKind;
#[cfg(feature = "train")]
pub(crate) use loss::auc;
pub use model::{CheckpointNames, ReadOut, Rnn, RnnConfig, Role};
#[cfg(feature = "train")]
pub use {
    block_sparse::{BlockInput, BlockMatrix, BlockRnn, BlockSource, BlockWork},
    compact::CompactRnn,
    evaluate::{evaluate, evaluate_blocks},
    gradual::Gradual,
    input::Input,
    loss::Evaluation,
    tape::{State, Tape},
    train::{Decay, Epoch, TrainConfig, TrainReport, train},
};
