//! The one-step order: the network unrolled over a single step is a bipartite poset (neuron now, neuron next), always acyclic.
//!
//! Its completion is, up to the merging of equal rows, the concept lattice of the context (V, V, A) of formal concept
//! analysis. A row is irreducible iff it is not the intersection of the rows that strictly contain it (the classical
//! reduction of a context; Ganter and Wille 1999). No closure, no components; defined for every relation.

use super::bits::{self, BitMatrix};

/// For each row, whether it differs from the intersection of the rows strictly containing it (the empty intersection being
/// the full row). Equal rows share the verdict.
pub fn irreducible_rows(relation: &BitMatrix) -> Vec<bool> {
    let sizes: Vec<usize> = (0..relation.rows())
        .map(|x| bits::count(relation.row(x)))
        .collect();
    // Only a larger row can strictly contain a row.
    let mut by_size: Vec<usize> = (0..relation.rows()).collect();
    by_size.sort_by_key(|&x| sizes[x]);
    let mut meet = vec![0u64; relation.cols().div_ceil(64)];
    (0..relation.rows())
        .map(|x| {
            let row = relation.row(x);
            let own = sizes[x];
            bits::fill_ones(&mut meet, relation.cols());
            let mut size = relation.cols();
            let larger = by_size.partition_point(|&y| sizes[y] <= own);
            for &y in &by_size[larger..] {
                if size == own {
                    break;
                }
                if bits::is_subset(row, relation.row(y)) {
                    size = bits::and_count(&mut meet, relation.row(y));
                }
            }
            size != own
        })
        .collect()
}

/// Number of distinct rows and how often the commonest occurs.
pub(crate) fn row_classes(relation: &BitMatrix) -> (usize, usize) {
    let mut order: Vec<usize> = (0..relation.rows()).collect();
    order.sort_unstable_by(|&a, &b| relation.row(a).cmp(relation.row(b)));
    let runs = order.chunk_by(|&a, &b| relation.row(a) == relation.row(b));
    runs.fold((0, 0), |(n, largest), run| (n + 1, largest.max(run.len())))
}
