//! Products of tiles with a few tokens, in int8 or float arithmetic.

use super::codes::Codes;
use super::format::{Format, Place};
use super::tail::store;
use crate::input::{FloatBlock, Int8Block};
use crate::machine::{Kernel, Machine, prefetch};
use crate::output::Claim;
use crate::tile::{Line, Tiles};

/// Tokens whose activations stay in the cache while all tiles of a claim pass.
const TOKEN_BLOCK: usize = 64;

/// Lines by which products of floats ask the memory ahead. They keep the processor so busy that it looks too little ahead
/// by itself; products of bytes it serves best undisturbed.
const AHEAD: usize = 128;

/// Blocks of all tokens, `[tokens, blocks]`.
#[derive(Clone, Copy)]
pub(crate) struct Tokens<'a, B> {
    pub(crate) blocks: usize,
    pub(crate) data: &'a [B],
}

impl<'a, B> Tokens<'a, B> {
    #[inline(always)]
    pub(crate) fn token(&self, token: usize) -> &'a [B] {
        &self.data[token * self.blocks..][..self.blocks]
    }
}

/// The two arithmetics.
pub(crate) trait Arithmetic: Copy {
    /// Activations of 32 columns.
    type Block: Copy;
    /// Whether it multiplies bytes.
    const BYTES: bool;
    /// Whether it multiplies floats.
    const FLOATS: bool;
    /// Adds a block of a tile for some tokens.
    fn block<M: Machine, F: Format, const T: usize>(
        m: M,
        format: F,
        block: Place<'_>,
        table: M::Table,
        x: [&Self::Block; T],
        acc: &mut [M::F; T],
    );
}

/// Activations rounded to bytes.
#[derive(Clone, Copy)]
pub(crate) struct Int8;
/// Activations as they are.
#[derive(Clone, Copy)]
pub(crate) struct Floats;

impl Arithmetic for Int8 {
    type Block = Int8Block;
    const BYTES: bool = true;
    const FLOATS: bool = false;

    #[inline(always)]
    fn block<M: Machine, F: Format, const T: usize>(
        m: M,
        format: F,
        block: Place<'_>,
        _table: M::Table,
        x: [&Int8Block; T],
        acc: &mut [M::F; T],
    ) {
        format.int8(m, block, x, acc);
    }
}

impl Arithmetic for Floats {
    type Block = FloatBlock;
    const BYTES: bool = false;
    const FLOATS: bool = true;

    #[inline(always)]
    fn block<M: Machine, F: Format, const T: usize>(
        m: M,
        format: F,
        block: Place<'_>,
        table: M::Table,
        x: [&FloatBlock; T],
        acc: &mut [M::F; T],
    ) {
        format.float(m, block, table, x, acc);
    }
}

/// The products of the tiles of a claim.
pub(crate) struct Products<'a, 'c, F, A: Arithmetic> {
    pub(crate) format: F,
    pub(crate) tiles: &'a Tiles,
    pub(crate) x: Tokens<'a, A::Block>,
    pub(crate) claim: &'a mut Claim<'c>,
}

impl<F: Format, A: Arithmetic> Kernel for Products<'_, '_, F, A> {
    type Output = ();
    const BYTES: bool = A::BYTES;

    #[inline(always)]
    fn run<M: Machine>(mut self, m: M) {
        let tokens = self.claim.tokens();
        for start in (0..tokens).step_by(TOKEN_BLOCK) {
            let end = tokens.min(start + TOKEN_BLOCK);
            for tile in self.claim.tiles() {
                let mut token = start;
                while token < end {
                    let left = end - token;
                    // Which tokens go together changes no result: each has sums of its own.
                    if M::EIGHT && A::BYTES && left >= 8 {
                        self.some::<M, 8>(m, tile, token);
                        token += 8;
                    } else if M::EIGHT && A::FLOATS && left >= 4 {
                        self.some::<M, 4>(m, tile, token);
                        token += 4;
                    } else if M::TWO && A::BYTES && left >= 2 {
                        self.some::<M, 2>(m, tile, token);
                        token += 2;
                    } else {
                        self.some::<M, 1>(m, tile, token);
                        token += 1;
                    }
                }
            }
        }
    }
}

impl<F: Format, A: Arithmetic> Products<'_, '_, F, A> {
    #[inline(always)]
    fn some<M: Machine, const T: usize>(&mut self, m: M, tile: usize, token: usize) {
        let mut x = [self.x.token(token); T];
        for (t, x) in x.iter_mut().enumerate() {
            *x = self.x.token(token + t);
        }
        let acc = tile_sums::<M, F, A, T>(m, self.format, self.tiles.tile(tile), x);
        for (t, &sum) in acc.iter().enumerate() {
            store(m, sum, self.claim.part(tile, token + t));
        }
    }
}

#[inline(always)]
fn tile_sums<M: Machine, F: Format, A: Arithmetic, const T: usize>(
    m: M,
    format: F,
    tile: &[Line],
    x: [&[A::Block]; T],
) -> [M::F; T] {
    let table = F::Codes::table(m);
    let mut acc = [m.splat_f(0.0); T];
    let mut lines = tile;
    let mut first = 0;
    let blocks = x[0].len();
    while first < blocks {
        let count = format.chunk(blocks).min(blocks - first);
        let (head, rest) = lines.split_at(format.head(count));
        let (codes, rest) = rest.split_at(count * F::Codes::PLANES);
        let share = (head.len() + codes.len()).div_ceil(count);
        let ahead = lines.as_ptr().wrapping_add(AHEAD);
        for (b, planes) in codes.chunks_exact(F::Codes::PLANES).enumerate() {
            if A::FLOATS {
                for line in b * share..(b + 1) * share {
                    prefetch(ahead.wrapping_add(line));
                }
            }
            let mut block_x = [&x[0][first + b]; T];
            for (t, block_x) in block_x.iter_mut().enumerate() {
                *block_x = &x[t][first + b];
            }
            let place = Place { head, b, planes };
            A::block(m, format, place, table, block_x, &mut acc);
        }
        lines = rest;
        first += count;
    }
    acc
}
