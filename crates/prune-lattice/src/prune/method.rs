//! The methods by name.

use crate::names::named;

named! {
    /// A way of choosing what is kept. The lattice methods and every baseline go through the same call.
    pub enum Method as "method" {
        /// Nothing is pruned.
        Dense = "dense",
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
        /// Largest weights.
        Magnitude = "magnitude",
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

    /// Whether it ranks neurons (and a [`MaskRule`](crate::mask::MaskRule) turns the ranking into a mask).
    pub fn ranks_neurons(self) -> bool {
        self.is_lattice()
            || matches!(
                self,
                Method::Reducible | Method::Strength | Method::RandomNeurons
            )
    }
}
