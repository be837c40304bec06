//! Products with many tokens of which both factors are rounded to brain floats.
//!
//! Sums run over the pairs of 256 columns in ascending order as [`machine::bf16`](crate::machine::bf16) defines, then over
//! those parts in f32: the same on all machines and for any number of tokens.

use super::panel::{DEPTH, GROUP, Panel, Part};
use super::tail::{load_part, store};
use crate::level::Level;
use crate::machine::bf16::{WIDTH, pair, products};
use crate::machine::{Kernel, Machine};
use crate::output::Claim;
use crate::tile::TILE_ROWS;

/// Rounded activations in groups of tokens, by pairs of columns: `[groups][pairs][GROUP]`, filled with zeros.
pub(crate) struct Pairs {
    tokens: usize,
    cols: usize,
    data: Vec<[u32; GROUP]>,
}

impl Pairs {
    /// From `[tokens, cols]`. With `order`, position i is column `order[i]`.
    pub(crate) fn new(x: &[f32], cols: usize, order: Option<&[u32]>) -> Self {
        let tokens = x.len() / cols.max(1);
        let pairs = cols.div_ceil(2);
        let mut data = vec![[0; GROUP]; tokens.div_ceil(GROUP) * pairs];
        for (data, x) in data
            .chunks_exact_mut(pairs.max(1))
            .zip(x.chunks(GROUP * cols.max(1)))
        {
            for (t, x) in x.chunks_exact(cols).enumerate() {
                let gathered: Vec<f32>;
                let x = match order {
                    None => x,
                    Some(order) => {
                        gathered = order.iter().map(|&column| x[column as usize]).collect();
                        &gathered
                    }
                };
                let (columns, rest) = x.as_chunks::<2>();
                let mut data = data.iter_mut();
                for (&[even, odd], to) in columns.iter().zip(data.by_ref()) {
                    to[t] = pair(even, odd);
                }
                if let (Some(to), &[even]) = (data.next(), rest) {
                    to[t] = pair(even, 0.0);
                }
            }
        }
        Self { tokens, cols, data }
    }
}

/// The products of the tiles of a claim.
pub(crate) struct PairPanels<'a, 'c> {
    /// Writes values to the panel.
    pub(crate) widen: &'a dyn Fn(Part, &mut Panel),
    pub(crate) x: &'a Pairs,
    pub(crate) level: Level,
    pub(crate) claim: &'a mut Claim<'c>,
}

impl Kernel for PairPanels<'_, '_> {
    type Output = ();
    const BYTES: bool = false;

    #[inline(always)]
    fn run<M: Machine>(self, m: M) {
        let Pairs { tokens, cols, .. } = *self.x;
        let mut panel: Box<Panel> = vec![[0.0; WIDTH]; DEPTH].try_into().expect("DEPTH columns");
        let mut pairs = vec![[0; WIDTH]; DEPTH / 2];
        let tiles = self.claim.tiles();
        for tile in tiles.clone().step_by(2) {
            let halves = if tile + 1 < tiles.end { 2 } else { 1 };
            for first in (0..cols).step_by(DEPTH) {
                let count = DEPTH.min(cols - first);
                for half in 0..halves {
                    let tile = tile + half;
                    let part = Part {
                        tile,
                        first,
                        count,
                        half,
                    };
                    (self.widen)(part, &mut panel);
                }
                if let Some(beyond) = panel.get_mut(count) {
                    *beyond = [0.0; WIDTH];
                }
                let pairs = &mut pairs[..count.div_ceil(2)];
                let (columns, _) = panel.as_chunks::<2>();
                for (pairs, [even, odd]) in pairs.iter_mut().zip(columns) {
                    for (to, (&even, &odd)) in pairs.iter_mut().zip(even.iter().zip(odd)) {
                        *to = pair(even, odd);
                    }
                }
                let groups = self.x.data.chunks_exact(cols.div_ceil(2));
                for (group, x) in groups.enumerate() {
                    let x = &x[first / 2..][..pairs.len()];
                    let sums = products(self.level, pairs, x);
                    for (token, sums) in (group * GROUP..tokens).zip(&sums) {
                        for (half, sums) in sums.chunks_exact(TILE_ROWS).take(halves).enumerate() {
                            let to = self.claim.part(tile + half, token);
                            let sum = m.load_f(sums.first_chunk().expect("16 rows"));
                            let sum = match first {
                                0 => sum,
                                _ => m.add_f(load_part(m, to), sum),
                            };
                            store(m, sum, to);
                        }
                    }
                }
            }
        }
    }
}
