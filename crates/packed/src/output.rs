//! Results of a product, written by several threads: rows are claimed by tiles, each tile once.

use std::marker::PhantomData;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::tile::TILE_ROWS;

/// `[tokens, rows]`, row-major.
pub(crate) struct Output<'a> {
    values: *mut f32,
    tokens: usize,
    rows: usize,
    /// Tiles that are claimed.
    claimed: AtomicUsize,
    /// Tiles of a claim.
    grain: usize,
    lifetime: PhantomData<&'a mut [f32]>,
}

// SAFETY: the values are exclusively borrowed for 'a, and threads reach them through claims only, of which no two have a
// tile in common: `claim` takes each from the counter once.
unsafe impl Sync for Output<'_> {}

impl<'a> Output<'a> {
    /// All of `values`, to be claimed `grain` tiles at a time.
    ///
    /// # Panics
    /// When `values` are not `tokens` times `rows`.
    pub(crate) fn new(values: &'a mut [f32], tokens: usize, rows: usize, grain: usize) -> Self {
        assert_eq!(values.len(), tokens * rows, "values of the product");
        Self {
            values: values.as_mut_ptr(),
            tokens,
            rows,
            claimed: AtomicUsize::new(0),
            grain: grain.max(1),
            lifetime: PhantomData,
        }
    }

    /// The next tiles that nobody has; None when all are taken.
    pub(crate) fn claim(&self) -> Option<Claim<'_>> {
        let tiles = self.rows.div_ceil(TILE_ROWS);
        // Not counted further once all are taken, so that the counter does not overflow.
        if self.claimed.load(Ordering::Relaxed) >= tiles {
            return None;
        }
        let first = self.claimed.fetch_add(self.grain, Ordering::Relaxed);
        (first < tiles).then(|| Claim {
            output: self,
            tiles: first..tiles.min(first + self.grain),
        })
    }
}

/// Exclusive right to write some tiles.
pub(crate) struct Claim<'a> {
    output: &'a Output<'a>,
    tiles: Range<usize>,
}

impl Claim<'_> {
    /// The tiles.
    pub(crate) fn tiles(&self) -> Range<usize> {
        self.tiles.clone()
    }

    /// Tokens.
    pub(crate) fn tokens(&self) -> usize {
        self.output.tokens
    }

    /// Values of the rows of a tile for a token: 16, fewer in the last tile.
    ///
    /// # Panics
    /// When the tile is not one of the claim, or there is no such token.
    #[inline(always)]
    pub(crate) fn part(&mut self, tile: usize, token: usize) -> &mut [f32] {
        assert!(self.tiles.contains(&tile) && token < self.output.tokens);
        let first = tile * TILE_ROWS;
        let count = TILE_ROWS.min(self.output.rows - first);
        // SAFETY: `first + count <= rows` and `token < tokens`, so the part lies within the values, which are borrowed for
        // the output's lifetime. No other claim has the tile, and `&mut self` keeps this one from lending it twice.
        unsafe {
            let start = self.output.values.add(token * self.output.rows + first);
            std::slice::from_raw_parts_mut(start, count)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_is_claimed_once_by_whichever_thread() {
        let (tokens, rows) = (3, 16 * 9 + 5);
        let mut values = vec![0.0; tokens * rows];
        let output = Output::new(&mut values, tokens, rows, 2);
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    while let Some(mut claim) = output.claim() {
                        for tile in claim.tiles() {
                            for token in 0..claim.tokens() {
                                for value in claim.part(tile, token) {
                                    *value += 1.0;
                                }
                            }
                        }
                    }
                });
            }
        });
        assert!(output.claim().is_none());
        assert!(values.iter().all(|&value| value == 1.0));
    }
}
