//! Pruning of recurrent networks without retraining.
//!
//! [`calibration`] records what a network's states do on examples; [`prune`] chooses weights, blocks or neurons by many methods
//! through one call; `repair` (feature `train`) solves the weights under a mask again, or folds removed neurons into the kept
//! ones; `exact` removes neurons whose removal changes nothing. The README begins with that. What follows is about the methods
//! of order theory, and the baselines that tell whether order matters.
//!
//! # The method
//! The recurrent weights of a network say which neuron drives which. Above a threshold this is a digraph, the digraph
//! generates an order (`x ≤ y` where `y` can be reached from `x`), the order has a smallest complete lattice around it (its
//! Dedekind–MacNeille completion), and some neurons are *meet-irreducible* there: no combination of others stands for them.
//! R. Sengupta (arXiv 2502.16525) proposes to keep the connections of these neurons, helped by a centrality, and to drop the
//! rest.
//!
//! **What this crate implements is the method as that paper's abstract describes it, with the explicit choices below; it does
//! not reproduce a table of the paper, and no number here is one of the paper's.**
//!
//! - *Edges*: `W_hh[i, j]` is the edge `j → i`; its strength is the Euclidean norm over the gates ([`influence`]). The diagonal
//!   is left out. Stacks form one block matrix, each block scaled by its own size.
//! - *Thresholds*: a grid of mean out-degrees from 0.25 to 4 ([`order::Cut`]). Above that nearly every trained or random
//!   network is one strongly connected component, whose order is a single point.
//! - *Cycles*: trained networks are full of them. Three readings ([`order::OrderMode`]): components as elements
//!   (reachability), one unrolled step (context; the default, never cyclic), edges along a ranking only (oriented).
//! - *Irreducibility*: `x` is meet-irreducible iff the down-sets of its upper covers intersect in more than its own down-set.
//!   This is exact and needs no completion, which may have 2^(n/2) elements. Having a single cover, or a single outgoing edge,
//!   is not the same.
//! - *Isolated neurons* are maximal elements and so irreducible; by default they do not count ([`order::Connected`]).
//! - *Continuous adjacency*: cutting commutes with max-min closure, so a weighted relation is its nested family of binary ones.
//!   A neuron's score is the share of cuts at which it counts, plus `beta` times its centrality ([`centrality`]).
//! - *From neurons to connections*: both ends kept, either end kept, or magnitudes weighted by the scores
//!   ([`mask::MaskRule`]); budgets are met exactly.
//! - *A collapsed order is an error*, [`Error::DegenerateOrder`], and not silently something else.
//!
//! # Does it work?
//! Keeping all irreducible elements keeps the reachability order. It says nothing about the function the network computes.
//! Whether it prunes better than simpler rules is an empirical question, so every baseline goes through the same call
//! ([`prune::Method`]): magnitude, random weights, plain neuron strength, random neurons, the *reducible* neurons, threshold
//! only, no recurrent weights at all, and Watts–Strogatz, Barabási–Albert and Erdős–Rényi graphs as masks (after
//! arXiv 2407.20601, whose graph properties are in [`graph`]). [`experiment::verdict`] says in words what the rows show. On the
//! default suite order does not beat plain strength; see the README for the numbers and the command that makes them.
//!
//! # What is faster
//! A scattered mask does not make a network faster. [`mask::hard_remove`] gives smaller tensors with the same function as the
//! network whose neurons are masked everywhere; [`rnn::CompactRnn`] computes only with the neurons of `W_hh` that a mask keeps;
//! [`rnn::BlockRnn`] runs masks of 8x4, 8x1 or 4x1 blocks in f32 or int8. [`experiment::measure_speed`] and
//! [`experiment::measure_blocks`] measure them beside the dense network.
//!
//! # Limits
//! GRUs are those that apply the reset gate after the recurrent product. LSTMs have no peepholes or projections. An LSTM neuron
//! masked in `W_hh` still integrates its input: its cell recursion is diagonal and not part of `W_hh`. Networks are
//! unidirectional. Training runs on the CPU, in f32; [`rnn::graph`] is the same network in candle for other devices.
//!
//! # Example
//! ```
//! use prune_lattice::{
//!     Cell,
//!     mask::hard_remove,
//!     prune::{Method, PruneConfig, prune, rank_neurons},
//!     rnn::{InputKind, Rnn, RnnConfig},
//! };
//!
//! # fn main() -> prune_lattice::Result<()> {
//! let shape = RnnConfig::new(Cell::Lstm, InputKind::OneHot { vocab: 65 }, [48], 65);
//! let mut rnn = Rnn::new(shape, 0)?; // or Rnn::load(file, &CheckpointNames::default())?
//! let config = PruneConfig::new(Method::LatticeContext, 0.75);
//!
//! let (masks, report) = prune(&rnn, &config)?;
//! assert_eq!(report.sparsity.recurrent, 0.75);
//! let small = hard_remove(&rnn, &rank_neurons(&rnn, &config)?)?;
//! assert_eq!(small.config().hidden, [24]);
//! masks.apply(rnn.params_mut())?;
//! # Ok(())
//! # }
//! ```

pub mod calibration;
pub mod cell;
pub mod centrality;
pub mod connectivity;
#[cfg(feature = "train")]
pub mod data;
mod error;
#[cfg(feature = "train")]
pub mod exact;
#[cfg(feature = "experiment")]
pub mod experiment;
pub mod graph;
pub mod hasse;
pub mod influence;
pub mod io;
pub mod mask;
mod names;
#[cfg(feature = "onnx")]
pub mod onnx;
pub mod order;
pub mod params;
pub mod prune;
#[cfg(feature = "train")]
pub mod repair;
pub mod rnn;
pub mod rnnoise;
mod seed;
#[cfg(feature = "experiment")]
pub mod tasks;
pub mod wiring;

pub use candle_core;
pub use cell::{Cell, GateLayout};
pub use error::{Error, Result};
pub use tensor_io::{Cancelled, NoProgress, Progress};

/// The README's examples are compiled as doctests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
