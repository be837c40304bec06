//! A picture of the order: its Hasse diagram in layers, as data and as SVG.

use crate::order::Poset;
use serde::{Deserialize, Serialize};
use std::fmt::Write as _;

/// An element of the order in the picture.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Node {
    /// The neurons of this class.
    pub neurons: Vec<usize>,
    /// Layer from the bottom: length of the longest chain below.
    pub layer: usize,
    /// Horizontal position, 0 to 1.
    pub x: f64,
    /// Meet-irreducible.
    pub meet_irreducible: bool,
    /// Join-irreducible.
    pub join_irreducible: bool,
}

/// A Hasse diagram.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Diagram {
    /// Elements.
    pub nodes: Vec<Node>,
    /// Covers: (lower, upper) by position in `nodes`.
    pub covers: Vec<(usize, usize)>,
    /// Number of layers.
    pub layers: usize,
}

/// Sweeps of the crossing reduction.
const SWEEPS: usize = 8;

impl Diagram {
    /// Lays out an order: layers by longest chain, places within a layer by the mean place of the neighbours (Sugiyama,
    /// Tagawa and Toda 1981).
    pub fn of(poset: &Poset) -> Self {
        let n = poset.len();
        let covers = poset.covers();
        // Lower elements have larger numbers, so descending order visits them first.
        let mut layer = vec![0; n];
        let mut above = vec![Vec::new(); n];
        let mut below = vec![Vec::new(); n];
        for &(a, b) in &covers {
            above[a].push(b);
            below[b].push(a);
        }
        for x in (0..n).rev() {
            layer[x] = below[x]
                .iter()
                .map(|&y: &usize| layer[y] + 1)
                .max()
                .unwrap_or(0);
        }
        let layers = layer.iter().max().map_or(0, |l| l + 1);
        let mut rows: Vec<Vec<usize>> = vec![Vec::new(); layers];
        (0..n).for_each(|x| rows[layer[x]].push(x));
        let mut x = vec![0.5; n];
        spread(&rows, &mut x);
        for sweep in 0..SWEEPS {
            let upward = sweep % 2 == 0;
            let neighbours = if upward { &below } else { &above };
            let order: Vec<usize> = if upward {
                (0..layers).collect()
            } else {
                (0..layers).rev().collect()
            };
            for l in order {
                let mean = |v: usize| {
                    let of = &neighbours[v];
                    if of.is_empty() {
                        x[v]
                    } else {
                        of.iter().map(|&u| x[u]).sum::<f64>() / of.len() as f64
                    }
                };
                let keys: Vec<f64> = (0..n).map(mean).collect();
                rows[l].sort_by(|&a, &b| keys[a].total_cmp(&keys[b]).then(a.cmp(&b)));
                spread(&rows[l..=l], &mut x);
            }
        }
        let (meet, join) = (poset.meet_irreducible(), poset.join_irreducible());
        let mut nodes: Vec<Node> = (0..n)
            .map(|c| Node {
                neurons: Vec::new(),
                layer: layer[c],
                x: x[c],
                meet_irreducible: meet[c],
                join_irreducible: join[c],
            })
            .collect();
        poset
            .classes()
            .of
            .iter()
            .enumerate()
            .for_each(|(neuron, &c)| nodes[c].neurons.push(neuron));
        Self {
            nodes,
            covers,
            layers,
        }
    }

    /// An SVG picture for small orders (up to a few hundred elements): layers from bottom to top, meet-irreducible elements
    /// filled, classes of several neurons larger and labelled with their number.
    pub fn svg(&self) -> String {
        let widest = (0..self.layers)
            .map(|l| self.nodes.iter().filter(|n| n.layer == l).count())
            .max()
            .unwrap_or(0);
        let width = (widest as f64 * 34.0).max(240.0) + 40.0;
        let height = self.layers as f64 * 60.0 + 60.0;
        let place = |n: &Node| {
            (
                20.0 + n.x * (width - 40.0),
                height - 50.0 - n.layer as f64 * 60.0,
            )
        };
        let mut svg = String::new();
        // Writing to a String cannot fail.
        let _ = writeln!(
            svg,
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width:.0} {height:.0}\" font-family=\"sans-serif\" \
             font-size=\"9\">"
        );
        for &(a, b) in &self.covers {
            let ((x1, y1), (x2, y2)) = (place(&self.nodes[a]), place(&self.nodes[b]));
            let _ = writeln!(
                svg,
                "<line x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\" stroke=\"#999\"/>"
            );
        }
        for node in &self.nodes {
            let (x, y) = place(node);
            let fill = if node.meet_irreducible {
                "#2a6fb0"
            } else {
                "#fff"
            };
            let dash = if node.join_irreducible {
                ""
            } else {
                " stroke-dasharray=\"3 2\""
            };
            let size = node.neurons.len();
            let radius = (7.0 + (size as f64).sqrt()).min(20.0);
            let names: Vec<String> = node.neurons.iter().map(usize::to_string).collect();
            let _ = writeln!(
                svg,
                "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"{radius:.1}\" fill=\"{fill}\" stroke=\"#234\"{dash}><title>{}</title>\
                 </circle>",
                names.join(", ")
            );
            let text = if size == 1 {
                names[0].clone()
            } else {
                format!("{size} n.")
            };
            let ink = if node.meet_irreducible {
                "#fff"
            } else {
                "#000"
            };
            let _ = writeln!(
                svg,
                "<text x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"middle\" fill=\"{ink}\">{text}</text>",
                y + 3.0
            );
        }
        let _ = writeln!(
            svg,
            "<text x=\"20\" y=\"{:.0}\">filled: meet-irreducible; solid outline: join-irreducible; up: influenced</text>\n</svg>",
            height - 12.0
        );
        svg
    }
}

/// Even places for each row, in its order.
fn spread(rows: &[Vec<usize>], x: &mut [f64]) {
    for row in rows {
        row.iter()
            .enumerate()
            .for_each(|(k, &v)| x[v] = (k as f64 + 0.5) / row.len() as f64);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::order::bits::BitMatrix;

    #[test]
    fn layers_rise_along_covers_and_places_in_a_layer_differ() {
        let g = BitMatrix::from_fn(40, 40, |i, j| i < j && (i * 13 + j * 7) % 11 == 0);
        let d = Diagram::of(&Poset::of_digraph(&g));
        assert_eq!(d.nodes.len(), 40);
        assert!(
            d.covers
                .iter()
                .all(|&(a, b)| d.nodes[a].layer < d.nodes[b].layer)
        );
        for a in 0..40 {
            for b in 0..a {
                assert!(d.nodes[a].layer != d.nodes[b].layer || d.nodes[a].x != d.nodes[b].x);
            }
        }
        let svg = d.svg();
        assert_eq!(svg.matches("<circle").count(), 40);
        assert_eq!(svg.matches("<line").count(), d.covers.len());
        assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"));
    }

    #[test]
    fn a_cycle_is_one_node_with_its_neurons() {
        let g = BitMatrix::from_fn(4, 4, |i, j| i < 3 && j == (i + 1) % 3 || (i, j) == (2, 3));
        let d = Diagram::of(&Poset::of_digraph(&g));
        assert_eq!((d.nodes.len(), d.layers), (2, 2));
        assert!(
            d.nodes
                .iter()
                .any(|n| n.neurons == [0, 1, 2] && n.layer == 0)
        );
    }
}
