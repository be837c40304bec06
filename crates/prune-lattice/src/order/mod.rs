//! The order of the neurons: from influences to a verdict and a score per neuron.
//!
//! A [`Cut`] turns influences into a digraph, an [`OrderMode`] turns the digraph into an order, a [`Verdict`] says which
//! irreducible elements count. [`persistence`] does so over a family of cuts: cutting commutes with max-min transitive
//! closure, so a weighted relation is exactly its nested family of binary ones.

pub mod bits;
pub mod context;
mod cut;
mod orient;
mod persistence;
pub mod poset;
pub mod scc;

pub use cut::{Cut, default_cuts, thresholds};
pub use orient::RankBy;
pub use persistence::{
    Connected, Criterion, CutReport, Persistence, Verdicts, persistence, verdicts,
};
pub use poset::Poset;

use serde::{Deserialize, Serialize};

/// How a digraph, cyclic in general, becomes an order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OrderMode {
    /// Strongly connected components as elements, reachability as order.
    Reachability,
    /// One step of the unrolled network: a bipartite order, never cyclic. Meet-irreducible = irreducible row (strong
    /// targets), join-irreducible = irreducible column (strong sources).
    Context,
    /// Reachability along the edges that agree with a ranking of the neurons.
    Oriented(RankBy),
}

/// Which irreducible elements count.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// Meet-irreducible.
    #[default]
    Meet,
    /// Join-irreducible.
    Join,
    /// Both.
    Both,
}

/// What an order looks like; says at once whether it can tell neurons apart.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Diagnostics {
    /// Number of neurons.
    pub neurons: usize,
    /// Classes: strongly connected components, or distinct rows in context mode.
    pub classes: usize,
    /// Neurons in the largest class.
    pub largest_class: usize,
    /// Classes with a positive verdict (in context mode, neurons).
    pub irreducible_classes: usize,
    /// Neurons with a positive verdict, connected or not.
    pub irreducible_neurons: usize,
    /// Whether the order collapses: a single class, a class with more than 0.9 n neurons (reachability), or one verdict for
    /// all neurons.
    pub degenerate: bool,
}

/// Above this share of the neurons in one class the order is degenerate.
pub const LARGEST_CLASS_LIMIT: f64 = 0.9;
