//! The codes of a block of a tile, four columns of all rows at a time.

use crate::machine::Machine;
use crate::tile::Line;

/// How codes of some bits are taken out of their planes.
pub(crate) trait Codes {
    /// Bits as far as products of bytes are concerned.
    const BITS: u32;
    /// Planes of a block.
    const PLANES: usize;
    /// The code of value 0.
    const ZERO: i32;

    /// The codes of columns 4g to 4g + 3, as bytes.
    fn group<M: Machine>(m: M, planes: &[Line], g: usize) -> M::I;

    /// The values of column 4g + j: codes less [`Codes::ZERO`], by `table`.
    #[inline(always)]
    fn value<M: Machine>(m: M, planes: &[Line], g: usize, j: usize, table: M::Table) -> M::F {
        let group = Self::group(m, planes, g);
        m.value(group, 8 * j as u32, Self::BITS, table)
    }

    /// The table for [`Codes::value`].
    #[inline(always)]
    fn table<M: Machine>(m: M) -> M::Table {
        m.table(Self::BITS, Self::ZERO)
    }
}

#[inline(always)]
fn nibbles<M: Machine>(m: M, planes: &[Line], g: usize) -> M::I {
    let both = m.load(&planes[g / 2].0);
    let lanes = match g % 2 {
        0 => both,
        _ => m.shift_right(both, 4),
    };
    m.and(lanes, m.splat(0x0f0f_0f0f))
}

#[inline(always)]
fn pairs<M: Machine>(m: M, planes: &[Line], g: usize) -> M::I {
    let four = m.load(&planes[g / 4].0);
    let lanes = match g % 4 {
        0 => four,
        k => m.shift_right(four, 2 * k as u32),
    };
    m.and(lanes, m.splat(0x0303_0303))
}

/// Bit g of each byte, at bit `to`.
#[inline(always)]
fn single<M: Machine>(m: M, plane: &Line, g: usize, to: usize) -> M::I {
    let eight = m.load(&plane.0);
    let lanes = match g.cmp(&to) {
        std::cmp::Ordering::Equal => eight,
        std::cmp::Ordering::Less => m.shift_left(eight, (to - g) as u32),
        std::cmp::Ordering::Greater => m.shift_right(eight, (g - to) as u32),
    };
    m.and(lanes, m.splat(0x0101_0101 << to))
}

/// 4 bits.
pub(crate) struct Nibbles<const ZERO: i32>;

impl<const ZERO: i32> Codes for Nibbles<ZERO> {
    const BITS: u32 = 4;
    const PLANES: usize = 4;
    const ZERO: i32 = ZERO;

    #[inline(always)]
    fn group<M: Machine>(m: M, planes: &[Line], g: usize) -> M::I {
        nibbles(m, planes, g)
    }

    #[inline(always)]
    fn value<M: Machine>(m: M, planes: &[Line], g: usize, j: usize, table: M::Table) -> M::F {
        let both = m.load(&planes[g / 2].0);
        m.value(both, (8 * j + 4 * (g % 2)) as u32, 4, table)
    }
}

/// 4 bits that choose a level of `IQ4_NL`.
pub(crate) struct Levels;

impl Codes for Levels {
    const BITS: u32 = 8;
    const PLANES: usize = 4;
    const ZERO: i32 = 128;

    #[inline(always)]
    fn group<M: Machine>(m: M, planes: &[Line], g: usize) -> M::I {
        m.levels(nibbles(m, planes, g))
    }
}

/// 5 bits.
pub(crate) struct FiveBits<const ZERO: i32>;

impl<const ZERO: i32> Codes for FiveBits<ZERO> {
    const BITS: u32 = 5;
    const PLANES: usize = 5;
    const ZERO: i32 = ZERO;

    #[inline(always)]
    fn group<M: Machine>(m: M, planes: &[Line], g: usize) -> M::I {
        m.or(nibbles(m, planes, g), single(m, &planes[4], g, 4))
    }
}

/// 6 bits.
pub(crate) struct SixBits;

impl Codes for SixBits {
    const BITS: u32 = 6;
    const PLANES: usize = 6;
    const ZERO: i32 = 32;

    #[inline(always)]
    fn group<M: Machine>(m: M, planes: &[Line], g: usize) -> M::I {
        let four = m.load(&planes[4 + g / 4].0);
        let lanes = match g % 4 {
            k @ 0..=1 => m.shift_left(four, 4 - 2 * k as u32),
            2 => four,
            _ => m.shift_right(four, 2),
        };
        m.or(nibbles(m, planes, g), m.and(lanes, m.splat(0x3030_3030)))
    }
}

/// 2 bits.
pub(crate) struct TwoBits<const ZERO: i32>;

impl<const ZERO: i32> Codes for TwoBits<ZERO> {
    const BITS: u32 = 2;
    const PLANES: usize = 2;
    const ZERO: i32 = ZERO;

    #[inline(always)]
    fn group<M: Machine>(m: M, planes: &[Line], g: usize) -> M::I {
        pairs(m, planes, g)
    }

    #[inline(always)]
    fn value<M: Machine>(m: M, planes: &[Line], g: usize, j: usize, table: M::Table) -> M::F {
        let four = m.load(&planes[g / 4].0);
        m.value(four, (8 * j + 2 * (g % 4)) as u32, 2, table)
    }
}

/// 3 bits.
pub(crate) struct ThreeBits;

impl Codes for ThreeBits {
    const BITS: u32 = 3;
    const PLANES: usize = 3;
    const ZERO: i32 = 4;

    #[inline(always)]
    fn group<M: Machine>(m: M, planes: &[Line], g: usize) -> M::I {
        m.or(pairs(m, planes, g), single(m, &planes[2], g, 2))
    }
}

/// 8 bits.
pub(crate) struct Bytes;

impl Codes for Bytes {
    const BITS: u32 = 8;
    const PLANES: usize = 8;
    const ZERO: i32 = 128;

    #[inline(always)]
    fn group<M: Machine>(m: M, planes: &[Line], g: usize) -> M::I {
        m.load(&planes[g].0)
    }
}
