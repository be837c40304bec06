//! Breadth-first distances and Brandes' betweenness (2001), O(n m).

use std::collections::BTreeMap;

/// Betweenness of nodes and edges, counted over ordered pairs, not normalised.
pub(crate) struct Betweenness {
    pub(crate) nodes: Vec<f64>,
    /// Keyed by (source, target) as listed.
    pub(crate) edges: BTreeMap<(usize, usize), f64>,
}

/// Betweenness of a digraph given by its target lists.
pub(crate) fn brandes(targets: &[Vec<usize>]) -> Betweenness {
    let n = targets.len();
    let mut nodes = vec![0.0; n];
    let mut edges = BTreeMap::new();
    let (mut distance, mut paths, mut dependency) = (vec![0usize; n], vec![0f64; n], vec![0f64; n]);
    for source in 0..n {
        distance.fill(usize::MAX);
        paths.fill(0.0);
        dependency.fill(0.0);
        distance[source] = 0;
        paths[source] = 1.0;
        let mut order = vec![source];
        let mut at = 0;
        while at < order.len() {
            let v = order[at];
            at += 1;
            for &u in &targets[v] {
                if distance[u] == usize::MAX {
                    distance[u] = distance[v] + 1;
                    order.push(u);
                }
                if distance[u] == distance[v] + 1 {
                    paths[u] += paths[v];
                }
            }
        }
        for &v in order.iter().rev() {
            for &u in &targets[v] {
                if distance[u] == distance[v] + 1 {
                    let share = paths[v] / paths[u] * (1.0 + dependency[u]);
                    dependency[v] += share;
                    *edges.entry((v, u)).or_insert(0.0) += share;
                }
            }
            if v != source {
                nodes[v] += dependency[v];
            }
        }
    }
    Betweenness { nodes, edges }
}

/// Distances from `source`, `usize::MAX` where there is no path.
pub(crate) fn distances(targets: &[Vec<usize>], source: usize) -> Vec<usize> {
    let mut distance = vec![usize::MAX; targets.len()];
    distance[source] = 0;
    let mut order = vec![source];
    let mut at = 0;
    while at < order.len() {
        let v = order[at];
        at += 1;
        for &u in &targets[v] {
            if distance[u] == usize::MAX {
                distance[u] = distance[v] + 1;
                order.push(u);
            }
        }
    }
    distance
}
