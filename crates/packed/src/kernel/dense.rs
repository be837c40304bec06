//! Products of dense rows in place with a few tokens.
//!
//! A sum has 32 lanes: of `BF16` the even columns of 32 and the odd ones, else the first 16 and the last. They are added
//! lane by lane, then by [`Machine::reduce`]. A row's end is filled with zeros.

use super::tail::Float;
use super::tiles::Tokens;
use crate::input::FloatBlock;
use crate::machine::{Kernel, Machine};
use crate::output::Claim;
use crate::tile::{BLOCK, TILE_ROWS};

/// Orders the columns of a block as the lanes of a sum.
pub(crate) fn lanes(float: Float, x: &[f32; BLOCK]) -> [f32; BLOCK] {
    match float {
        Float::BF16 => std::array::from_fn(|i| x[i % 16 * 2 + i / 16]),
        Float::F32 | Float::F16 => *x,
    }
}

/// 32 columns of a row.
trait Row {
    const BYTES: usize;
    fn load<M: Machine>(m: M, bytes: &[u8]) -> [M::F; 2];
}

struct Single;
struct Half;
struct Brain;

impl Row for Single {
    const BYTES: usize = 4 * BLOCK;
    #[inline(always)]
    fn load<M: Machine>(m: M, bytes: &[u8]) -> [M::F; 2] {
        let (low, high) = bytes[..Self::BYTES].split_at(Self::BYTES / 2);
        let low = m.load_f_bytes(low.first_chunk().expect("64 bytes"));
        [low, m.load_f_bytes(high.first_chunk().expect("64 bytes"))]
    }
}

impl Row for Half {
    const BYTES: usize = 2 * BLOCK;
    #[inline(always)]
    fn load<M: Machine>(m: M, bytes: &[u8]) -> [M::F; 2] {
        let (low, high) = bytes[..Self::BYTES].split_at(Self::BYTES / 2);
        let low = m.load_f16(low.first_chunk().expect("32 bytes"));
        [low, m.load_f16(high.first_chunk().expect("32 bytes"))]
    }
}

impl Row for Brain {
    const BYTES: usize = 2 * BLOCK;
    #[inline(always)]
    fn load<M: Machine>(m: M, bytes: &[u8]) -> [M::F; 2] {
        m.bf16_pairs(m.load(bytes.first_chunk().expect("64 bytes")))
    }
}

/// Bytes of a page of memory.
const PAGE: usize = 4096;

/// The products of the tiles of a claim.
pub(crate) struct Dense<'a, 'c> {
    pub(crate) float: Float,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) data: &'a [u8],
    /// In the order of [`lanes`].
    pub(crate) x: Tokens<'a, FloatBlock>,
    pub(crate) claim: &'a mut Claim<'c>,
}

impl Kernel for Dense<'_, '_> {
    type Output = ();
    const BYTES: bool = false;

    #[inline(always)]
    fn run<M: Machine>(self, m: M) {
        match self.float {
            Float::F32 => self.rows::<M, Single>(m),
            Float::F16 => self.rows::<M, Half>(m),
            Float::BF16 => self.rows::<M, Brain>(m),
        }
    }
}

impl Dense<'_, '_> {
    #[inline(always)]
    fn rows<M: Machine, R: Row>(mut self, m: M) {
        let tokens = self.claim.tokens();
        for tile in self.claim.tiles() {
            let rows = tile * TILE_ROWS..self.rows.min((tile + 1) * TILE_ROWS);
            let mut token = 0;
            while token < tokens {
                if tokens - token >= 4 {
                    self.some::<M, R, 4>(m, tile, rows.clone(), token);
                    token += 4;
                } else {
                    self.some::<M, R, 1>(m, tile, rows.clone(), token);
                    token += 1;
                }
            }
        }
    }

    #[inline(always)]
    fn some<M: Machine, R: Row, const T: usize>(
        &mut self,
        m: M,
        tile: usize,
        rows: std::ops::Range<usize>,
        token: usize,
    ) {
        let mut values = [[0.0; TILE_ROWS]; T];
        // Several rows at once hide the latency of sums; short ones are faster in the order of memory, which the processor
        // foresees up to the end of a page.
        let long = self.cols * self.float.bytes() > PAGE;
        let mut row = rows.start;
        let mut put = |row: usize, sums: [f32; T]| {
            for (values, sum) in values.iter_mut().zip(sums) {
                values[row - rows.start] = sum;
            }
        };
        while row < rows.end {
            let left = rows.end - row;
            if T == 1 && M::DENSE_ROWS >= 4 && left >= 4 && long {
                let sums = self.sums::<M, R, 4, T>(m, row, token);
                sums.into_iter()
                    .enumerate()
                    .for_each(|(i, sums)| put(row + i, sums));
                row += 4;
            } else if M::DENSE_ROWS >= 2 && left >= 2 && (T > 1 || long) {
                let sums = self.sums::<M, R, 2, T>(m, row, token);
                sums.into_iter()
                    .enumerate()
                    .for_each(|(i, sums)| put(row + i, sums));
                row += 2;
            } else {
                let [sums] = self.sums::<M, R, 1, T>(m, row, token);
                put(row, sums);
                row += 1;
            }
        }
        for (t, values) in values.iter().enumerate() {
            let to = self.claim.part(tile, token + t);
            to.copy_from_slice(&values[..to.len()]);
        }
    }

    #[inline(always)]
    fn sums<M: Machine, R: Row, const ROWS: usize, const T: usize>(
        &self,
        m: M,
        row: usize,
        token: usize,
    ) -> [[f32; T]; ROWS] {
        let row_bytes = self.cols * self.float.bytes();
        let mut w = [&self.data[..0]; ROWS];
        for (i, w) in w.iter_mut().enumerate() {
            *w = &self.data[(row + i) * row_bytes..][..row_bytes];
        }
        let mut x = [self.x.token(token); T];
        for (t, x) in x.iter_mut().enumerate() {
            *x = self.x.token(token + t);
        }
        let mut acc = [[[m.splat_f(0.0); 2]; T]; ROWS];
        let whole = self.cols / BLOCK;
        for b in 0..whole {
            for (w, acc) in w.iter().zip(&mut acc) {
                let w = R::load(m, &w[b * R::BYTES..(b + 1) * R::BYTES]);
                for (x, acc) in x.iter().zip(acc) {
                    add(m, w, &x[b], acc);
                }
            }
        }
        if !self.cols.is_multiple_of(BLOCK) {
            for (w, acc) in w.iter().zip(&mut acc) {
                let rest = &w[whole * R::BYTES..];
                let mut filled = [0; 4 * BLOCK];
                filled[..rest.len()].copy_from_slice(rest);
                let w = R::load(m, &filled);
                for (x, acc) in x.iter().zip(acc) {
                    add(m, w, &x[whole], acc);
                }
            }
        }
        let mut sums = [[0.0; T]; ROWS];
        for (sums, acc) in sums.iter_mut().zip(acc) {
            for (sum, [low, high]) in sums.iter_mut().zip(acc) {
                *sum = m.reduce(m.add_f(low, high));
            }
        }
        sums
    }
}

#[inline(always)]
fn add<M: Machine>(m: M, w: [M::F; 2], x: &FloatBlock, acc: &mut [M::F; 2]) {
    let (x_low, x_high) = x.x.split_at(16);
    let x_low = m.load_f(x_low.first_chunk().expect("16 values"));
    let x_high = m.load_f(x_high.first_chunk().expect("16 values"));
    acc[0] = m.fma(w[0], x_low, acc[0]);
    acc[1] = m.fma(w[1], x_high, acc[1]);
}
