//! From scores to masks with an exact number of kept entries.

use crate::order::bits::BitMatrix;
use serde::{Deserialize, Serialize};
use std::cmp::Ordering;

/// How the scores of neurons decide over connections.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MaskRule {
    /// A connection stays if both ends are kept neurons: k of n neurons keep (k/n)² of the connections.
    Both,
    /// A connection stays if one end is a kept neuron: 1 − (1 − k/n)² of the connections.
    Either,
    /// Single weights rank by `|w| (1 + lambda (s_i + s_j))`, s being the scores divided by the largest.
    WeightedMagnitude {
        /// Weight of the scores; 0 is plain magnitude.
        lambda: f64,
    },
}

/// Place of an entry in the ranking: the smaller level first, then the larger weight, then the smaller index.
#[derive(Debug, Clone, Copy)]
pub struct Rank {
    /// Compared first, ascending.
    pub level: u64,
    /// Compared second, descending.
    pub weight: f64,
}

impl Rank {
    fn compare(&self, other: &Self) -> Ordering {
        self.level
            .cmp(&other.level)
            .then(other.weight.total_cmp(&self.weight))
    }
}

/// The `keep` first entries of a `rows` x `cols` matrix. Exactly `keep` bits are set.
pub fn keep_top(
    rows: usize,
    cols: usize,
    keep: usize,
    rank: impl Fn(usize, usize) -> Rank,
) -> BitMatrix {
    let mut entries: Vec<(Rank, usize)> = (0..rows * cols)
        .map(|e| (rank(e / cols, e % cols), e))
        .collect();
    let keep = keep.min(entries.len());
    if keep > 0 && keep < entries.len() {
        entries.select_nth_unstable_by(keep - 1, |a, b| a.0.compare(&b.0).then(a.1.cmp(&b.1)));
    }
    let mut bits = BitMatrix::new(rows, cols);
    for &(_, e) in &entries[..keep] {
        bits.set(e / cols, e % cols, true);
    }
    bits
}

/// The mask of all gates from the mask of one: gates are stored block after block, so the block is repeated whole.
pub fn tile(edges: &BitMatrix, gates: usize) -> BitMatrix {
    let n = edges.rows();
    let mut tiled = BitMatrix::new(gates * n, edges.cols());
    for i in 0..gates * n {
        tiled.row_mut(i).copy_from_slice(edges.row(i % n));
    }
    tiled
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keep_top_keeps_exactly_the_budget_with_ties_by_index() {
        for keep in 0..=12 {
            let m = keep_top(3, 4, keep, |_, _| Rank {
                level: 0,
                weight: 1.0,
            });
            assert_eq!(m.count(), keep);
            let kept: Vec<usize> = (0..3)
                .flat_map(|i| m.row_ones(i).map(move |j| i * 4 + j).collect::<Vec<_>>())
                .collect();
            assert_eq!(kept, (0..keep).collect::<Vec<_>>());
        }
    }

    #[test]
    fn tiling_repeats_blocks_and_not_rows() {
        let m = BitMatrix::from_fn(2, 2, |i, j| i == 0 && j == 1);
        let t = tile(&m, 3);
        let rows: Vec<bool> = (0..6).map(|i| t.get(i, 1)).collect();
        assert_eq!(rows, [true, false, true, false, true, false]);
    }
}
