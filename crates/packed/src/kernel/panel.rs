//! Products with many tokens: values of two tiles and 256 columns are widened to floats once and multiplied with all tokens.
//!
//! Sums run over 256 columns in ascending order by fused multiply-adds, then over those parts: the same on all machines
//! and for any number of tokens.

use super::codes::Codes;
use super::format::{Format, Place, widen};
use super::tail::{Float, load_part, store};
use crate::block_type::K_BLOCK;
use crate::machine::{Kernel, Machine};
use crate::output::Claim;
use crate::tile::{BLOCK, TILE_ROWS, Tiles};

/// Columns of a panel.
pub(crate) const DEPTH: usize = K_BLOCK;
/// Tokens that are multiplied at once.
pub(crate) const GROUP: usize = 12;
/// Rows of a panel.
const WIDTH: usize = 2 * TILE_ROWS;

/// A panel, column by column.
pub(crate) type Panel = [[f32; WIDTH]; DEPTH];

/// Activations in groups of tokens, column by column: `[groups][cols][GROUP]`, the last group filled with zeros.
pub(crate) struct Transposed {
    tokens: usize,
    cols: usize,
    data: Vec<[f32; GROUP]>,
}

impl Transposed {
    /// From `[tokens, cols]`. With `order`, position i is column `order[i]`.
    pub(crate) fn new(x: &[f32], cols: usize, order: Option<&[u32]>) -> Self {
        let tokens = x.len() / cols.max(1);
        let mut data = vec![[0.0; GROUP]; tokens.div_ceil(GROUP) * cols];
        for (data, x) in data
            .chunks_exact_mut(cols.max(1))
            .zip(x.chunks(GROUP * cols.max(1)))
        {
            for (t, x) in x.chunks_exact(cols).enumerate() {
                match order {
                    None => data.iter_mut().zip(x).for_each(|(to, &x)| to[t] = x),
                    Some(order) => data
                        .iter_mut()
                        .zip(order)
                        .for_each(|(to, &column)| to[t] = x[column as usize]),
                }
            }
        }
        Self { tokens, cols, data }
    }
}

/// The part of a matrix that a panel takes.
#[derive(Clone, Copy)]
pub(crate) struct Part {
    /// Rows.
    pub(super) tile: usize,
    /// The first column, a multiple of [`DEPTH`].
    pub(super) first: usize,
    /// Columns.
    pub(super) count: usize,
    /// Which half of the panel's rows.
    pub(super) half: usize,
}

/// Writes the values of a part of a quantised matrix to a panel.
pub(crate) struct WidenTiles<'a, F> {
    pub(crate) format: F,
    pub(crate) tiles: &'a Tiles,
    pub(crate) part: Part,
    pub(crate) panel: &'a mut Panel,
}

impl<F: Format> Kernel for WidenTiles<'_, F> {
    type Output = ();
    const BYTES: bool = false;

    #[inline(always)]
    fn run<M: Machine>(self, m: M) {
        let Self {
            format,
            tiles,
            part,
            panel,
        } = self;
        let planes = F::Codes::PLANES;
        let table = F::Codes::table(m);
        let blocks = tiles.cols().div_ceil(BLOCK);
        let chunk = format.chunk(blocks);
        let lines = tiles.tile(part.tile);
        let (panels, _) = panel.as_chunks_mut::<BLOCK>();
        let wanted = part.count.div_ceil(BLOCK);
        for (b, panel) in (part.first / BLOCK..).zip(panels).take(wanted) {
            let before = b / chunk;
            let in_chunk = chunk.min(blocks - before * chunk);
            let start = before * (format.head(chunk) + chunk * planes);
            let (head, codes) = lines[start..].split_at(format.head(in_chunk));
            let place = Place {
                head,
                b: b % chunk,
                planes: &codes[b % chunk * planes..][..planes],
            };
            widen(m, format, place, table, part.half * TILE_ROWS, panel);
        }
    }
}

/// Writes the values of a part of a dense matrix to a panel.
pub(crate) struct WidenDense<'a> {
    pub(crate) float: Float,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) data: &'a [u8],
    pub(crate) part: Part,
    pub(crate) panel: &'a mut Panel,
}

impl Kernel for WidenDense<'_> {
    type Output = ();
    const BYTES: bool = false;

    #[inline(always)]
    fn run<M: Machine>(self, m: M) {
        let Part {
            tile,
            first,
            count,
            half,
        } = self.part;
        let width = self.float.bytes();
        let rows = tile * TILE_ROWS..self.rows.min((tile + 1) * TILE_ROWS);
        for start in (0..count).step_by(TILE_ROWS) {
            let part = TILE_ROWS.min(count - start);
            let mut square = [m.splat_f(0.0); TILE_ROWS];
            for (values, row) in square.iter_mut().zip(rows.clone()) {
                let at = (row * self.cols + first + start) * width;
                let bytes = &self.data[at..at + part * width];
                *values = match part {
                    TILE_ROWS => self.float.load(m, bytes),
                    _ => {
                        let mut filled = [0; 4 * TILE_ROWS];
                        filled[..bytes.len()].copy_from_slice(bytes);
                        self.float.load(m, &filled)
                    }
                };
            }
            let columns = m.transpose(square);
            for (to, column) in self.panel[start..start + part].iter_mut().zip(columns) {
                let to = &mut to[half * TILE_ROWS..];
                m.store_f(column, to.first_chunk_mut().expect("16 rows"));
            }
        }
    }
}

/// The products of the tiles of a claim.
pub(crate) struct Panels<'a, 'c> {
    /// Writes values to the panel.
    pub(crate) widen: &'a dyn Fn(Part, &mut Panel),
    pub(crate) x: &'a Transposed,
    pub(crate) claim: &'a mut Claim<'c>,
}

impl Kernel for Panels<'_, '_> {
    type Output = ();
    const BYTES: bool = false;

    #[inline(always)]
    fn run<M: Machine>(self, m: M) {
        let Transposed { tokens, cols, .. } = *self.x;
        let mut panel: Box<Panel> = vec![[0.0; WIDTH]; DEPTH].try_into().expect("DEPTH columns");
        let tiles = self.claim.tiles();
        for tile in tiles.clone().step_by(2) {
            let pair = if tile + 1 < tiles.end { 2 } else { 1 };
            if cols == 0 {
                for half in 0..pair {
                    for token in 0..tokens {
                        self.claim.part(tile + half, token).fill(0.0);
                    }
                }
            }
            for first in (0..cols).step_by(DEPTH) {
                let count = DEPTH.min(cols - first);
                for half in 0..pair {
                    let part = Part {
                        tile: tile + half,
                        first,
                        count,
                        half,
                    };
                    (self.widen)(part, &mut panel);
                }
                let groups = self.x.data.chunks_exact(cols);
                for (group, x) in groups.enumerate() {
                    let x = &x[first..first + count];
                    let panel = &panel[..count];
                    let mut put = |token: usize, half: usize, sum: M::F| {
                        if token < tokens && half < pair {
                            let to = self.claim.part(tile + half, token);
                            let sum = match first {
                                0 => sum,
                                _ => m.add_f(load_part(m, to), sum),
                            };
                            store(m, sum, to);
                        }
                    };
                    if M::WIDE {
                        let sums = products::<M, 2, GROUP>(m, panel, 0, x, 0);
                        for (half, sums) in sums.into_iter().enumerate() {
                            for (t, sum) in sums.into_iter().enumerate() {
                                put(group * GROUP + t, half, sum);
                            }
                        }
                    } else {
                        const PART: usize = GROUP / 2;
                        for half in 0..pair {
                            for part in 0..2 {
                                let [sums] = products::<M, 1, PART>(m, panel, half, x, part * PART);
                                for (t, sum) in sums.into_iter().enumerate() {
                                    put(group * GROUP + part * PART + t, half, sum);
                                }
                            }
                        }
                    }
                }
            }
        }
    }
}

#[inline(always)]
fn products<M: Machine, const TILES: usize, const T: usize>(
    m: M,
    panel: &[[f32; WIDTH]],
    tile: usize,
    x: &[[f32; GROUP]],
    token: usize,
) -> [[M::F; T]; TILES] {
    let mut acc = [[m.splat_f(0.0); T]; TILES];
    for (values, x) in panel.iter().zip(x) {
        let mut w = [m.splat_f(0.0); TILES];
        for (i, w) in w.iter_mut().enumerate() {
            let at = (tile + i) * TILE_ROWS;
            *w = m.load_f(values[at..at + TILE_ROWS].first_chunk().expect("16 rows"));
        }
        // Tokens outside: one value of x at a time is in a register, and the sums have room in the others.
        for t in 0..T {
            let x = m.splat_f(x[token + t]);
            for (w, acc) in w.iter().zip(&mut acc) {
                acc[t] = m.fma(*w, x, acc[t]);
            }
        }
    }
    acc
}
