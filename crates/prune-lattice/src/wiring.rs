//! Which connections a network has before anything is pruned.
//!
//! Layers that are all updated at the same time, each from the states one step before, are one recurrent layer with a fixed
//! mask: bottom-up, recurrent and top-down blocks are blocks of one `W_hh`. The same holds for a network whose connections
//! are the edges of a graph. So every method, repair and report of this crate applies to them unchanged.

use crate::{
    error::{Error, Result},
    graph::{Graph, layers},
    mask::{Mask, MaskSet, tile},
    order::bits::BitMatrix,
    rnn::{Rnn, Role},
};
use serde::{Deserialize, Serialize};
use std::{fmt, str::FromStr};

/// The connections of one recurrent layer, the same in all gates.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wiring {
    inputs: Vec<bool>,
    outputs: Vec<bool>,
    /// Row i holds the sources of neuron i.
    edges: BitMatrix,
    extra_steps: usize,
}

/// Layers of some sizes: the first neuron of each, and the number of all.
fn starts(sizes: &[usize]) -> (Vec<usize>, usize) {
    let mut at = 0;
    let starts = sizes.iter().map(|n| {
        at += n;
        at - n
    });
    (starts.collect(), sizes.iter().sum())
}

impl Wiring {
    /// All connections of `n` neurons.
    pub fn full(n: usize) -> Self {
        Self {
            inputs: vec![true; n],
            outputs: vec![true; n],
            edges: BitMatrix::ones(n, n),
            extra_steps: 0,
        }
    }

    /// Layers from the lowest to the highest; `connected(to, from)` says which read which. The lowest reads the input, the
    /// highest is read out, as many steps later as the input needs to get there.
    fn layered(sizes: &[usize], connected: impl Fn(usize, usize) -> bool) -> Result<Self> {
        if sizes.is_empty() || sizes.contains(&0) {
            return Err(Error::Setting {
                setting: "wiring",
                reason: format!("layers of {sizes:?} neurons"),
            });
        }
        let (starts, n) = starts(sizes);
        let layer_of = |x: usize| starts.partition_point(|&s| s <= x) - 1;
        let last = sizes.len() - 1;
        Ok(Self {
            inputs: (0..n).map(|x| layer_of(x) == 0).collect(),
            outputs: (0..n).map(|x| layer_of(x) == last).collect(),
            edges: BitMatrix::from_fn(n, n, |i, j| connected(layer_of(i), layer_of(j))),
            extra_steps: last,
        })
    }

    /// Layers that read the layer below, themselves and the layer above.
    ///
    /// # Errors
    /// No layer, or one without neurons.
    pub fn feedback(sizes: &[usize]) -> Result<Self> {
        Self::layered(sizes, |to, from| to.abs_diff(from) <= 1)
    }

    /// Layers that read the layer below and themselves.
    ///
    /// # Errors
    /// No layer, or one without neurons.
    pub fn bottom_up(sizes: &[usize]) -> Result<Self> {
        Self::layered(sizes, |to, from| to == from || to == from + 1)
    }

    /// A neuron for each vertex of a graph, edges directed from the lower to the higher number (as in arXiv 2407.20601).
    /// Neurons of the same layer ([`layers`]) are connected with each other; the lowest layer reads the input; all neurons
    /// without an outgoing edge are read out.
    pub fn of_graph(graph: &Graph) -> Self {
        let n = graph.vertices;
        let layer = layers(graph);
        let mut edges = BitMatrix::from_fn(n, n, |i, j| layer[i] == layer[j]);
        let mut outputs = vec![true; n];
        for &(low, high) in &graph.edges {
            edges.set(high, low, true);
            outputs[low] = false;
        }
        Self {
            inputs: layer.iter().map(|&l| l == 0).collect(),
            outputs,
            edges,
            extra_steps: layer.into_iter().max().unwrap_or(0),
        }
    }

    /// Number of neurons.
    pub fn len(&self) -> usize {
        self.inputs.len()
    }

    /// Whether there are no neurons.
    pub fn is_empty(&self) -> bool {
        self.inputs.is_empty()
    }

    /// Which neurons read the input.
    pub fn inputs(&self) -> &[bool] {
        &self.inputs
    }

    /// Which neurons are read out.
    pub fn outputs(&self) -> &[bool] {
        &self.outputs
    }

    /// The recurrent connections; row i holds the sources of neuron i.
    pub fn edges(&self) -> &BitMatrix {
        &self.edges
    }

    /// Steps without input after a sequence, until its last input has reached the highest layer.
    pub fn extra_steps(&self) -> usize {
        self.extra_steps
    }

    /// Masks of a network of one layer: training under them gives it these connections, and pruning counts and keeps only
    /// entries within them ([`PruneContext::within`](crate::prune::PruneContext::within)).
    ///
    /// # Errors
    /// The network has several layers, or another number of neurons.
    pub fn masks(&self, rnn: &Rnn) -> Result<MaskSet> {
        if rnn.config().hidden != [self.len()] {
            return Err(Error::Shape {
                tensor: "wiring".into(),
                expected: format!("one layer of {} neurons", self.len()),
                found: rnn.config().hidden.clone(),
            });
        }
        let gates = rnn.config().cell.gates();
        let mut set = MaskSet::default();
        for (role, p) in rnn.roles().into_iter().zip(rnn.params().iter()) {
            let cols = p.shape.get(1).copied().unwrap_or(1);
            let keep = match role {
                Role::InputWeight(_) => {
                    let one = BitMatrix::from_fn(self.len(), cols, |i, _| self.inputs[i]);
                    tile(&one, gates)
                }
                Role::RecurrentWeight(_) => tile(&self.edges, gates),
                Role::OutputWeight => BitMatrix::from_fn(p.shape[0], cols, |_, j| self.outputs[j]),
                _ => continue,
            };
            let mask = Mask::of_matrix(keep);
            if mask.pruned() > 0 {
                set.insert(p.name.clone(), mask);
            }
        }
        Ok(set)
    }
}

/// A wiring by name: `full`, `feedback:48+48`, `bottom-up:48+48`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
#[non_exhaustive]
pub enum WiringKind {
    /// All connections.
    #[default]
    Full,
    /// [`Wiring::feedback`]
    Feedback(Vec<usize>),
    /// [`Wiring::bottom_up`]
    BottomUp(Vec<usize>),
}

impl WiringKind {
    /// The names that parse.
    pub const NAMES: &'static str = "full, feedback:N+N.., bottom-up:N+N..";

    /// Sizes of its layers; `None` for all connections.
    pub fn layers(&self) -> Option<&[usize]> {
        match self {
            Self::Full => None,
            Self::Feedback(sizes) | Self::BottomUp(sizes) => Some(sizes),
        }
    }

    /// The wiring; `None` for all connections.
    ///
    /// # Errors
    /// No layer, or one without neurons.
    pub fn build(&self) -> Result<Option<Wiring>> {
        match self {
            Self::Full => Ok(None),
            Self::Feedback(sizes) => Wiring::feedback(sizes).map(Some),
            Self::BottomUp(sizes) => Wiring::bottom_up(sizes).map(Some),
        }
    }
}

impl fmt::Display for WiringKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (name, sizes) = match self {
            Self::Full => return f.write_str("full"),
            Self::Feedback(sizes) => ("feedback", sizes),
            Self::BottomUp(sizes) => ("bottom-up", sizes),
        };
        let sizes: Vec<String> = sizes.iter().map(usize::to_string).collect();
        write!(f, "{name}:{}", sizes.join("+"))
    }
}

impl FromStr for WiringKind {
    type Err = Error;
    fn from_str(name: &str) -> Result<Self> {
        let unknown = || Error::UnknownName {
            kind: "wiring",
            name: name.into(),
            expected: Self::NAMES.into(),
        };
        if name == "full" {
            return Ok(Self::Full);
        }
        let (kind, sizes) = name.split_once(':').ok_or_else(unknown)?;
        let sizes: Vec<usize> = sizes
            .split('+')
            .map(|n| n.parse().map_err(|_| unknown()))
            .collect::<Result<_>>()?;
        match kind {
            "feedback" => Ok(Self::Feedback(sizes)),
            "bottom-up" => Ok(Self::BottomUp(sizes)),
            _ => Err(unknown()),
        }
    }
}

impl From<WiringKind> for String {
    fn from(kind: WiringKind) -> String {
        kind.to_string()
    }
}

impl TryFrom<String> for WiringKind {
    type Error = Error;
    fn try_from(name: String) -> Result<Self> {
        name.parse()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_read_their_neighbours_and_a_graph_its_edges_and_its_own_layer() {
        let w = Wiring::feedback(&[2, 1, 1]).unwrap();
        let rows: Vec<Vec<usize>> = (0..4).map(|i| w.edges().row_ones(i).collect()).collect();
        assert_eq!(
            rows,
            [vec![0, 1, 2], vec![0, 1, 2], vec![0, 1, 2, 3], vec![2, 3]]
        );
        assert_eq!(w.inputs(), [true, true, false, false]);
        assert_eq!(w.outputs(), [false, false, false, true]);
        assert_eq!(w.extra_steps(), 2);
        let w = Wiring::bottom_up(&[2, 1, 1]).unwrap();
        assert_eq!(w.edges().row_ones(0).collect::<Vec<_>>(), [0, 1]);
        assert_eq!(w.edges().row_ones(2).collect::<Vec<_>>(), [0, 1, 2]);
        assert!(Wiring::feedback(&[3, 0]).is_err() && Wiring::feedback(&[]).is_err());

        // Layers: 0 and 3 in 0, 1 in 1, 2 in 2; 4 reads 3. Sinks: 2, 4.
        let w = Wiring::of_graph(&Graph::new(5, [(0, 1), (1, 2), (0, 2), (3, 4)]));
        let rows: Vec<Vec<usize>> = (0..5).map(|i| w.edges().row_ones(i).collect()).collect();
        assert_eq!(
            rows,
            [
                vec![0, 3],
                vec![0, 1, 4],
                vec![0, 1, 2],
                vec![0, 3],
                vec![1, 3, 4]
            ]
        );
        assert_eq!(w.inputs(), [true, false, false, true, false]);
        assert_eq!(w.outputs(), [false, false, true, false, true]);
        assert_eq!(w.extra_steps(), 2);
    }

    #[test]
    fn names_parse_to_what_they_print() {
        for name in ["full", "feedback:48+48", "bottom-up:3+2+1"] {
            let kind: WiringKind = name.parse().unwrap();
            assert_eq!(kind.to_string(), name);
        }
        assert!("feedback:".parse::<WiringKind>().is_err());
        assert!("ring:3".parse::<WiringKind>().is_err());
        assert!("feedback:0".parse::<WiringKind>().unwrap().build().is_err());
        assert_eq!(WiringKind::Full.build().unwrap(), None);
    }
}
