//! The methods by name.

use crate::{mask::Block, names::named};

named! {
    /// A way of choosing what is kept, the recommended ones first, then those of order theory, then baselines.
    pub enum Method as "method" {
        /// Nothing is pruned.
        Dense = "dense",
        /// Largest weights.
        Magnitude = "magnitude",
        /// Neurons whose states, in linear combinations, say most of what all states say to their readers: a greedy basis.
        /// Needs a calibration.
        Span = "span",
        /// Neurons by the deviation of their state times the norm of the weights that read it. Needs a calibration.
        Flow = "flow",
        /// Neurons by pivoted Cholesky factorisation of the covariance of the states: a greedy basis that does not know who
        /// reads. Needs a calibration.
        PivotedCholesky = "pivoted-cholesky",
        /// Blocks of 8 targets x 4 sources with the largest sums of squares, per gate.
        Block8x4 = "block-8x4",
        /// Blocks of 8 targets x 1 source.
        Block8x1 = "block-8x1",
        /// Blocks of 4 targets x 1 source.
        Block4x1 = "block-4x1",
        /// Blocks of 16 targets x 1 source.
        Block16x1 = "block-16x1",
        /// Irreducible rows of the one-step context, persistence over cuts, plus centrality. The default lattice.
        LatticeContext = "lattice-context",
        /// Meet-irreducible classes of the reachability order.
        LatticeReachability = "lattice-reachability",
        /// Meet-irreducible elements of the order along a ranking.
        LatticeOriented = "lattice-oriented",
        /// Baseline: the same score for the neurons that are *reducible* in the context.
        Reducible = "reducible",
        /// Baseline: neurons by the sum of their influences, no order.
        Strength = "strength",
        /// Baseline: random neurons under the same mask rule.
        RandomNeurons = "random-neurons",
        /// Random weights.
        Random = "random",
        /// Largest influences (all gates of a connection together), no order.
        Threshold = "threshold",
        /// `W_hh = 0`, whatever the sparsity.
        ZeroWhh = "zero-whh",
        /// A Watts–Strogatz graph as the mask.
        Ws = "ws",
        /// A Barabási–Albert graph as the mask.
        Ba = "ba",
        /// An Erdős–Rényi graph as the mask.
        Er = "er",
    }
}

impl Method {
    /// Whether it decides by an order.
    pub fn is_lattice(self) -> bool {
        matches!(
            self,
            Method::LatticeContext | Method::LatticeReachability | Method::LatticeOriented
        )
    }

    /// Whether it needs a [`Calibration`](crate::calibration::Calibration).
    pub fn needs_calibration(self) -> bool {
        matches!(self, Method::Span | Method::Flow | Method::PivotedCholesky)
    }

    /// Whether it draws by the seed; the others choose the same whatever the seed.
    pub fn is_random(self) -> bool {
        matches!(
            self,
            Method::RandomNeurons | Method::Random | Method::Ws | Method::Ba | Method::Er
        )
    }

    /// Whether the edges of a random graph are what it keeps of `W_hh`.
    pub fn draws_graph(self) -> bool {
        matches!(self, Method::Ws | Method::Ba | Method::Er)
    }

    /// Whether it chooses among all connections and cannot stay within a wiring.
    pub fn needs_all_connections(self) -> bool {
        self.block().is_some() || self.draws_graph()
    }

    /// Whether it chooses by the size of weights, which may be weighed by their inputs.
    pub fn weighs_inputs(self) -> bool {
        self.block().is_some() || matches!(self, Method::Magnitude | Method::Threshold)
    }

    /// Whether it prunes gradually while a network is trained: by the size of weights, which tells what came back.
    pub fn is_gradual(self) -> bool {
        self.weighs_inputs()
    }

    /// Targets and sources of its blocks, for the methods that keep whole blocks.
    pub fn block(self) -> Option<Block> {
        let (rows, cols) = match self {
            Method::Block8x4 => (8, 4),
            Method::Block8x1 => (8, 1),
            Method::Block4x1 => (4, 1),
            Method::Block16x1 => (16, 1),
            _ => return None,
        };
        Some(Block { rows, cols })
    }

    /// Whether it ranks neurons (and a [`MaskRule`](crate::mask::MaskRule) turns the ranking into a mask).
    pub fn ranks_neurons(self) -> bool {
        self.is_lattice()
            || self.needs_calibration()
            || matches!(
                self,
                Method::Reducible | Method::Strength | Method::RandomNeurons
            )
    }
}
