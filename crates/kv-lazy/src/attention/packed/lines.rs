//! The factors and offsets of a block of tokens, and of a group along channels.

use super::super::ahead::MOST;
use super::super::machine::prefetch;
use super::arrange;
use crate::quantise::{Format, MOST_GROUPS, PackedView};
use half::f16;
use half::slice::HalfFloatSliceExt;
use pulp::Simd;
use std::ops::Range;

/// Factors 2^b·s and offsets of the groups of a block of tokens, a row of tokens for each group.
pub(super) struct Lines {
    factors: [[f32; MOST]; MOST_GROUPS],
    offsets: [[f32; MOST]; MOST_GROUPS],
    /// Scales or lows as they are stored.
    stored: [f32; MOST * MOST_GROUPS],
    /// Groups of a token.
    groups: usize,
    /// Words of a group.
    words: usize,
    /// Factors of each word of a token, `words_of_token` for each, where groups are no one, two or four vectors.
    of_words: Vec<f32>,
    words_of_token: usize,
}

impl Lines {
    /// Of no tokens yet. Where groups are no one, two or four vectors, words have factors of their own, as many as `words_of_token`.
    pub(super) fn new(format: Format, words_of_token: usize) -> Self {
        Self {
            of_words: vec![0.0; MOST * words_of_token],
            words_of_token,
            factors: [[0.0; MOST]; MOST_GROUPS],
            offsets: [[0.0; MOST]; MOST_GROUPS],
            stored: [0.0; MOST * MOST_GROUPS],
            groups: format.groups(),
            words: format.group / format.per_word(),
        }
    }

    /// Takes the tokens `from..from + count` of a view whose groups run along tokens.
    #[inline(always)]
    pub(super) fn fill(&mut self, view: PackedView<'_>, from: usize, count: usize) {
        let (format, groups) = (view.format, self.groups);
        let range = from * groups..(from + count) * groups;
        let stored = &mut self.stored[..range.len()];
        let codes = (1u32 << format.bits) as f32;
        ask(view.scales, range.clone());
        ask(view.lows, range.clone());
        view.scales[range.clone()].convert_to_f32_slice(stored);
        stored.iter_mut().for_each(|scale| *scale *= codes);
        by_group(stored, groups, &mut self.factors);
        if !format.symmetric {
            view.lows[range].convert_to_f32_slice(stored);
            by_group(stored, groups, &mut self.offsets);
        }
        let both = self.offsets.iter_mut().zip(&self.factors);
        for (offsets, factors) in both.take(groups) {
            for (offset, factor) in offsets.iter_mut().zip(factors) {
                // Of symmetric codes half of all stand for negative numbers.
                let low = if format.symmetric {
                    -0.5 * factor
                } else {
                    *offset
                };
                *offset = low - factor;
            }
        }
        if self.words_of_token > 0 {
            let tokens = self.of_words.chunks_exact_mut(self.words_of_token);
            for (j, words) in (0..MOST).zip(tokens) {
                let factors = self.factors.iter().take(groups).map(|group| group[j]);
                if self.words == 8 {
                    // Most groups of 4 bits: a store for each.
                    for (words, factor) in words.as_chunks_mut().0.iter_mut().zip(factors) {
                        *words = [factor; 8];
                    }
                } else {
                    for (words, factor) in words.chunks_exact_mut(self.words).zip(factors) {
                        words.fill(factor);
                    }
                }
            }
        }
    }

    /// The factors of a group, token by token.
    #[inline(always)]
    pub(super) fn factors(&self, group: usize) -> &[f32; MOST] {
        &self.factors[group % MOST_GROUPS]
    }

    /// The offsets of all groups, token by token.
    #[inline(always)]
    pub(super) fn offsets(&self) -> &[[f32; MOST]] {
        &self.offsets[..self.groups]
    }

    /// The factor of each word of the `b`-th vector of token `t`.
    #[inline(always)]
    pub(super) fn of_words<S: Simd>(&self, t: usize, b: usize) -> S::f32s {
        let of_token = &self.of_words[t * self.words_of_token..][..self.words_of_token];
        S::as_simd_f32s(of_token).0[b]
    }
}

/// Asks for as many numbers after `range`, which the next block will read.
#[inline(always)]
fn ask(numbers: &[f16], range: Range<usize>) {
    let next = range.end..numbers.len().min(range.end + range.len());
    for line in numbers.get(next).unwrap_or_default().chunks(32) {
        prefetch(&line[0]);
    }
}

/// Numbers of each group of each token as a row of tokens for each group.
#[inline(always)]
fn by_group(stored: &[f32], groups: usize, rows: &mut [[f32; MOST]; MOST_GROUPS]) {
    // A number of groups that is known makes shuffles of the copies.
    match groups {
        1 => transpose::<1>(stored, rows),
        2 => transpose::<2>(stored, rows),
        4 => transpose::<4>(stored, rows),
        _ => {
            for (g, row) in rows.iter_mut().take(groups).enumerate() {
                for (to, from) in row.iter_mut().zip(stored[g..].iter().step_by(groups)) {
                    *to = *from;
                }
            }
        }
    }
}

/// [`by_group`] for `G` groups.
#[inline(always)]
fn transpose<const G: usize>(stored: &[f32], rows: &mut [[f32; MOST]; MOST_GROUPS]) {
    let tokens = stored.as_chunks::<G>().0;
    if let Some(tokens) = tokens.first_chunk::<MOST>() {
        for g in 0..G {
            for (to, token) in rows[g].iter_mut().zip(tokens) {
                *to = token[g];
            }
        }
    } else {
        for (j, token) in (0..MOST).zip(tokens) {
            for g in 0..G {
                rows[g][j] = token[g];
            }
        }
    }
}

/// Factors and offsets of a group along channels, in the order in which codes come out.
pub(super) struct Channels {
    factors: Vec<f32>,
    offsets: Vec<f32>,
    /// Scales or lows, then factors or offsets.
    stored: Vec<f32>,
}

impl Channels {
    /// Of heads of `d`, whose arranged rows have `row` elements.
    pub(super) fn new(d: usize, row: usize) -> Self {
        Self {
            factors: vec![0.0; row],
            offsets: vec![0.0; row],
            stored: vec![0.0; 2 * d],
        }
    }

    /// Takes a group of a view.
    #[inline(always)]
    pub(super) fn fill<S: Simd, const N: usize>(&mut self, keys: PackedView<'_>, group: usize) {
        let d = keys.format.head_dim;
        let (factors, offsets) = self.stored.split_at_mut(d);
        let codes = (1u32 << keys.format.bits) as f32;
        keys.scales[group * d..(group + 1) * d].convert_to_f32_slice(factors);
        keys.lows[group * d..(group + 1) * d].convert_to_f32_slice(offsets);
        for (factor, offset) in factors.iter_mut().zip(&mut *offsets) {
            *factor *= codes;
            *offset -= *factor;
        }
        arrange::<S, N>(factors, (0, 1), &mut self.factors);
        arrange::<S, N>(offsets, (0, 1), &mut self.offsets);
    }

    /// Arranged queries of `H` heads times the factors, and their products with the offsets.
    #[inline(always)]
    pub(super) fn fold<S: Simd, const H: usize>(
        &self,
        simd: S,
        queries: &[f32],
        folded: &mut [f32],
    ) -> [f32; H] {
        let lines = S::as_simd_f32s(&self.factors)
            .0
            .iter()
            .zip(S::as_simd_f32s(&self.offsets).0);
        let queries = S::as_simd_f32s(queries).0.as_chunks::<H>().0;
        let folded = S::as_mut_simd_f32s(folded).0.as_chunks_mut::<H>().0;
        let mut constants = [simd.splat_f32s(0.0); H];
        for ((to, q), (&factor, &offset)) in folded.iter_mut().zip(queries).zip(lines) {
            for h in 0..H {
                to[h] = simd.mul_f32s(q[h], factor);
                constants[h] = simd.mul_add_f32s(q[h], offset, constants[h]);
            }
        }
        let mut sums = [0.0; H];
        for h in 0..H {
            sums[h] = simd.reduce_sum_f32s(constants[h]);
        }
        sums
    }
}
