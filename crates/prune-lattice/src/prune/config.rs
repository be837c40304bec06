//! Everything that a pruning run depends on, as data.

use super::Method;
use crate::{
    centrality::Centrality,
    influence::{Aggregate, StackEdges},
    mask::MaskRule,
    names::{named, with},
    order::{Connected, Cut, RankBy, Verdict, default_cuts},
};
use serde::{Deserialize, Serialize};

named! {
    /// Which matrices are pruned. Biases, embedding and read-out never are.
    #[derive(Default)]
    pub enum Scope as "scope" {
        /// `W_hh`
        #[default]
        H2h = "h2h",
        /// `W_ih`
        I2h = "i2h",
        /// Both.
        Both = "both",
    }
}

impl Scope {
    /// Whether `W_hh` is pruned.
    pub fn recurrent(self) -> bool {
        self != Scope::I2h
    }

    /// Whether `W_ih` is pruned.
    pub fn input(self) -> bool {
        self != Scope::H2h
    }
}

named! {
    /// Within what weights compete for magnitude pruning.
    #[derive(Default)]
    pub enum Compete as "competition" {
        /// One threshold for all pruned matrices of all layers (as the code of arXiv 2407.20601 does).
        Global = "global",
        /// Each matrix keeps its share.
        PerMatrix = "per-matrix",
        /// Each gate block of each matrix keeps its share.
        #[default]
        PerGate = "per-gate",
    }
}

/// How neurons are scored by order: `share of cuts + beta * centrality`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct LatticeConfig {
    /// How the gates of a connection become one number.
    pub aggregate: Aggregate,
    /// Which edges of a stack enter the order.
    pub edges: StackEdges,
    /// The cuts of the persistence.
    pub cuts: Vec<Cut>,
    /// Which irreducible elements count.
    pub verdict: Verdict,
    /// Which neurons must have strong edges to count.
    pub connected: Connected,
    /// What ranks the neurons of the oriented order.
    pub orientation: RankBy,
    /// The centrality beside the order.
    pub centrality: Centrality,
    /// Its weight; 0 leaves it to break ties only.
    pub beta: f64,
}

impl Default for LatticeConfig {
    fn default() -> Self {
        Self {
            aggregate: Aggregate::default(),
            edges: StackEdges::default(),
            cuts: default_cuts(),
            verdict: Verdict::default(),
            connected: Connected::default(),
            orientation: RankBy::default(),
            centrality: Centrality::default(),
            beta: 1.0,
        }
    }
}

/// A pruning run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct PruneConfig {
    /// What chooses.
    pub method: Method,
    /// Share of the weights in scope to remove, in `[0, 1)`. Met exactly, up to rounding to whole connections or blocks.
    pub sparsity: f64,
    /// Which matrices.
    pub scope: Scope,
    /// How scores of neurons decide over connections.
    pub rule: MaskRule,
    /// How neurons are scored by order.
    pub lattice: LatticeConfig,
    /// Within what weights compete for magnitude pruning.
    pub compete: Compete,
    /// The share that each gate keeps, in PyTorch's order, in place of the sparsity; for magnitudes per gate and for blocks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub densities: Option<Vec<f64>>,
    /// Whether blocks of `W_hh` leave the diagonal as it is, beside the budget.
    #[serde(default)]
    pub keep_diagonal: bool,
    /// Whether a weight counts times the root mean square of its input, which needs a calibration; for magnitudes, thresholds
    /// and blocks.
    #[serde(default)]
    pub weigh_inputs: bool,
    /// Rewiring probability of Watts–Strogatz graphs: 0.1 is a small world, 1 what arXiv 2407.20601 used.
    pub rewire: f64,
    /// For whatever is random.
    pub seed: u64,
}

impl PruneConfig {
    /// The defaults: `W_hh`, both ends of a connection kept, persistence of the default cuts.
    pub fn new(method: Method, sparsity: f64) -> Self {
        Self {
            method,
            sparsity,
            scope: Scope::default(),
            rule: MaskRule::Both,
            lattice: LatticeConfig::default(),
            compete: Compete::default(),
            densities: None,
            keep_diagonal: false,
            weigh_inputs: false,
            rewire: 0.1,
            seed: 0,
        }
    }
}

with!(LatticeConfig, PruneConfig);
