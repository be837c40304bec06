//! Strongly connected components (Tarjan 1972), iterative, on bit rows.

use super::bits::BitMatrix;

/// The components of a digraph, numbered sinks first: every edge between components goes to the smaller number.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Components {
    /// Component of each vertex.
    pub of: Vec<usize>,
    /// Number of vertices of each component.
    pub sizes: Vec<usize>,
}

const UNSEEN: usize = usize::MAX;

/// Components of the digraph whose row `j` holds the targets of `j`.
pub fn components(graph: &BitMatrix) -> Components {
    let n = graph.rows();
    let mut of = vec![UNSEEN; n];
    let mut sizes = Vec::new();
    let mut index = vec![UNSEEN; n];
    let mut low = vec![0usize; n];
    let mut open = Vec::new();
    // One frame per vertex on the path: the vertex, the word its scan is at, and the bits of that word still to visit.
    let mut path: Vec<(usize, usize, u64)> = Vec::new();
    let mut next = 0;
    for root in 0..n {
        if index[root] != UNSEEN {
            continue;
        }
        let mut enter = Some(root);
        while enter.is_some() || !path.is_empty() {
            if let Some(v) = enter.take() {
                index[v] = next;
                low[v] = next;
                next += 1;
                open.push(v);
                path.push((v, 0, graph.row(v)[0]));
            }
            let top = path.len() - 1;
            let (v, mut at, mut bits) = path[top];
            let row = graph.row(v);
            let mut lowest = low[v];
            let descend = loop {
                if bits == 0 {
                    at += 1;
                    if at >= row.len() {
                        break None;
                    }
                    bits = row[at];
                    continue;
                }
                let u = at * 64 + bits.trailing_zeros() as usize;
                bits &= bits - 1;
                if index[u] == UNSEEN {
                    break Some(u);
                }
                if of[u] == UNSEEN {
                    lowest = lowest.min(index[u]);
                }
            };
            low[v] = lowest;
            if let Some(u) = descend {
                path[top] = (v, at, bits);
                enter = Some(u);
                continue;
            }
            path.pop();
            if let Some(&(parent, ..)) = path.last() {
                low[parent] = low[parent].min(lowest);
            }
            if lowest == index[v] {
                let mut size = 0;
                while let Some(u) = open.pop() {
                    of[u] = sizes.len();
                    size += 1;
                    if u == v {
                        break;
                    }
                }
                sizes.push(size);
            }
        }
    }
    Components { of, sizes }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::seed;
    use rand::Rng;

    /// Reflexive transitive closure by Warshall's triple loop.
    fn warshall(g: &BitMatrix) -> BitMatrix {
        let n = g.rows();
        let mut r = BitMatrix::from_fn(n, n, |i, j| i == j || g.get(i, j));
        for k in 0..n {
            for i in 0..n {
                for j in 0..n {
                    if r.get(i, k) && r.get(k, j) {
                        r.set(i, j, true);
                    }
                }
            }
        }
        r
    }

    #[test]
    fn components_are_the_classes_of_mutual_reachability_numbered_sinks_first() {
        let mut rng = seed::rng(1, "scc");
        for case in 0..300 {
            let n = rng.random_range(1..90);
            let degree = [0.3, 0.8, 1.2, 2.0, 4.0][case % 5];
            let g = BitMatrix::from_fn(n, n, |i, j| {
                i != j && rng.random_bool((degree / n as f64).min(1.0))
            });
            let c = components(&g);
            let r = warshall(&g);
            assert_eq!(c.sizes.iter().sum::<usize>(), n);
            for i in 0..n {
                for j in 0..n {
                    assert_eq!(c.of[i] == c.of[j], r.get(i, j) && r.get(j, i));
                    if g.get(i, j) {
                        assert!(c.of[j] <= c.of[i]);
                    }
                }
            }
        }
    }
}
