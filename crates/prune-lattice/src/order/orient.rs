//! Making a relation acyclic by a ranking of the neurons: an edge stays where it goes from the lower to the higher rank.

use super::bits::BitMatrix;
use crate::{centrality, influence::Influence};
use serde::{Deserialize, Serialize};

/// What ranks the neurons of the oriented order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RankBy {
    /// Sum of incoming and outgoing influence: weak neurons come first.
    #[default]
    Strength,
    /// PageRank of the influence.
    PageRank,
    /// The order of the greedy feedback arc set (Eades, Lin, Smyth 1993): few edges are dropped.
    FeedbackArc,
}

/// The edges of `graph` that go to a strictly higher rank.
pub(crate) fn oriented(influence: &Influence, graph: &BitMatrix, by: RankBy) -> BitMatrix {
    let rank = match by {
        RankBy::Strength => centrality::strength(influence),
        RankBy::PageRank => centrality::page_rank(influence),
        RankBy::FeedbackArc => feedback_arc_ranks(graph)
            .into_iter()
            .map(|r| r as f64)
            .collect(),
    };
    BitMatrix::from_fn(graph.rows(), graph.cols(), |j, i| {
        graph.get(j, i) && rank[j] < rank[i]
    })
}

fn positions(order: &[usize]) -> Vec<usize> {
    let mut rank = vec![0; order.len()];
    for (position, &v) in order.iter().enumerate() {
        rank[v] = position;
    }
    rank
}

/// Eades–Lin–Smyth: take sinks to the end, sources to the front, else the vertex with the largest out-degree minus
/// in-degree to the front. O(n² + m).
pub(crate) fn feedback_arc_ranks(graph: &BitMatrix) -> Vec<usize> {
    let n = graph.rows();
    let sources = graph.transpose();
    let count = |m: &BitMatrix, v: usize| m.row_ones(v).filter(|&u| u != v).count() as i64;
    let mut out: Vec<i64> = (0..n).map(|v| count(graph, v)).collect();
    let mut inn: Vec<i64> = (0..n).map(|v| count(&sources, v)).collect();
    let mut left: Vec<usize> = (0..n).collect();
    let (mut front, mut back) = (Vec::new(), Vec::new());
    while !left.is_empty() {
        // A sink, else a source, else the best difference; the first such vertex in index order.
        let (at, is_sink) = match left.iter().position(|&v| out[v] == 0) {
            Some(at) => (at, true),
            None => {
                let best = left.iter().position(|&v| inn[v] == 0).unwrap_or_else(|| {
                    let value = |v: usize| out[v] - inn[v];
                    (0..left.len()).fold(0, |b, k| {
                        if value(left[k]) > value(left[b]) {
                            k
                        } else {
                            b
                        }
                    })
                });
                (best, false)
            }
        };
        let v = left.remove(at);
        if is_sink {
            back.push(v)
        } else {
            front.push(v)
        }
        for u in graph.row_ones(v).filter(|&u| u != v) {
            inn[u] -= 1;
        }
        for u in sources.row_ones(v).filter(|&u| u != v) {
            out[u] -= 1;
        }
    }
    front.extend(back.into_iter().rev());
    positions(&front)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_feedback_arc_order_of_a_dag_drops_nothing_and_of_a_cycle_one_edge() {
        let dag = BitMatrix::from_fn(70, 70, |i, j| {
            (i * 7 + j) % 5 == 0 && (i * 37) % 70 < (j * 37) % 70
        });
        let rank = feedback_arc_ranks(&dag);
        let dropped = (0..70)
            .flat_map(|i| dag.row_ones(i).map(move |j| (i, j)).collect::<Vec<_>>())
            .filter(|&(i, j)| rank[i] > rank[j]);
        assert_eq!(dropped.count(), 0);
        let cycle = BitMatrix::from_fn(9, 9, |i, j| (i + 1) % 9 == j);
        let rank = feedback_arc_ranks(&cycle);
        assert_eq!((0..9).filter(|&i| rank[i] > rank[(i + 1) % 9]).count(), 1);
    }
}
