//! Centralities of neurons in the influence graph.

use crate::{
    error::Result,
    influence::Influence,
    order::{Cut, Poset, bits, thresholds},
};
use serde::{Deserialize, Serialize};

/// Which centrality stands beside the order in the score of a neuron.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Centrality {
    /// Sum of influences in and out.
    #[default]
    Strength,
    /// Stationary share of a random walk along the influences, damping 0.85.
    PageRank,
    /// Neurons upstream times neurons downstream at mean out-degree 1.
    Reach,
    /// Share of shortest paths through the neuron (Brandes 2001) at mean out-degree 4.
    Betweenness,
}

impl Centrality {
    /// The centrality of every neuron, divided by the largest (all zero when all are).
    ///
    /// # Errors
    /// None for the centralities of the weighted graph; those of a digraph forward the error of the cut.
    pub fn normalised(self, influence: &Influence) -> Result<Vec<f64>> {
        let mut c = match self {
            Centrality::Strength => strength(influence),
            Centrality::PageRank => page_rank(influence),
            Centrality::Reach => reach(influence, Cut::Degree(1.0))?,
            Centrality::Betweenness => betweenness(influence, Cut::Degree(4.0))?,
        };
        let largest = c.iter().copied().fold(0.0, f64::max);
        if largest > 0.0 {
            c.iter_mut().for_each(|v| *v /= largest);
        }
        Ok(c)
    }
}

/// Sum of influences in and out of each neuron.
pub fn strength(influence: &Influence) -> Vec<f64> {
    let n = influence.len();
    let mut s = vec![0f64; n];
    for j in 0..n {
        for (i, &a) in influence.row(j).iter().enumerate() {
            s[i] += f64::from(a);
            s[j] += f64::from(a);
        }
    }
    s
}

const DAMPING: f64 = 0.85;

/// PageRank of the influences (Brin and Page 1998, damping 0.85); neurons without outgoing influence spread evenly.
pub fn page_rank(influence: &Influence) -> Vec<f64> {
    let n = influence.len();
    let total: Vec<f64> = (0..n)
        .map(|j| influence.row(j).iter().map(|&a| f64::from(a)).sum())
        .collect();
    let mut rank = vec![1.0 / n as f64; n];
    for _ in 0..200 {
        let dangling: f64 = (0..n).filter(|&j| total[j] == 0.0).map(|j| rank[j]).sum();
        let mut next = vec![(1.0 - DAMPING + DAMPING * dangling) / n as f64; n];
        for j in (0..n).filter(|&j| total[j] > 0.0) {
            let share = DAMPING * rank[j] / total[j];
            next.iter_mut()
                .zip(influence.row(j))
                .for_each(|(r, &a)| *r += share * f64::from(a));
        }
        let change: f64 = next.iter().zip(&rank).map(|(a, b)| (a - b).abs()).sum();
        rank = next;
        if change < 1e-12 {
            break;
        }
    }
    rank
}

/// Number of neurons upstream times number downstream (itself included in both) in the digraph of a cut.
///
/// # Errors
/// A cut that cannot be carried out.
pub fn reach(influence: &Influence, cut: Cut) -> Result<Vec<f64>> {
    let poset = Poset::of_digraph(&influence.digraph(thresholds(influence, &[cut])?[0]));
    let classes = poset.classes();
    let neurons = |row: &[u64]| bits::ones(row).map(|c| classes.sizes[c]).sum::<usize>() as f64;
    let per_class: Vec<f64> = (0..poset.len())
        .map(|c| neurons(poset.up().row(c)) * neurons(poset.down().row(c)))
        .collect();
    Ok(classes.of.iter().map(|&c| per_class[c]).collect())
}

/// Betweenness (Brandes 2001) of each neuron in the digraph of a cut, unweighted, not normalised; O(n m).
///
/// # Errors
/// A cut that cannot be carried out.
pub fn betweenness(influence: &Influence, cut: Cut) -> Result<Vec<f64>> {
    let graph = influence.digraph(thresholds(influence, &[cut])?[0]);
    let targets: Vec<Vec<usize>> = (0..graph.rows())
        .map(|j| graph.row_ones(j).collect())
        .collect();
    Ok(crate::graph::brandes(&targets).nodes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of_edges(n: usize, edges: &[(usize, usize)]) -> Influence {
        let mut a = vec![0.0; n * n];
        edges.iter().for_each(|&(j, i)| a[j * n + i] = 1.0);
        Influence::from_dense(n, &a).unwrap()
    }

    fn close(found: &[f64], expected: &[f64]) {
        assert!(
            found
                .iter()
                .zip(expected)
                .all(|(a, b)| (a - b).abs() < 1e-9),
            "{found:?}"
        );
    }

    #[test]
    fn page_rank_and_betweenness_agree_with_networkx() {
        let a = of_edges(5, &[(0, 1), (1, 2), (2, 0), (0, 2), (3, 2), (2, 4)]);
        let expected = [
            0.214_201_109_656_5,
            0.157_449_660_245_6,
            0.347_733_931_799_8,
            0.066_414_188_641_6,
            0.214_201_109_656_5,
        ];
        close(&page_rank(&a), &expected);
        let b = of_edges(5, &[(0, 1), (1, 2), (2, 0), (0, 2), (3, 2), (2, 4), (4, 3)]);
        close(
            &betweenness(&b, Cut::Value(0.5)).unwrap(),
            &[3.0, 0.0, 10.0, 3.0, 3.0],
        );
    }

    #[test]
    fn strength_sums_both_directions_and_reach_multiplies_them() {
        let a = of_edges(4, &[(0, 1), (1, 2), (2, 1), (2, 3)]);
        close(&strength(&a), &[1.0, 3.0, 3.0, 1.0]);
        // 1 and 2 are one class: three neurons upstream of it, three downstream.
        close(&reach(&a, Cut::Value(0.5)).unwrap(), &[4.0, 9.0, 9.0, 4.0]);
        close(
            &Centrality::Strength.normalised(&a).unwrap(),
            &[1.0 / 3.0, 1.0, 1.0, 1.0 / 3.0],
        );
    }
}
