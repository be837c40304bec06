//! The methods by name.

use crate::error::Error;
use serde::{Deserialize, Serialize};
use std::{fmt, str::FromStr};

/// A way of choosing what stays. The lattice methods and every control go through the same call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Method {
    /// Nothing is pruned.
    Dense,
    /// Irreducible rows of the one-step context, persistence over cuts, plus centrality. The default lattice.
    LatticeContext,
    /// Meet-irreducible classes of the reachability order.
    LatticeReachability,
    /// Meet-irreducible elements of the order along a ranking.
    LatticeOriented,
    /// Control: the same score for the neurons that are *reducible* in the context.
    Reducible,
    /// Control: neurons by the sum of their influences, no order.
    Strength,
    /// Control: random neurons under the same mask rule.
    RandomNeurons,
    /// Largest weights.
    Magnitude,
    /// Random weights.
    Random,
    /// Largest influences (all gates of a connection together), no order.
    Threshold,
    /// `W_hh = 0`, whatever the sparsity.
    ZeroWhh,
    /// A Watts–Strogatz graph as the mask.
    Ws,
    /// A Barabási–Albert graph as the mask.
    Ba,
    /// An Erdős–Rényi graph as the mask.
    Er,
}

impl Method {
    /// All methods.
    pub const ALL: [Method; 14] = [
        Method::Dense,
        Method::LatticeContext,
        Method::LatticeReachability,
        Method::LatticeOriented,
        Method::Reducible,
        Method::Strength,
        Method::RandomNeurons,
        Method::Magnitude,
        Method::Random,
        Method::Threshold,
        Method::ZeroWhh,
        Method::Ws,
        Method::Ba,
        Method::Er,
    ];

    /// Its name, as in reports and on command lines.
    pub fn name(self) -> &'static str {
        match self {
            Method::Dense => "dense",
            Method::LatticeContext => "lattice-context",
            Method::LatticeReachability => "lattice-reachability",
            Method::LatticeOriented => "lattice-oriented",
            Method::Reducible => "reducible",
            Method::Strength => "strength",
            Method::RandomNeurons => "random-neurons",
            Method::Magnitude => "magnitude",
            Method::Random => "random",
            Method::Threshold => "threshold",
            Method::ZeroWhh => "zero-whh",
            Method::Ws => "ws",
            Method::Ba => "ba",
            Method::Er => "er",
        }
    }

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

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Method {
    type Err = Error;
    fn from_str(name: &str) -> Result<Self, Error> {
        Method::ALL
            .into_iter()
            .find(|m| m.name() == name)
            .ok_or_else(|| Error::UnknownName {
                kind: "method",
                name: name.into(),
                expected: Method::ALL.map(Method::name).join(", "),
            })
    }
}
