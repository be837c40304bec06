//! Masks made of rectangular blocks.

use super::select::{Rank, keep_top};
use crate::order::bits::BitMatrix;
use serde::{Deserialize, Serialize};

/// Size of the blocks of a mask. Where a matrix is no multiple of it, the last blocks are cut off.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Block {
    /// Targets (rows).
    pub rows: usize,
    /// Sources (columns).
    pub cols: usize,
}

impl Block {
    /// Number of blocks down and across a `rows` x `cols` matrix.
    pub fn grid(self, rows: usize, cols: usize) -> (usize, usize) {
        (rows.div_ceil(self.rows), cols.div_ceil(self.cols))
    }

    /// The `keep` blocks of a `rows` x `cols` matrix with the largest sums of `weight`, ties by index.
    pub(crate) fn keep_largest(
        self,
        rows: usize,
        cols: usize,
        keep: usize,
        weight: impl Fn(usize, usize) -> f64,
    ) -> BitMatrix {
        let (down, across) = self.grid(rows, cols);
        let mut sums = vec![0.0; down * across];
        for i in 0..rows {
            for j in 0..cols {
                sums[i / self.rows * across + j / self.cols] += weight(i, j);
            }
        }
        let kept = keep_top(down, across, keep, |a, b| Rank {
            level: 0,
            weight: sums[a * across + b],
        });
        BitMatrix::from_fn(rows, cols, |i, j| kept.get(i / self.rows, j / self.cols))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_blocks_are_kept_whole_and_cut_off_at_the_border() {
        let block = Block { rows: 2, cols: 3 };
        assert_eq!(block.grid(5, 7), (3, 3));
        // Block (2, 2) holds row 4, column 6 only.
        let heavy =
            |i: usize, j: usize| f64::from(u8::from((i, j) == (4, 6) || (i / 2, j / 3) == (0, 1)));
        let kept = block.keep_largest(5, 7, 2, heavy);
        for i in 0..5 {
            for j in 0..7 {
                let expected = (i < 2 && (3..6).contains(&j)) || (i, j) == (4, 6);
                assert_eq!(kept.get(i, j), expected, "{i} {j}");
            }
        }
    }
}
