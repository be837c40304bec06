//! The one-step order: the network unrolled over a single step is a bipartite poset (neuron now, neuron next), always acyclic.
//!
//! Its completion is, up to the merging of equal rows, the concept lattice of the context (V, V, A) of formal concept
//! analysis. A row is irreducible iff it is not the intersection of the rows that strictly contain it (the classical
//! reduction of a context; Ganter and Wille 1999). No closure, no components; defined for every relation.

use super::bits::{self, BitMatrix};

/// For each row, whether it differs from the intersection of the rows strictly containing it (the empty intersection being
/// the full row). Equal rows share the verdict.
pub fn irreducible_rows(relation: &BitMatrix) -> Vec<bool> {
    irreducible_rows_with(relation, &relation.transpose())
}

/// The same where the transposed relation is at hand. The rows containing a row are the intersection of the columns of its
/// elements, which in scattered relations shrinks to the row itself after a few columns.
pub(crate) fn irreducible_rows_with(relation: &BitMatrix, columns: &BitMatrix) -> Vec<bool> {
    let (n, width) = (relation.rows(), relation.cols());
    let sizes: Vec<usize> = (0..n).map(|x| bits::count(relation.row(x))).collect();
    let mut supersets = vec![0u64; n.div_ceil(64)];
    let mut meet = vec![0u64; width.div_ceil(64)];
    (0..n)
        .map(|x| {
            let own = sizes[x];
            bits::fill_ones(&mut supersets, n);
            for e in relation.row_ones(x) {
                if bits::and_count(&mut supersets, columns.row(e)) == 1 {
                    // Only the row itself: the intersection is empty and so everything.
                    return own != width;
                }
            }
            bits::fill_ones(&mut meet, width);
            let mut size = width;
            for y in bits::ones(&supersets).filter(|&y| sizes[y] > own) {
                if size == own {
                    break;
                }
                size = bits::and_count(&mut meet, relation.row(y));
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
