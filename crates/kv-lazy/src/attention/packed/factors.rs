//! How the factors of a token reach its vectors of codes.

use super::super::ahead::MOST;
use super::lines::Lines;
use crate::quantise::Format;
use pulp::Simd;

/// Vectors of a token that share a factor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Shared {
    /// All: groups run along channels, and their factors are in the queries.
    All,
    One,
    Two,
    Four,
    /// None: groups are no such number of whole vectors, and each lane has a factor.
    Lanes,
}

impl Shared {
    pub(super) fn of<S: Simd>(format: Format) -> Self {
        let words = format.group / format.per_word();
        match (words / S::F32_LANES, words % S::F32_LANES) {
            _ if format.channel > 0 => Self::All,
            (1, 0) => Self::One,
            (2, 0) => Self::Two,
            (4, 0) => Self::Four,
            _ => Self::Lanes,
        }
    }

    /// Vectors that have one factor; 1 where each lane has its own.
    pub(super) fn vectors(self) -> usize {
        match self {
            Self::Two => 2,
            Self::Four => 4,
            _ => 1,
        }
    }
}

/// Adds the sum of a part of a token's codes, `part` of those that share a factor, to that of the token.
pub(super) trait Factors<S: Simd>: Copy {
    fn add(self, simd: S, token: usize, part: usize, sum: S::f32s, total: S::f32s) -> S::f32s;
}

/// Factors are in the queries.
#[derive(Clone, Copy)]
pub(super) struct InQueries;

impl<S: Simd> Factors<S> for InQueries {
    #[inline(always)]
    fn add(self, simd: S, _: usize, _: usize, sum: S::f32s, total: S::f32s) -> S::f32s {
        simd.add_f32s(sum, total)
    }
}

/// One factor for each group.
#[derive(Clone, Copy)]
pub(super) struct OfGroups<'a>(pub(super) &'a Lines);

impl<S: Simd> Factors<S> for OfGroups<'_> {
    #[inline(always)]
    fn add(self, simd: S, token: usize, part: usize, sum: S::f32s, total: S::f32s) -> S::f32s {
        let factor = self.0.factors(part)[token % MOST];
        simd.mul_add_f32s(sum, simd.splat_f32s(factor), total)
    }
}

/// A factor for each lane.
#[derive(Clone, Copy)]
pub(super) struct OfLanes<'a>(pub(super) &'a Lines);

impl<S: Simd> Factors<S> for OfLanes<'_> {
    #[inline(always)]
    fn add(self, simd: S, token: usize, part: usize, sum: S::f32s, total: S::f32s) -> S::f32s {
        simd.mul_add_f32s(sum, self.0.of_words::<S>(token, part), total)
    }
}
