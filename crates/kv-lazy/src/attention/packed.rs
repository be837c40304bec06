//! The kernel for quantised keys and values: codes are widened in registers, a word of 4 or 8 of them in each lane.
//!
//! A code c of b bits becomes the float 1 + c/2^b by putting it into the top of the mantissa of 1, which takes a shift, a mask and an or. With
//! x̂ = s·c + offset = 2^b·s·f + (offset − 2^b·s), scores need one factor per group and the sum of the query over each group, and the mix of values
//! one more number per group. Shifting a vector of words by k codes gives the elements at stride 4 or 8 from k on, so queries are brought into
//! that order once per chunk, and outputs back.

#![expect(
    clippy::needless_range_loop,
    reason = "register tiles are indexed alike; iterators of one of them hide that"
)]

use super::ahead::{Ahead, MOST, heads_at_once};
use super::dense::lane_sums;
use crate::quantise::{MOST_GROUPS, PackedView, hadamard};
use half::slice::HalfFloatSliceExt;
use pulp::{Arch, Simd, WithSimd};

/// Numbers per lane that the kernels need for themselves with heads of `d`: two arranged rows and a number per group.
pub(super) fn scratch(d: usize) -> usize {
    2 * arranged(d) + d / 8
}

/// Elements of an arranged row: whole vectors of words on every machine.
fn arranged(d: usize) -> usize {
    d.next_multiple_of(128)
}

/// Runs `kernel` with vectors of eight words, which heads of 64 fill at 4 bits, or the machine's own where it has none.
fn dispatch(kernel: impl WithSimd<Output = ()>) {
    #[cfg(target_arch = "x86_64")]
    if let Some(simd) = pulp::x86::V3::try_new() {
        return pulp::Simd::vectorize(simd, kernel);
    }
    Arch::new().dispatch(kernel);
}

/// 1 + c/2^b for the `k`-th code of each word, `N` codes a word.
#[inline(always)]
fn code<S: Simd, const N: usize>(simd: S, words: S::u32s, k: usize) -> S::f32s {
    const ONE: u32 = 0x3f80_0000;
    let bits = 32 / N as u32;
    let (at, top) = (bits * k as u32, 23 - bits);
    let moved = if at <= top {
        simd.wrapping_dyn_shl_u32s(words, simd.splat_u32s(top - at))
    } else {
        simd.wrapping_dyn_shr_u32s(words, simd.splat_u32s(at - top))
    };
    let mask = simd.splat_u32s(((1 << bits) - 1) << top);
    let mantissa = simd.and_u32s(moved, mask);
    simd.transmute_f32s_u32s(simd.or_u32s(mantissa, simd.splat_u32s(ONE)))
}

/// The `b`-th vector of a token's words, filled up with zeros.
#[inline(always)]
fn load<S: Simd>(simd: S, token: &[u32], b: usize) -> S::u32s {
    let (whole, tail) = S::as_simd_u32s(token);
    match whole.get(b) {
        Some(&words) => words,
        None => simd.partial_load_u32s(tail),
    }
}

/// `row` in the order in which codes come out, zeros in between: place ((b·N) + k)·L + l holds element (b·L + l)·N + k.
#[inline(always)]
fn arrange<S: Simd, const N: usize>(row: &[f32], to: &mut [f32]) {
    for (b, to) in to.chunks_exact_mut(N * S::F32_LANES).enumerate() {
        for (k, to) in to.chunks_exact_mut(S::F32_LANES).enumerate() {
            for (l, to) in to.iter_mut().enumerate() {
                let element = (b * S::F32_LANES + l) * N + k;
                *to = row.get(element).copied().unwrap_or(0.0);
            }
        }
    }
}

/// The reverse of [`arrange`].
#[inline(always)]
fn bring_back<S: Simd, const N: usize>(from: &[f32], row: &mut [f32]) {
    for (b, from) in from.chunks_exact(N * S::F32_LANES).enumerate() {
        for (k, from) in from.chunks_exact(S::F32_LANES).enumerate() {
            for (l, &x) in from.iter().enumerate() {
                if let Some(to) = row.get_mut((b * S::F32_LANES + l) * N + k) {
                    *to = x;
                }
            }
        }
    }
}

/// Factors 2^b·s and offsets of the groups of a block of tokens.
struct Lines {
    factors: [f32; MOST * MOST_GROUPS],
    offsets: [f32; MOST * MOST_GROUPS],
    /// Groups of a token.
    groups: usize,
    /// Words of a group.
    words: usize,
}

impl Lines {
    /// Of the tokens `from..from + count` of a view whose groups run along tokens.
    #[inline(always)]
    fn new(view: PackedView<'_>, from: usize, count: usize) -> Self {
        let groups = view.format.groups();
        let range = from * groups..(from + count) * groups;
        let mut lines = Self {
            factors: [0.0; MOST * MOST_GROUPS],
            offsets: [0.0; MOST * MOST_GROUPS],
            groups,
            words: view.format.group / view.format.per_word(),
        };
        let n = range.len();
        view.scales[range.clone()].convert_to_f32_slice(&mut lines.factors[..n]);
        if !view.format.symmetric {
            view.lows[range].convert_to_f32_slice(&mut lines.offsets[..n]);
        }
        let codes = (1u32 << view.format.bits) as f32;
        for i in 0..n {
            let (factor, offset) = view.format.line(lines.factors[i], lines.offsets[i]);
            lines.factors[i] = codes * factor;
            lines.offsets[i] = offset - codes * factor;
        }
        lines
    }

    /// What each word of the `b`-th vector of token `t` is multiplied by, times `weight`.
    #[inline(always)]
    fn factor<S: Simd>(&self, simd: S, t: usize, b: usize, weight: f32) -> S::f32s {
        let factors = &self.factors[t * self.groups..(t + 1) * self.groups];
        let first = b * S::F32_LANES / self.words;
        if self.words.is_multiple_of(S::F32_LANES) {
            return simd.splat_f32s(factors[first] * weight);
        }
        let mut lanes = [simd.splat_f32s(0.0)];
        let each: &mut [f32] = pulp::bytemuck::cast_slice_mut(&mut lanes);
        for (l, x) in each.iter_mut().enumerate() {
            let group = (b * S::F32_LANES + l) / self.words;
            *x = factors.get(group).copied().unwrap_or(0.0) * weight;
        }
        lanes[0]
    }
}

/// scores[h, j] = q_h · k̂_j for all heads and keys of a chunk.
pub(super) struct PackedScores<'a> {
    /// `[heads, d]`, not rotated.
    pub(super) queries: &'a [f32],
    pub(super) keys: PackedView<'a>,
    /// What is read after the keys.
    pub(super) next: &'a [u8],
    /// Row length of `scores`.
    pub(super) stride: usize,
    pub(super) scores: &'a mut [f32],
    /// `[heads, scratch]`.
    pub(super) scratch: &'a mut [f32],
}

impl PackedScores<'_> {
    pub(super) fn run(self) {
        if self.keys.format.bits == 4 {
            dispatch(Bits::<Self, 8>(self));
        } else {
            dispatch(Bits::<Self, 4>(self));
        }
    }
}

/// out[h] = Σ_j weights[h, j] v̂_j for all heads and values of a chunk, rotated back.
pub(super) struct PackedMix<'a> {
    /// `[heads, stride]`.
    pub(super) weights: &'a [f32],
    pub(super) stride: usize,
    pub(super) values: PackedView<'a>,
    /// What is read after the values.
    pub(super) next: &'a [u8],
    /// `[heads, d]`.
    pub(super) out: &'a mut [f32],
    /// `[heads, scratch]`.
    pub(super) scratch: &'a mut [f32],
}

impl PackedMix<'_> {
    pub(super) fn run(self) {
        if self.values.format.bits == 4 {
            dispatch(Bits::<Self, 8>(self));
        } else {
            dispatch(Bits::<Self, 4>(self));
        }
    }
}

/// A kernel for `N` codes a word.
struct Bits<K, const N: usize>(K);

impl<const N: usize> WithSimd for Bits<PackedScores<'_>, N> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let PackedScores {
            queries,
            keys,
            next,
            stride,
            scores,
            scratch: all,
        } = self.0;
        let format = keys.format;
        let (d, words) = (format.head_dim, format.words());
        let (heads, room) = (queries.len() / d, scratch(d));
        let vectors = words.div_ceil(S::F32_LANES);
        let row = vectors * N * S::F32_LANES;
        let tokens = keys.tokens();
        let channel = format.channel > 0;
        for (query, own) in queries.chunks_exact(d).zip(all.chunks_exact_mut(room)) {
            let (arranged_q, rest) = own.split_at_mut(arranged(d));
            let (copy, sums) = rest.split_at_mut(arranged(d));
            copy[..d].copy_from_slice(query);
            hadamard::rotate(&mut copy[..d], format.rotation);
            arrange::<S, N>(&copy[..d], &mut arranged_q[..row]);
            for (sum, group) in sums.iter_mut().zip(copy[..d].chunks_exact(format.group)) {
                *sum = group.iter().sum();
            }
        }
        let block = MOST * words;
        let mut from = 0;
        while from < tokens {
            // Groups along channels end with a block.
            let most = if channel {
                MOST.min(format.channel - (keys.skip + from) % format.channel)
            } else {
                MOST
            };
            let count = most.min(tokens - from);
            let codes = &keys.words[from * words..(from + count) * words];
            let after = &keys.words[((from + count) * words).min(keys.words.len())..];
            let after: &[u8] = if after.is_empty() {
                next
            } else {
                pulp::bytemuck::cast_slice(after)
            };
            let mut ahead = Ahead::new(after, block * 4, heads);
            let lines = if channel {
                let group = (keys.skip + from) / format.channel;
                fold_channels::<S, N>(keys, group, all);
                None
            } else {
                Some(Lines::new(keys, from, count))
            };
            let mut h = 0;
            while h < heads {
                let width = heads_at_once(heads - h);
                let own = &all[h * room..(h + width) * room];
                let scores = &mut scores[h * stride + from..];
                let at = Block {
                    lines: lines.as_ref(),
                    codes,
                    words,
                    vectors,
                    d,
                };
                match width {
                    4 => score::<S, N, 4, 2>(simd, &at, &mut ahead, own, stride, scores),
                    2 => score::<S, N, 2, 4>(simd, &at, &mut ahead, own, stride, scores),
                    _ => score::<S, N, 1, 8>(simd, &at, &mut ahead, own, stride, scores),
                }
                h += width;
            }
            from += count;
        }
    }
}

/// Takes the factors of a group along channels into each head's query: its second arranged row, and the constant that its offsets give.
#[inline(always)]
fn fold_channels<S: Simd, const N: usize>(keys: PackedView<'_>, group: usize, all: &mut [f32]) {
    let format = keys.format;
    let d = format.head_dim;
    let scales = &keys.scales[group * d..(group + 1) * d];
    let lows = &keys.lows[group * d..(group + 1) * d];
    let codes = (1u32 << format.bits) as f32;
    for own in all.chunks_exact_mut(scratch(d)) {
        let (arranged_q, rest) = own.split_at_mut(arranged(d));
        let (folded, sums) = rest.split_at_mut(arranged(d));
        let mut constant = 0.0;
        let places = arranged_q.chunks_exact(N * S::F32_LANES);
        let places = places.zip(folded.chunks_exact_mut(N * S::F32_LANES));
        for (b, (from, to)) in places.enumerate() {
            for k in 0..N {
                for l in 0..S::F32_LANES {
                    let channel = (b * S::F32_LANES + l) * N + k;
                    if channel < d {
                        let q = from[k * S::F32_LANES + l];
                        let factor = codes * scales[channel].to_f32();
                        to[k * S::F32_LANES + l] = q * factor;
                        constant += q * (lows[channel].to_f32() - factor);
                    } else {
                        to[k * S::F32_LANES + l] = 0.0;
                    }
                }
            }
        }
        sums[0] = constant;
    }
}

/// A block of tokens.
struct Block<'a> {
    /// None where the queries hold the factors.
    lines: Option<&'a Lines>,
    codes: &'a [u32],
    /// Words of a token.
    words: usize,
    /// Vectors of a token.
    vectors: usize,
    d: usize,
}

/// Scores of `H` heads and the tokens of a block, `K` at a time; `own` is the heads' scratch.
#[inline(always)]
fn score<S: Simd, const N: usize, const H: usize, const K: usize>(
    simd: S,
    at: &Block<'_>,
    ahead: &mut Ahead<'_>,
    own: &[f32],
    stride: usize,
    scores: &mut [f32],
) {
    let count = at.codes.len() / at.words;
    let mut heads = [[0.0; MOST]; H];
    let tiles = at.codes.chunks_exact(K * at.words);
    let rest = tiles.remainder();
    for (i, tile) in tiles.enumerate() {
        ahead.fetch(H, K * at.words * 4);
        let mut rows: [&[u32]; K] = [&[]; K];
        for t in 0..K {
            rows[t] = &tile[t * at.words..(t + 1) * at.words];
        }
        let dots = dot::<S, N, H, K>(simd, at, own, rows, i * K);
        for h in 0..H {
            heads[h].as_chunks_mut::<K>().0[i] = dots[h];
        }
    }
    for (j, token) in (count / K * K..MOST).zip(rest.chunks_exact(at.words)) {
        let dots = dot::<S, N, H, 1>(simd, at, own, [token], j);
        for h in 0..H {
            heads[h][j] = dots[h][0];
        }
    }
    let room = scratch(at.d);
    for h in 0..H {
        let sums = &own[h * room + 2 * arranged(at.d)..(h + 1) * room];
        match at.lines {
            Some(lines) => {
                for (j, score) in heads[h][..count].iter_mut().enumerate() {
                    for g in 0..lines.groups {
                        *score += lines.offsets[j * lines.groups + g] * sums[g];
                    }
                }
            }
            None => heads[h][..count]
                .iter_mut()
                .for_each(|score| *score += sums[0]),
        }
    }
    for (head, scores) in heads.iter().zip(scores.chunks_mut(stride)) {
        scores[..count].copy_from_slice(&head[..count]);
    }
}

/// The `H`×`K` sums of query times widened code times factor; the tokens are those from `first` on in the block.
#[inline(always)]
fn dot<S: Simd, const N: usize, const H: usize, const K: usize>(
    simd: S,
    at: &Block<'_>,
    own: &[f32],
    rows: [&[u32]; K],
    first: usize,
) -> [[f32; K]; H] {
    let room = scratch(at.d);
    let row = at.vectors * N * S::F32_LANES;
    // With factors in the queries it is the second arranged row that counts.
    let place = if at.lines.is_some() {
        0
    } else {
        arranged(at.d)
    };
    let mut q: [&[S::f32s]; H] = [&[]; H];
    for h in 0..H {
        q[h] = S::as_simd_f32s(&own[h * room + place..][..row]).0;
    }
    let zero = simd.splat_f32s(0.0);
    let mut total = [[zero; K]; H];
    for b in 0..at.vectors {
        let mut words = [simd.splat_u32s(0); K];
        for t in 0..K {
            words[t] = load(simd, rows[t], b);
        }
        let mut acc = [[zero; K]; H];
        for k in 0..N {
            let mut wide = [zero; K];
            for t in 0..K {
                wide[t] = code::<S, N>(simd, words[t], k);
            }
            for h in 0..H {
                let q = q[h][b * N + k];
                for t in 0..K {
                    acc[h][t] = simd.mul_add_f32s(q, wide[t], acc[h][t]);
                }
            }
        }
        match at.lines {
            Some(lines) => {
                for t in 0..K {
                    let factor = lines.factor(simd, first + t, b, 1.0);
                    for h in 0..H {
                        total[h][t] = simd.mul_add_f32s(acc[h][t], factor, total[h][t]);
                    }
                }
            }
            None => {
                for h in 0..H {
                    for t in 0..K {
                        total[h][t] = simd.add_f32s(total[h][t], acc[h][t]);
                    }
                }
            }
        }
    }
    lane_sums::<S, H, K>(simd, &total)
}

impl<const N: usize> WithSimd for Bits<PackedMix<'_>, N> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let PackedMix {
            weights,
            stride,
            values,
            next,
            out,
            scratch: all,
        } = self.0;
        let format = values.format;
        let (d, words) = (format.head_dim, format.words());
        let (heads, room) = (out.len() / d, scratch(d));
        let vectors = words.div_ceil(S::F32_LANES);
        let row = vectors * N * S::F32_LANES;
        let tokens = values.tokens();
        for own in all.chunks_exact_mut(room) {
            own[..row].fill(0.0);
            own[2 * arranged(d)..].fill(0.0);
        }
        let block = MOST * words;
        let mut from = 0;
        while from < tokens {
            let count = MOST.min(tokens - from);
            let lines = Lines::new(values, from, count);
            let at = Block {
                lines: Some(&lines),
                codes: &values.words[from * words..(from + count) * words],
                words,
                vectors,
                d,
            };
            let after = &values.words[(from + count) * words..];
            let after: &[u8] = if after.is_empty() {
                next
            } else {
                pulp::bytemuck::cast_slice(after)
            };
            let mut ahead = Ahead::new(after, block * 4, heads);
            let mut h = 0;
            while h < heads {
                let width = heads_at_once(heads - h);
                let own = &mut all[h * room..(h + width) * room];
                let weights = &weights[h * stride + from..];
                match width {
                    4 => mix::<S, N, 4, 2>(simd, &at, &mut ahead, weights, stride, own),
                    2 => mix::<S, N, 2, 4>(simd, &at, &mut ahead, weights, stride, own),
                    _ => mix::<S, N, 1, 4>(simd, &at, &mut ahead, weights, stride, own),
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
}

/// Adds the tokens of a block to the arranged outputs of `H` heads, `K` codes of a word at a time.
#[inline(always)]
fn mix<S: Simd, const N: usize, const H: usize, const K: usize>(
    simd: S,
    at: &Block<'_>,
    ahead: &mut Ahead<'_>,
    weights: &[f32],
    stride: usize,
    own: &mut [f32],
) {
    let Some(lines) = at.lines else {
        return;
    };
    let (room, groups) = (scratch(at.d), lines.groups);
    let count = at.codes.len() / at.words;
    // In arrays, so that loops need no index checked.
    let mut heads = [[0.0; MOST]; H];
    for (head, weights) in heads.iter_mut().zip(weights.chunks(stride)) {
        head[..count].copy_from_slice(&weights[..count]);
    }
    for h in 0..H {
        let sums = &mut own[h * room + 2 * arranged(at.d)..(h + 1) * room];
        for g in 0..groups {
            let mut sum = 0.0;
            for j in 0..count {
                sum += heads[h][j] * lines.offsets[j * groups + g];
            }
            sums[g] += sum;
        }
    }
    let zero = simd.splat_f32s(0.0);
    for b in 0..at.vectors {
        for from in (0..N).step_by(K) {
            ahead.fetch(H, at.words * 4 * count / (at.vectors * N / K));
            let mut acc = [[zero; K]; H];
            for (j, token) in (0..MOST).zip(at.codes.chunks_exact(at.words)) {
                let words = load(simd, token, b);
                let mut wide = [zero; K];
                for k in 0..K {
                    wide[k] = code::<S, N>(simd, words, from + k);
                }
                for h in 0..H {
                    let w = lines.factor(simd, j, b, heads[h][j]);
                    for k in 0..K {
                        acc[h][k] = simd.mul_add_f32s(w, wide[k], acc[h][k]);
                    }
                }
            }
            for h in 0..H {
                let place = h * room + (b * N + from) * S::F32_LANES;
                let held = S::as_mut_simd_f32s(&mut own[place..][..K * S::F32_LANES]).0;
                for (held, acc) in held.iter_mut().zip(acc[h]) {
                    *held = simd.add_f32s(*held, acc);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::golden::{self, D};
    use crate::quantise::{Format, Packed};

    #[test]
    fn a_score_by_bits_of_the_mantissa_equals_the_golden_value() {
        let format = Format {
            head_dim: D,
            bits: 4,
            symmetric: false,
            group: 32,
            rotation: 1,
            channel: 0,
        };
        let mut packed = Packed::new(format);
        assert!(packed.push(&golden::keys(0)));
        let (mut scores, mut room) = ([0.0], vec![0.0; scratch(D)]);
        let query = &golden::queries()[..D];
        PackedScores {
            queries: query,
            keys: packed.view(),
            next: &[],
            stride: 1,
            scores: &mut scores,
            scratch: &mut room,
        }
        .run();
        // Of the terms 16·s·q·f with f below 2, each of which is rounded, -0.96 is left.
        let terms = query.chunks_exact(32).zip(packed.view().scales);
        let terms: f64 = terms
            .map(|(q, s)| 32.0 * s.to_f64() * q.iter().map(|q| f64::from(q.abs())).sum::<f64>())
            .sum();
        let error = (f64::from(scores[0]) + 0.959_265_684).abs();
        assert!(
            error < terms * f64::from(f32::EPSILON) / 2.0,
            "{error} {terms}"
        );
        assert!(error < 5e-5, "a ten-thousandth of the quantisation's own");
    }

    struct Bit(u32, u32);

    impl WithSimd for Bit {
        type Output = ();
        fn with_simd<S: Simd>(self, simd: S) {
            let bits =
                |x: S::f32s| -> u32 { pulp::bytemuck::cast_slice(std::slice::from_ref(&x))[0] };
            let word = |word: u32| simd.splat_u32s(word);
            // Code 9 in the second of eight places, code 200 in the third of four.
            assert_eq!(bits(code::<S, 8>(simd, word(9 << 4), 1)), self.0);
            assert_eq!(bits(code::<S, 4>(simd, word(200 << 16), 2)), self.1);
        }
    }

    #[test]
    fn codes_have_the_golden_bits() {
        dispatch(Bit(0x3fc8_0000, 0x3fe4_0000));
    }
}
