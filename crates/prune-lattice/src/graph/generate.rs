//! Watts–Strogatz, Barabási–Albert and Erdős–Rényi graphs, seeded.

use crate::error::{Error, Result};
use rand::{Rng, seq::index};
use std::collections::BTreeSet;

/// A simple undirected graph: edges as pairs (low, high), ascending.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Graph {
    /// Number of vertices.
    pub vertices: usize,
    /// Edges (low, high), ascending, no loops, no doubles.
    pub edges: Vec<(usize, usize)>,
}

impl Graph {
    /// From any edges; loops and doubles are dropped.
    pub fn new(vertices: usize, edges: impl IntoIterator<Item = (usize, usize)>) -> Self {
        let set: BTreeSet<_> = edges
            .into_iter()
            .filter(|(a, b)| a != b)
            .map(|(a, b)| (a.min(b), a.max(b)))
            .collect();
        Self {
            vertices,
            edges: set.into_iter().collect(),
        }
    }

    /// Exactly `edges` edges: random ones are dropped, or random pairs added.
    ///
    /// # Errors
    /// More edges than pairs of vertices.
    pub fn resized(mut self, edges: usize, rng: &mut impl Rng) -> Result<Self> {
        if edges < self.edges.len() {
            let mut keep = index::sample(rng, self.edges.len(), edges).into_vec();
            keep.sort_unstable();
            self.edges = keep.into_iter().map(|k| self.edges[k]).collect();
        } else if edges > self.edges.len() {
            let present: BTreeSet<_> = self.edges.iter().copied().collect();
            let n = self.vertices;
            let absent: Vec<_> = (0..n)
                .flat_map(|a| (a + 1..n).map(move |b| (a, b)))
                .filter(|e| !present.contains(e))
                .collect();
            let missing = edges - self.edges.len();
            if missing > absent.len() {
                return Err(too_many(edges, n));
            }
            self.edges.extend(
                index::sample(rng, absent.len(), missing)
                    .iter()
                    .map(|k| absent[k]),
            );
            self.edges.sort_unstable();
        }
        Ok(self)
    }

    /// Neighbours of every vertex, ascending.
    pub fn neighbours(&self) -> Vec<Vec<usize>> {
        let mut lists = vec![Vec::new(); self.vertices];
        for &(a, b) in &self.edges {
            lists[a].push(b);
            lists[b].push(a);
        }
        lists.iter_mut().for_each(|l| l.sort_unstable());
        lists
    }
}

fn too_many(edges: usize, n: usize) -> Error {
    Error::Setting {
        setting: "random graph",
        reason: format!("{edges} edges on {n} vertices"),
    }
}

/// G(n, m): `edges` pairs drawn uniformly without replacement (Erdős and Rényi 1959).
///
/// # Errors
/// More edges than pairs.
pub fn erdos_renyi(n: usize, edges: usize, rng: &mut impl Rng) -> Result<Graph> {
    Graph {
        vertices: n,
        edges: Vec::new(),
    }
    .resized(edges, rng)
}

/// Ring with `half_degree` neighbours on each side, each edge rewired with probability `rewire` (Watts and Strogatz 1998).
/// Around 0.1 the graph is a small world; 1 is nearly G(n, m).
///
/// # Errors
/// `2 * half_degree >= n`, or a probability outside `[0, 1]`.
pub fn watts_strogatz(
    n: usize,
    half_degree: usize,
    rewire: f64,
    rng: &mut impl Rng,
) -> Result<Graph> {
    if 2 * half_degree >= n || !(0.0..=1.0).contains(&rewire) {
        return Err(Error::Setting {
            setting: "watts-strogatz",
            reason: format!("half degree {half_degree} and rewiring {rewire} on {n} vertices"),
        });
    }
    let pair = |a: usize, b: usize| (a.min(b), a.max(b));
    let mut edges: BTreeSet<_> = (1..=half_degree)
        .flat_map(|k| (0..n).map(move |v| pair(v, (v + k) % n)))
        .collect();
    let mut degree = vec![2 * half_degree; n];
    for k in 1..=half_degree {
        for v in 0..n {
            if !rng.random_bool(rewire) || degree[v] == n - 1 {
                continue;
            }
            let u = (v + k) % n;
            let w = loop {
                let w = rng.random_range(0..n);
                if w != v && !edges.contains(&pair(v, w)) {
                    break w;
                }
            };
            if edges.remove(&pair(v, u)) {
                degree[u] -= 1;
                degree[w] += 1;
                edges.insert(pair(v, w));
            }
        }
    }
    Ok(Graph {
        vertices: n,
        edges: edges.into_iter().collect(),
    })
}

/// Growth by preferential attachment: a star of `m + 1` vertices, then each new vertex is joined to `m` distinct old ones
/// drawn in proportion to their degree (Barabási and Albert 1999). `m (n - m)` edges.
///
/// # Errors
/// `m` is 0 or not below `n`.
pub fn barabasi_albert(n: usize, m: usize, rng: &mut impl Rng) -> Result<Graph> {
    if m == 0 || m >= n {
        return Err(Error::Setting {
            setting: "barabasi-albert",
            reason: format!("{m} edges a vertex on {n} vertices"),
        });
    }
    let mut edges: Vec<(usize, usize)> = (1..=m).map(|v| (0, v)).collect();
    // Every vertex as often as its degree.
    let mut ends: Vec<usize> = edges.iter().flat_map(|&(a, b)| [a, b]).collect();
    for v in m + 1..n {
        let mut chosen = BTreeSet::new();
        while chosen.len() < m {
            chosen.insert(ends[rng.random_range(0..ends.len())]);
        }
        for u in chosen {
            edges.push((u, v));
            ends.extend([u, v]);
        }
    }
    Ok(Graph::new(n, edges))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::seed;

    #[test]
    fn generators_have_the_edge_counts_of_their_definitions() {
        let mut rng = seed::rng(3, "graphs");
        for n in [10, 24, 51] {
            assert_eq!(erdos_renyi(n, 20, &mut rng).unwrap().edges.len(), 20);
            for p in [0.0, 0.1, 1.0] {
                assert_eq!(
                    watts_strogatz(n, 3, p, &mut rng).unwrap().edges.len(),
                    3 * n
                );
            }
            for m in [1, 4] {
                let g = barabasi_albert(n, m, &mut rng).unwrap();
                assert_eq!(g.edges.len(), m * (n - m));
                assert!(g.neighbours().iter().all(|l| !l.is_empty()));
            }
        }
        assert!(erdos_renyi(4, 7, &mut rng).is_err());
        assert!(watts_strogatz(6, 3, 0.1, &mut rng).is_err());
        assert!(barabasi_albert(5, 5, &mut rng).is_err());
    }

    #[test]
    fn preferential_attachment_grows_hubs_and_the_ring_stays_a_ring_without_rewiring() {
        let mut rng = seed::rng(4, "graphs");
        let largest = |g: &Graph| g.neighbours().iter().map(Vec::len).max().unwrap();
        let ba = barabasi_albert(400, 2, &mut rng).unwrap();
        let er = erdos_renyi(400, ba.edges.len(), &mut rng).unwrap();
        assert!(largest(&ba) > 2 * largest(&er));
        let ring = watts_strogatz(9, 2, 0.0, &mut rng).unwrap();
        assert_eq!(ring.neighbours()[0], [1, 2, 7, 8]);
    }
}
