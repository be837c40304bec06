//! Centralities of neurons in the influence graph.

use crate::{influence::Influence, order::{Cut, Poset, bits, thresholds}, error::Result};
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
    let total: Vec<f64> = (0..n).map(|j| influence.row(j).iter().map(|&a| f64::from(a)).sum()).collect();
    let mut rank = vec![1.0 / n as f64; n];
    for _ in 0..200 {
        let dangling: f64 = (0..n).filter(|&j| total[j] == 0.0).map(|j| rank[j]).sum();
        let mut next = vec![(1.0 - DAMPING + DAMPING * dangling) / n as f64; n];
        for j in (0..n).filter(|&j| total[j] > 0.0) {
            let share = DAMPING * rank[j] / total[j];
            next.iter_mut().zip(influence.row(j)).for_each(|(r, &a)| *r += share * f64::from(a));
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
    let per_class: Vec<f64> =
        (0..poset.len()).map(|c| neurons(poset.up().row(c)) * neurons(poset.down().row(c))).collect();
    Ok(classes.of.iter().map(|&c| per_class[c]).collect())
}

/// Betweenness (Brandes 2001) of each neuron in the digraph of a cut, unweighted, not normalised; O(n m).
///
/// # Errors
/// A cut that cannot be carried out.
pub fn betweenness(influence: &Influence, cut: Cut) -> Result<Vec<f64>> {
    let graph = influence.digraph(thresholds(influence, &[cut])?[0]);
    let targets: Vec<Vec<usize>> = (0..graph.rows()).map(|j| graph.row_ones(j).collect()).collect();
    Ok(crate::graph::brandes(&targets).nodes)
}
