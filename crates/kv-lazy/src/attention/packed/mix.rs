//! Sums of quantised values.

#![expect(
    clippy::needless_range_loop,
    reason = "register tiles are indexed alike; iterators of one of them hide that"
)]

use super::super::ahead::{Ahead, MOST, heads_at_once};
use super::factors::Shared;
use super::lines::Lines;
use super::{Block, Kernel, Padded, after, arranged, bring_back, code, scratch};
use crate::quantise::{Format, PackedView, hadamard};
use pulp::Simd;

/// out[h] = Σ_j weights[h, j] v̂_j for all heads and values of a chunk, rotated back.
pub(in super::super) struct PackedMix<'a> {
    /// `[heads, stride]`.
    pub(in super::super) weights: &'a [f32],
    pub(in super::super) stride: usize,
    pub(in super::super) values: PackedView<'a>,
    /// What is read after the values.
    pub(in super::super) next: &'a [u8],
    /// `[heads, d]`.
    pub(in super::super) out: &'a mut [f32],
    /// `[heads, scratch]`.
    pub(in super::super) scratch: &'a mut [f32],
}

impl Kernel for PackedMix<'_> {
    fn format(&self) -> Format {
        self.values.format
    }

    #[inline(always)]
    fn run<S: Simd, const N: usize>(self, simd: S) {
        match Shared::of::<S>(self.values.format) {
            Shared::Lanes => all_values::<S, N, true>(simd, self),
            _ => all_values::<S, N, false>(simd, self),
        }
    }
}

#[inline(always)]
fn all_values<S: Simd, const N: usize, const LANES: bool>(simd: S, of: PackedMix<'_>) {
    let PackedMix {
        weights,
        stride,
        values,
        next,
        out,
        scratch: all,
    } = of;
    let format = values.format;
    let (d, words) = (format.head_dim, format.words());
    let (heads, room) = (out.len() / d, scratch(d));
    let row = words.div_ceil(S::F32_LANES) * N * S::F32_LANES;
    for own in all.chunks_exact_mut(room) {
        own[..row].fill(0.0);
        own[2 * arranged(d)..].fill(0.0);
    }
    let shared = Shared::of::<S>(format).vectors();
    let mut lines = Lines::new(format, if LANES { row / N } else { 0 });
    let mut padded = Padded::new(words, row / N);
    let (tokens, mut from) = (values.tokens(), 0);
    while from < tokens {
        let count = MOST.min(tokens - from);
        lines.fill(values, from, count);
        let at = Block::<S>::new(values, from, count, &mut padded);
        let next = after(values, from + count, next);
        let mut ahead = Ahead::new(next, MOST * words * 4, heads);
        let mut h = 0;
        while h < heads {
            let width = heads_at_once(heads - h);
            let own = &mut all[h * room..(h + width) * room];
            let weights = &weights[h * stride + from..];
            let of = (&at, (&lines, shared), &mut ahead);
            match width {
                // Twice as many sums where there are registers for them.
                4 if S::F32_LANES == 16 => mix::<S, N, LANES, 4, 4>(simd, of, weights, stride, own),
                4 => mix::<S, N, LANES, 4, 2>(simd, of, weights, stride, own),
                2 => mix::<S, N, LANES, 2, 4>(simd, of, weights, stride, own),
                _ => mix::<S, N, LANES, 1, N>(simd, of, weights, stride, own),
            }
            h += width;
        }
        from += count;
    }
    for (own, out) in all.chunks_exact(room).zip(out.chunks_exact_mut(d)) {
        bring_back::<S, N>(&own[..row], out);
        let offsets = &own[2 * arranged(d)..];
        for (group, offset) in out.chunks_exact_mut(format.group).zip(offsets) {
            group.iter_mut().for_each(|x| *x += offset);
        }
        hadamard::rotate(out, format.rotation);
    }
}

/// Adds the tokens of a block to the arranged outputs of `H` heads, `K` codes of a word at a time.
#[inline(always)]
fn mix<S: Simd, const N: usize, const LANES: bool, const H: usize, const K: usize>(
    simd: S,
    (at, (lines, shared), ahead): (&Block<'_, S>, (&Lines, usize), &mut Ahead<'_>),
    weights: &[f32],
    stride: usize,
    own: &mut [f32],
) {
    let (room, count) = (scratch(at.d), at.count());
    // In arrays, so that loops need no index checked; tokens that are not there weigh nothing.
    let mut heads = [[0.0; MOST]; H];
    for (head, weights) in heads.iter_mut().zip(weights.chunks(stride)) {
        head[..count].copy_from_slice(&weights[..count]);
    }
    for h in 0..H {
        let sums = &mut own[h * room + 2 * arranged(at.d)..(h + 1) * room];
        for (sum, offsets) in sums.iter_mut().zip(lines.offsets()) {
            let (weights, offsets) = (S::as_simd_f32s(&heads[h]).0, S::as_simd_f32s(offsets).0);
            let mut products = simd.splat_f32s(0.0);
            for (&weight, &offset) in weights.iter().zip(offsets) {
                products = simd.mul_add_f32s(weight, offset, products);
            }
            *sum += simd.reduce_sum_f32s(products);
        }
    }
    let zero = simd.splat_f32s(0.0);
    for b in 0..at.vectors {
        let mut scaled = heads;
        if !LANES {
            let factors = lines.factors(b / shared);
            for h in 0..H {
                for j in 0..MOST {
                    scaled[h][j] *= factors[j];
                }
            }
        }
        for part in 0..N / K {
            ahead.fetch(H, at.bytes * count / (at.vectors * N / K));
            let shift = simd.splat_u32s((part * K * 32 / N) as u32);
            let mut acc = [[zero; K]; H];
            for (j, token) in (0..MOST).zip(at.codes.chunks_exact(at.vectors)) {
                let mut words = token[b];
                if K < N {
                    words = simd.wrapping_dyn_shr_u32s(words, shift);
                }
                let mut wide = [zero; K];
                for k in 0..K {
                    wide[k] = code::<S, N>(simd, words, k);
                }
                let factor = match LANES {
                    true => lines.of_words::<S>(j, b),
                    false => zero,
                };
                for h in 0..H {
                    let mut w = simd.splat_f32s(scaled[h][j]);
                    if LANES {
                        w = simd.mul_f32s(w, factor);
                    }
                    for k in 0..K {
                        acc[h][k] = simd.mul_add_f32s(w, wide[k], acc[h][k]);
                    }
                }
            }
            for h in 0..H {
                let place = h * room + (b * N + part * K) * S::F32_LANES;
                let held = S::as_mut_simd_f32s(&mut own[place..][..K * S::F32_LANES]).0;
                for (held, acc) in held.iter_mut().zip(acc[h]) {
                    *held = simd.add_f32s(*held, acc);
                }
            }
        }
    }
}
