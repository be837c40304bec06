//! One block of a tile in the arithmetic of each family of types.

#![allow(
    clippy::needless_range_loop,
    reason = "an index of tokens or columns runs over several arrays at once"
)]

use std::marker::PhantomData;

use super::codes::Codes;
use crate::input::{FloatBlock, Int8Block};
use crate::machine::Machine;
use crate::tile::{BLOCK, K_CHUNK, Line, OFFSET_CHUNK, PLAIN_CHUNK, TILE_ROWS};

/// Repeats a block of code for g = 0 to 7: with constants where the machine wants straight code, else in a loop.
macro_rules! eight_times {
    ($machine:ident, $g:ident => $body:block) => {
        if $machine::STRAIGHT {
            eight_times!(@ $g $body 0 1 2 3 4 5 6 7);
        } else {
            for $g in 0..8 $body
        }
    };
    (@ $g:ident $body:block $($n:literal)*) => {
        $( { let $g = $n; $body } )*
    };
}
/// The same for j = 0 to 3.
macro_rules! four_times {
    ($machine:ident, $j:ident => $body:block) => {
        if $machine::STRAIGHT {
            eight_times!(@ $j $body 0 1 2 3);
        } else {
            for $j in 0..4 $body
        }
    };
}

/// A family of types: how a block of 32 columns adds to the sums of 16 rows.
///
/// Int8: `acc += (d dₐ) Σ s (Σ q a − zero Σ a)`, the inner part in exact integers, then for each minimum
/// `acc += m (dₐ Σ a)`. Floats: `acc += (d s) Σ (q − zero) a` for each scale, then `acc += m Σ a` for each minimum.
/// Each `+=` is a fused multiply-add.
pub(crate) trait Format: Copy + Send + Sync {
    /// The codes.
    type Codes: Codes;
    /// Whether the halves of a block have scales of their own.
    const HALVES: bool;

    /// Blocks of a chunk, of so many in a row.
    #[inline(always)]
    fn chunk(self, _blocks: usize) -> usize {
        K_CHUNK
    }
    /// Lines of scales in front of a chunk of so many blocks.
    fn head(self, blocks: usize) -> usize;

    /// Adds block `b` of a chunk for some tokens.
    fn int8<M: Machine, const T: usize>(
        self,
        m: M,
        block: Place<'_>,
        x: [&Int8Block; T],
        acc: &mut [M::F; T],
    );

    /// The same with floats: by what [`scale`](Self::scale) says.
    #[inline(always)]
    fn float<M: Machine, const T: usize>(
        self,
        m: M,
        block: Place<'_>,
        table: M::Table,
        x: [&FloatBlock; T],
        acc: &mut [M::F; T],
    ) {
        let (first, first_min) = self.scale(m, block, 0);
        if !Self::HALVES {
            let all = sums::<M, Self::Codes, 0, 8, T>(m, block.planes, table, x);
            for t in 0..T {
                acc[t] = m.fma(first, all[t], acc[t]);
                if let Some(min) = first_min {
                    acc[t] = m.fma(min, m.splat_f(x[t].sum), acc[t]);
                }
            }
            return;
        }
        let (second, second_min) = self.scale(m, block, 1);
        let lows = sums::<M, Self::Codes, 0, 4, T>(m, block.planes, table, x);
        let highs = sums::<M, Self::Codes, 4, 8, T>(m, block.planes, table, x);
        for t in 0..T {
            acc[t] = m.fma(first, lows[t], acc[t]);
            acc[t] = m.fma(second, highs[t], acc[t]);
            if let (Some(first), Some(second)) = (first_min, second_min) {
                acc[t] = m.fma(first, m.splat_f(x[t].sums[0]), acc[t]);
                acc[t] = m.fma(second, m.splat_f(x[t].sums[1]), acc[t]);
            }
        }
    }

    /// What a step of the code is worth in the first or second 16 columns, and what is added, if anything.
    fn scale<M: Machine>(self, m: M, block: Place<'_>, half: usize) -> (M::F, Option<M::F>);
}

/// A block of a tile.
#[derive(Clone, Copy)]
pub(crate) struct Place<'a> {
    /// The scales of its chunk.
    pub(crate) head: &'a [Line],
    /// Its number in the chunk.
    pub(crate) b: usize,
    /// Its codes.
    pub(crate) planes: &'a [Line],
}

/// Σ (q − zero) a over the groups of 4 columns from `FIRST` to `LAST`, in integers.
#[inline(always)]
pub(super) fn dots<M: Machine, C: Codes, const FIRST: usize, const LAST: usize, const T: usize>(
    m: M,
    planes: &[Line],
    x: [&Int8Block; T],
    zero: i32,
) -> [M::I; T] {
    let zero = match M::CENTRED_BYTES && C::BITS == 8 {
        true => zero - 128,
        false => zero,
    };
    let mut sums = [m.dot_begin(m.splat(0)); T];
    if zero != 0 {
        for t in 0..T {
            let sum = match (FIRST, LAST) {
                (0, 8) => x[t].sum,
                (0, _) => x[t].sums[0],
                _ => x[t].sums[1],
            };
            sums[t] = m.dot_begin(m.splat(-zero * sum));
        }
    }
    eight_times!(M, g => {
        if FIRST <= g && g < LAST {
            let codes = C::group(m, planes, g);
            for t in 0..T {
                sums[t] = m.dot(sums[t], codes, x[t].quad(g), C::BITS);
            }
            if g + 1 == LAST || (g + 1 - FIRST).is_multiple_of(M::steps(C::BITS)) {
                for sum in &mut sums {
                    *sum = m.dot_flush(*sum);
                }
            }
        }
    });
    let mut out = [m.splat(0); T];
    for t in 0..T {
        out[t] = m.dot_end(sums[t]);
    }
    out
}

/// Σ (q − zero) a over the groups of 4 columns from `FIRST` to `LAST`, in floats: four sums, of every fourth column
/// each, then (0 + 1) + (2 + 3).
#[inline(always)]
pub(super) fn sums<M: Machine, C: Codes, const FIRST: usize, const LAST: usize, const T: usize>(
    m: M,
    planes: &[Line],
    table: M::Table,
    x: [&FloatBlock; T],
) -> [M::F; T] {
    let mut parts = [[m.splat_f(0.0); 4]; T];
    eight_times!(M, g => {
        if FIRST <= g && g < LAST {
            four_times!(M, j => {
                let value = C::value(m, planes, g, j, table);
                for t in 0..T {
                    parts[t][j] = m.fma(value, m.splat_f(x[t].x[4 * g + j]), parts[t][j]);
                }
            });
        }
    });
    let mut out = [m.splat_f(0.0); T];
    for t in 0..T {
        let [a, b, c, d] = parts[t];
        out[t] = m.add_f(m.add_f(a, b), m.add_f(c, d));
    }
    out
}

/// A scale for 32 columns: `Q4_0`, `Q5_0`, `Q8_0`, `IQ4_NL`.
pub(crate) struct Plain<C>(PhantomData<C>);
/// A scale and a minimum for 32 columns: `Q4_1`, `Q5_1`.
pub(crate) struct Offset<C>(PhantomData<C>);
/// Integer scales and minimums for 32 columns: `Q4_K`, `Q5_K`.
pub(crate) struct Sub32<C>(PhantomData<C>);
/// Integer scales for 16 columns: `Q3_K`, `Q6_K`.
pub(crate) struct Sub16<C>(PhantomData<C>);
/// Integer scales and minimums for 16 columns: `Q2_K`.
pub(crate) struct Sub16Offset<C>(PhantomData<C>);
macro_rules! plain_struct {
    ($($name:ident)*) => { $(
        impl<C> $name<C> {
            pub(crate) const NEW: Self = Self(PhantomData);
        }
        impl<C> Clone for $name<C> {
            fn clone(&self) -> Self {
                *self
            }
        }
        impl<C> Copy for $name<C> {}
    )* };
}
plain_struct!(Plain Offset Sub32 Sub16 Sub16Offset);

impl<C: Codes + Send + Sync> Format for Plain<C> {
    type Codes = C;
    const HALVES: bool = false;

    #[inline(always)]
    fn chunk(self, _blocks: usize) -> usize {
        PLAIN_CHUNK
    }

    #[inline(always)]
    fn head(self, blocks: usize) -> usize {
        blocks.div_ceil(2)
    }

    #[inline(always)]
    fn int8<M: Machine, const T: usize>(
        self,
        m: M,
        block: Place<'_>,
        x: [&Int8Block; T],
        acc: &mut [M::F; T],
    ) {
        let d = m.load_f16(block.head[block.b / 2].half(block.b));
        let dots = dots::<M, C, 0, 8, T>(m, block.planes, x, C::ZERO);
        for t in 0..T {
            let d = m.mul_f(d, m.splat_f(x[t].d));
            acc[t] = m.fma(d, m.to_f(dots[t]), acc[t]);
        }
    }

    #[inline(always)]
    fn scale<M: Machine>(self, m: M, block: Place<'_>, _half: usize) -> (M::F, Option<M::F>) {
        (m.load_f16(block.head[block.b / 2].half(block.b)), None)
    }
}

impl<C: Codes + Send + Sync> Format for Offset<C> {
    type Codes = C;
    const HALVES: bool = false;

    #[inline(always)]
    fn chunk(self, _blocks: usize) -> usize {
        OFFSET_CHUNK
    }

    #[inline(always)]
    fn head(self, blocks: usize) -> usize {
        blocks
    }

    #[inline(always)]
    fn int8<M: Machine, const T: usize>(
        self,
        m: M,
        block: Place<'_>,
        x: [&Int8Block; T],
        acc: &mut [M::F; T],
    ) {
        let head = &block.head[block.b];
        let (d, min) = (m.load_f16(head.half(0)), m.load_f16(head.half(1)));
        let dots = dots::<M, C, 0, 8, T>(m, block.planes, x, 0);
        for t in 0..T {
            let d = m.mul_f(d, m.splat_f(x[t].d));
            acc[t] = m.fma(d, m.to_f(dots[t]), acc[t]);
            acc[t] = m.fma(min, m.splat_f(x[t].scaled), acc[t]);
        }
    }

    #[inline(always)]
    fn scale<M: Machine>(self, m: M, block: Place<'_>, _half: usize) -> (M::F, Option<M::F>) {
        let head = &block.head[block.b];
        (m.load_f16(head.half(0)), Some(m.load_f16(head.half(1))))
    }
}

/// The byte of a row for a sub-block: the first or second 16 bytes of block `b`.
#[inline(always)]
fn sub_bytes<'a>(block: Place<'a>, which: usize) -> &'a [u8; TILE_ROWS] {
    block.head[1 + block.b / 2].quarter(2 * (block.b % 2) + which)
}

impl<C: Codes + Send + Sync> Format for Sub32<C> {
    type Codes = C;
    const HALVES: bool = false;

    #[inline(always)]
    fn head(self, blocks: usize) -> usize {
        1 + blocks.div_ceil(2)
    }

    #[inline(always)]
    fn int8<M: Machine, const T: usize>(
        self,
        m: M,
        block: Place<'_>,
        x: [&Int8Block; T],
        acc: &mut [M::F; T],
    ) {
        let d = m.load_f16(block.head[0].half(0));
        let scale = m.load_u8(sub_bytes(block, 0));
        let (_, min) = self.scale(m, block, 0);
        let dots = dots::<M, C, 0, 8, T>(m, block.planes, x, 0);
        for t in 0..T {
            let d = m.mul_f(d, m.splat_f(x[t].d));
            let dot = m.mul_i(scale, dots[t]);
            acc[t] = m.fma(d, m.to_f(dot), acc[t]);
            if let Some(min) = min {
                acc[t] = m.fma(min, m.splat_f(x[t].scaled), acc[t]);
            }
        }
    }

    #[inline(always)]
    fn scale<M: Machine>(self, m: M, block: Place<'_>, _half: usize) -> (M::F, Option<M::F>) {
        let (d, min) = (
            m.load_f16(block.head[0].half(0)),
            m.load_f16(block.head[0].half(1)),
        );
        // Products of 11 and 6 bits: exact.
        let step = m.mul_f(d, m.to_f(m.load_u8(sub_bytes(block, 0))));
        let min = m.mul_f(
            m.mul_f(min, m.splat_f(-1.0)),
            m.to_f(m.load_u8(sub_bytes(block, 1))),
        );
        (step, Some(min))
    }
}

impl<C: Codes + Send + Sync> Format for Sub16<C> {
    type Codes = C;
    const HALVES: bool = true;

    #[inline(always)]
    fn head(self, blocks: usize) -> usize {
        1 + blocks.div_ceil(2)
    }

    #[inline(always)]
    fn int8<M: Machine, const T: usize>(
        self,
        m: M,
        block: Place<'_>,
        x: [&Int8Block; T],
        acc: &mut [M::F; T],
    ) {
        let d = m.load_f16(block.head[0].half(0));
        let (first, second) = (
            m.load_i8(sub_bytes(block, 0)),
            m.load_i8(sub_bytes(block, 1)),
        );
        let lows = dots::<M, C, 0, 4, T>(m, block.planes, x, C::ZERO);
        let highs = dots::<M, C, 4, 8, T>(m, block.planes, x, C::ZERO);
        for t in 0..T {
            let d = m.mul_f(d, m.splat_f(x[t].d));
            let dot = m.add_i(m.mul_i(first, lows[t]), m.mul_i(second, highs[t]));
            acc[t] = m.fma(d, m.to_f(dot), acc[t]);
        }
    }

    #[inline(always)]
    fn scale<M: Machine>(self, m: M, block: Place<'_>, half: usize) -> (M::F, Option<M::F>) {
        let d = m.load_f16(block.head[0].half(0));
        let step = m.mul_f(d, m.to_f(m.load_i8(sub_bytes(block, half))));
        (step, None)
    }
}

impl<C: Codes + Send + Sync> Format for Sub16Offset<C> {
    type Codes = C;
    const HALVES: bool = true;

    #[inline(always)]
    fn head(self, blocks: usize) -> usize {
        1 + blocks.div_ceil(2)
    }

    #[inline(always)]
    fn int8<M: Machine, const T: usize>(
        self,
        m: M,
        block: Place<'_>,
        x: [&Int8Block; T],
        acc: &mut [M::F; T],
    ) {
        let d = m.load_f16(block.head[0].half(0));
        let low_bits = m.splat(15);
        let first = m.and(m.load_u8(sub_bytes(block, 0)), low_bits);
        let second = m.and(m.load_u8(sub_bytes(block, 1)), low_bits);
        let (_, first_min) = self.scale(m, block, 0);
        let (_, second_min) = self.scale(m, block, 1);
        let lows = dots::<M, C, 0, 4, T>(m, block.planes, x, 0);
        let highs = dots::<M, C, 4, 8, T>(m, block.planes, x, 0);
        for t in 0..T {
            let d = m.mul_f(d, m.splat_f(x[t].d));
            let dot = m.add_i(m.mul_i(first, lows[t]), m.mul_i(second, highs[t]));
            acc[t] = m.fma(d, m.to_f(dot), acc[t]);
            if let (Some(first), Some(second)) = (first_min, second_min) {
                acc[t] = m.fma(first, m.splat_f(x[t].scaleds[0]), acc[t]);
                acc[t] = m.fma(second, m.splat_f(x[t].scaleds[1]), acc[t]);
            }
        }
    }

    #[inline(always)]
    fn scale<M: Machine>(self, m: M, block: Place<'_>, half: usize) -> (M::F, Option<M::F>) {
        let (d, min) = (
            m.load_f16(block.head[0].half(0)),
            m.load_f16(block.head[0].half(1)),
        );
        let both = m.load_u8(sub_bytes(block, half));
        let step = m.mul_f(d, m.to_f(m.and(both, m.splat(15))));
        let min = m.mul_f(
            m.mul_f(min, m.splat_f(-1.0)),
            m.to_f(m.shift_right(both, 4)),
        );
        (step, Some(min))
    }
}

/// Writes the values of a block, column by column, at row `at` of a panel.
#[inline(always)]
pub(crate) fn widen<M: Machine, F: Format, const WIDTH: usize>(
    m: M,
    format: F,
    block: Place<'_>,
    table: M::Table,
    at: usize,
    panel: &mut [[f32; WIDTH]; BLOCK],
) {
    let halves = [format.scale(m, block, 0), format.scale(m, block, 1)];
    eight_times!(M, g => {
        let (step, min) = halves[g / 4];
        four_times!(M, j => {
            let mut value = m.mul_f(step, F::Codes::value(m, block.planes, g, j, table));
            if let Some(min) = min {
                value = m.add_f(value, min);
            }
            let to = &mut panel[4 * g + j][at..at + TILE_ROWS];
            m.store_f(value, to.first_chunk_mut().expect("16 rows"));
        });
    });
}
