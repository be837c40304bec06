//! The properties of a graph that the thesis behind arXiv 2407.20601 correlates with the accuracy of networks built on it.

use super::{Graph, paths};
use serde::{Deserialize, Serialize};

/// Above this size the O(n m) properties are not computed unless asked for.
pub const PROPERTIES_LIMIT: usize = 512;

/// Mean and population variance.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Moments {
    /// Mean.
    pub mean: f64,
    /// Population variance.
    pub variance: f64,
}

impl Moments {
    fn of(values: &[f64]) -> Self {
        let n = values.len().max(1) as f64;
        let mean = values.iter().sum::<f64>() / n;
        Self {
            mean,
            variance: values.iter().map(|v| (v - mean) * (v - mean)).sum::<f64>() / n,
        }
    }
}

/// Properties of an undirected graph; layers and sources are those of its edges directed from low to high index.
/// Distances count pairs that are connected; closeness and betweenness are normalised as in networkx.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GraphProperties {
    /// Vertices.
    pub nodes: usize,
    /// Edges.
    pub edges: usize,
    /// Edges over pairs.
    pub density: f64,
    /// Layers: longest directed path plus one.
    pub layers: usize,
    /// Vertices without an incoming directed edge.
    pub sources: usize,
    /// Vertices without an outgoing directed edge.
    pub sinks: usize,
    /// Whether every vertex reaches every other one.
    pub connected: bool,
    /// Longest distance between connected vertices.
    pub diameter: usize,
    /// Mean distance between connected vertices.
    pub average_path: f64,
    /// Largest distance from each vertex.
    pub eccentricity: Moments,
    /// Degrees.
    pub degree: Moments,
    /// Closeness (Wasserman and Faust's form for unconnected graphs).
    pub closeness: Moments,
    /// Node betweenness.
    pub node_betweenness: Moments,
    /// Edge betweenness.
    pub edge_betweenness: Moments,
}

/// The layer of every vertex when edges go from low to high index: one more than the highest layer before it.
pub fn layers(graph: &Graph) -> Vec<usize> {
    let mut layer = vec![0; graph.vertices];
    // Edges ascend by their lower end, whose layer is then final.
    for &(a, b) in &graph.edges {
        layer[b] = layer[b].max(layer[a] + 1);
    }
    layer
}

impl GraphProperties {
    /// All properties, O(n m); see [`PROPERTIES_LIMIT`].
    pub fn of(graph: &Graph) -> Self {
        let n = graph.vertices;
        let neighbours = graph.neighbours();
        let (mut diameter, mut total, mut pairs) = (0, 0, 0);
        let (mut eccentricity, mut closeness) = (Vec::with_capacity(n), Vec::with_capacity(n));
        for v in 0..n {
            let finite: Vec<usize> = paths::distances(&neighbours, v)
                .into_iter()
                .filter(|&d| d != usize::MAX)
                .collect();
            let (sum, reached) = (finite.iter().sum::<usize>(), finite.len() - 1);
            let farthest = finite.into_iter().max().unwrap_or(0);
            diameter = diameter.max(farthest);
            total += sum;
            pairs += reached;
            eccentricity.push(farthest as f64);
            let share = reached as f64 / (n.max(2) - 1) as f64;
            closeness.push(if sum == 0 {
                0.0
            } else {
                share * reached as f64 / sum as f64
            });
        }
        let b = paths::brandes(&neighbours);
        // Ordered pairs count every path of an undirected graph twice; so do the two directions of an edge.
        let node_pairs = (n.max(3) - 1) as f64 * (n.max(3) - 2) as f64;
        let edge_pairs = n.max(2) as f64 * (n.max(2) - 1) as f64;
        let nodes: Vec<f64> = b.nodes.iter().map(|v| v / node_pairs).collect();
        let edges: Vec<f64> = graph
            .edges
            .iter()
            .map(|&(u, v)| 2.0 * b.edges.get(&(u, v)).copied().unwrap_or(0.0) / edge_pairs)
            .collect();
        let degree: Vec<f64> = neighbours.iter().map(|l| l.len() as f64).collect();
        let has = |end: fn(&(usize, usize)) -> usize| {
            let mut seen = vec![false; n];
            graph.edges.iter().for_each(|e| seen[end(e)] = true);
            seen.iter().filter(|&&s| s).count()
        };
        Self {
            nodes: n,
            edges: graph.edges.len(),
            density: 2.0 * graph.edges.len() as f64 / edge_pairs,
            layers: layers(graph).into_iter().max().map_or(0, |l| l + 1),
            sources: n - has(|e| e.1),
            sinks: n - has(|e| e.0),
            connected: pairs == n * n.saturating_sub(1),
            diameter,
            average_path: if pairs == 0 {
                0.0
            } else {
                total as f64 / pairs as f64
            },
            eccentricity: Moments::of(&eccentricity),
            degree: Moments::of(&degree),
            closeness: Moments::of(&closeness),
            node_betweenness: Moments::of(&nodes),
            edge_betweenness: Moments::of(&edges),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(m: Moments, mean: f64, variance: f64) {
        assert!(
            (m.mean - mean).abs() < 1e-12 && (m.variance - variance).abs() < 1e-12,
            "{m:?}"
        );
    }

    #[test]
    fn properties_agree_with_networkx() {
        let g = Graph::new(
            8,
            [
                (0, 1),
                (0, 2),
                (1, 2),
                (2, 3),
                (3, 4),
                (4, 5),
                (3, 5),
                (5, 6),
                (1, 7),
            ],
        );
        let p = GraphProperties::of(&g);
        assert_eq!((p.nodes, p.edges, p.diameter, p.connected), (8, 9, 5, true));
        assert!((p.density - 0.321_428_571_428_571_45).abs() < 1e-15);
        assert!((p.average_path - 2.285_714_285_714_285_7).abs() < 1e-15);
        close(p.eccentricity, 4.0, 0.5);
        close(p.degree, 2.25, 0.6875);
        close(
            p.closeness,
            0.455_208_333_333_333_4,
            0.007_928_602_430_555_56,
        );
        close(
            p.node_betweenness,
            0.214_285_714_285_714_25,
            0.056_122_448_979_591_84,
        );
        close(
            p.edge_betweenness,
            0.253_968_253_968_253_95,
            0.022_234_819_853_867_473,
        );
    }

    #[test]
    fn unconnected_graphs_agree_with_networkx_and_have_layers_and_ends() {
        let g = Graph::new(6, [(0, 1), (1, 2), (3, 4)]);
        let p = GraphProperties::of(&g);
        close(
            p.closeness,
            0.222_222_222_222_222_2,
            0.014_320_987_654_320_988,
        );
        close(
            p.node_betweenness,
            0.016_666_666_666_666_666,
            0.001_388_888_888_888_889_2,
        );
        close(
            p.edge_betweenness,
            0.111_111_111_111_111_1,
            0.000_987_654_320_987_654_3,
        );
        assert!(!p.connected);
        assert_eq!((p.layers, p.sources, p.sinks), (3, 3, 3));
    }
}
