//! Blocks of grouped integers: a scale for some blocks, or one for each half of a block.
//!
//! Zeros are taken off the integer sums, exactly.

#![allow(
    clippy::needless_range_loop,
    reason = "an index of tokens runs over several arrays at once"
)]

use std::marker::PhantomData;

use super::codes::Codes;
use super::format::{Format, Place, dots};
use crate::input::Int8Block;
use crate::machine::Machine;
use crate::tile::GroupLayout;

/// Groups of whole blocks.
pub(crate) struct Grouped<C> {
    layout: GroupLayout,
    codes: PhantomData<C>,
}

/// Groups of half a block.
pub(crate) struct GroupedHalves<C>(Grouped<C>);

impl<C> Clone for Grouped<C> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<C> Copy for Grouped<C> {}

impl<C> Clone for GroupedHalves<C> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<C> Copy for GroupedHalves<C> {}

impl<C> Grouped<C> {
    pub(crate) fn new(layout: GroupLayout) -> Self {
        Self {
            layout,
            codes: PhantomData,
        }
    }
}

impl<C> GroupedHalves<C> {
    pub(crate) fn new(layout: GroupLayout) -> Self {
        Self(Grouped::new(layout))
    }
}

impl<C: Codes + Send + Sync> Grouped<C> {
    /// Scale and zero of the first or second half of a block.
    #[inline(always)]
    fn parts<M: Machine>(self, m: M, block: Place<'_>, half: usize) -> (M::F, Option<M::I>) {
        let group = self.layout.group(block.b, half);
        let scale = m.load_f16(block.head[group / 2].half(group));
        let zeros = &block.head[self.layout.scale_lines()..];
        let zero = match self.layout.zeros {
            true => Some(m.load_u8(zeros[group / 4].quarter(group))),
            false => None,
        };
        (scale, zero)
    }

    /// `−scale (zero − middle)`, exact: 11 and 8 bits.
    #[inline(always)]
    fn offset<M: Machine>(m: M, scale: M::F, zero: M::I) -> M::F {
        m.mul_f(scale, m.to_f(Self::centred(m, zero)))
    }

    /// The middle less the zero.
    #[inline(always)]
    fn centred<M: Machine>(m: M, zero: M::I) -> M::I {
        m.add_i(m.splat(C::ZERO), m.mul_i(zero, m.splat(-1)))
    }

    /// Adds integers that lie around the middle, whose activations have this sum and step.
    #[inline(always)]
    fn add<M: Machine>(
        m: M,
        (scale, zero): (M::F, Option<M::I>),
        dot: M::I,
        (sum, d): (i32, f32),
        acc: M::F,
    ) -> M::F {
        let dot = match zero {
            None => dot,
            Some(zero) => m.add_i(dot, m.mul_i(Self::centred(m, zero), m.splat(sum))),
        };
        m.fma(m.mul_f(scale, m.splat_f(d)), m.to_f(dot), acc)
    }
}

impl<C: Codes + Send + Sync> Format for Grouped<C> {
    type Codes = C;
    const HALVES: bool = false;

    #[inline(always)]
    fn chunk(self, blocks: usize) -> usize {
        blocks
    }

    #[inline(always)]
    fn head(self, _blocks: usize) -> usize {
        self.layout.head_lines()
    }

    #[inline(always)]
    fn int8<M: Machine, const T: usize>(
        self,
        m: M,
        block: Place<'_>,
        x: [&Int8Block; T],
        acc: &mut [M::F; T],
    ) {
        let group = self.parts(m, block, 0);
        let dots = dots::<M, C, 0, 8, T>(m, block.planes, x, C::ZERO);
        for t in 0..T {
            acc[t] = Self::add(m, group, dots[t], (x[t].sum, x[t].d), acc[t]);
        }
    }

    #[inline(always)]
    fn scale<M: Machine>(self, m: M, block: Place<'_>, half: usize) -> (M::F, Option<M::F>) {
        let (scale, zero) = self.parts(m, block, half);
        (scale, zero.map(|zero| Self::offset(m, scale, zero)))
    }
}

impl<C: Codes + Send + Sync> Format for GroupedHalves<C> {
    type Codes = C;
    const HALVES: bool = true;

    #[inline(always)]
    fn chunk(self, blocks: usize) -> usize {
        blocks
    }

    #[inline(always)]
    fn head(self, _blocks: usize) -> usize {
        self.0.layout.head_lines()
    }

    #[inline(always)]
    fn int8<M: Machine, const T: usize>(
        self,
        m: M,
        block: Place<'_>,
        x: [&Int8Block; T],
        acc: &mut [M::F; T],
    ) {
        let (first, second) = (self.0.parts(m, block, 0), self.0.parts(m, block, 1));
        let lows = dots::<M, C, 0, 4, T>(m, block.planes, x, C::ZERO);
        let highs = dots::<M, C, 4, 8, T>(m, block.planes, x, C::ZERO);
        for t in 0..T {
            let (Int8Block { sums, d, .. }, sum) = (x[t], acc[t]);
            let sum = Grouped::<C>::add(m, first, lows[t], (sums[0], *d), sum);
            acc[t] = Grouped::<C>::add(m, second, highs[t], (sums[1], *d), sum);
        }
    }

    #[inline(always)]
    fn scale<M: Machine>(self, m: M, block: Place<'_>, half: usize) -> (M::F, Option<M::F>) {
        self.0.scale(m, block, half)
    }
}
