//! Scores of quantised keys.

#![expect(
    clippy::needless_range_loop,
    reason = "register tiles are indexed alike; iterators of one of them hide that"
)]

use super::super::ahead::{Ahead, MOST, heads_at_once};
use super::super::dense::lane_sums;
use super::factors::{Factors, InQueries, OfGroups, OfLanes, Shared};
use super::lines::{Channels, Lines};
use super::{Block, Kernel, Padded, after, arrange, arranged, code, scratch};
use crate::quantise::{Format, PackedView, hadamard};
use pulp::Simd;

/// scores[h, j] = q_h · k̂_j for all heads and keys of a chunk.
pub(in super::super) struct PackedScores<'a> {
    /// `[heads, d]`, not rotated.
    pub(in super::super) queries: &'a [f32],
    pub(in super::super) keys: PackedView<'a>,
    /// What is read after the keys.
    pub(in super::super) next: &'a [u8],
    /// Row length of `scores`.
    pub(in super::super) stride: usize,
    pub(in super::super) scores: &'a mut [f32],
    /// `[heads, scratch]`.
    pub(in super::super) scratch: &'a mut [f32],
}

impl Kernel for PackedScores<'_> {
    fn format(&self) -> Format {
        self.keys.format
    }

    #[inline(always)]
    fn run<S: Simd, const N: usize>(self, simd: S) {
        all_scores::<S, N>(simd, self);
    }
}

#[inline(always)]
fn all_scores<S: Simd, const N: usize>(simd: S, of: PackedScores<'_>) {
    let PackedScores {
        queries,
        keys,
        next,
        stride,
        scores,
        scratch: all,
    } = of;
    let format = keys.format;
    let (d, words) = (format.head_dim, format.words());
    let (heads, room) = (queries.len() / d, scratch(d));
    let vectors = words.div_ceil(S::F32_LANES);
    let row = vectors * N * S::F32_LANES;
    let mut h = 0;
    while h < heads {
        let width = heads_at_once(heads - h);
        let own = &mut all[h * room..(h + width) * room];
        arrange_queries::<S, N>(format, &queries[h * d..(h + width) * d], row, own);
        h += width;
    }
    let shared = Shared::of::<S>(format);
    let mut lines = Lines::new(format, if shared == Shared::Lanes { row / N } else { 0 });
    let mut channels = (shared == Shared::All).then(|| Channels::new(d, row));
    let mut padded = Padded::new(words, vectors * S::F32_LANES);
    let (tokens, mut from) = (keys.tokens(), 0);
    while from < tokens {
        // Groups along channels end with a block.
        let most = match format.channel {
            0 => MOST,
            channel => MOST.min(channel - (keys.skip + from) % channel),
        };
        let count = most.min(tokens - from);
        let at = Block::<S>::new(keys, from, count, &mut padded);
        let next = after(keys, from + count, next);
        let mut ahead = Ahead::new(next, MOST * words * 4, heads);
        match &mut channels {
            None => lines.fill(keys, from, count),
            Some(channels) => channels.fill::<S, N>(keys, (keys.skip + from) / format.channel),
        }
        let mut h = 0;
        while h < heads {
            let width = heads_at_once(heads - h);
            let own = &mut all[h * room..(h + width) * room];
            let scores = &mut scores[h * stride + from..];
            let factors = (shared, &lines, channels.as_ref());
            let of = (&at, factors, &mut ahead);
            match width {
                4 => score::<S, N, 4, 2>(simd, of, own, stride, scores),
                2 => score::<S, N, 2, 4>(simd, of, own, stride, scores),
                _ => score::<S, N, 1, 8>(simd, of, own, stride, scores),
            }
            h += width;
        }
        from += count;
    }
}

/// Rotates the queries of some heads, `[heads, d]`, and brings them into the order in which codes come out, `[row / lanes, heads, lanes]` at the
/// beginning of `own`; the sums of their groups, `[heads, d / 8]`, stand at its end.
#[inline(always)]
fn arrange_queries<S: Simd, const N: usize>(
    format: Format,
    queries: &[f32],
    row: usize,
    own: &mut [f32],
) {
    let d = format.head_dim;
    let heads = queries.len() / d;
    let (to, rest) = own.split_at_mut(heads * arranged(d));
    let (copy, sums) = rest.split_at_mut(heads * arranged(d));
    to[..heads * row].fill(0.0);
    let heads = (0..heads).map(|h| (h, heads));
    for ((place, query), sums) in heads
        .zip(queries.chunks_exact(d))
        .zip(sums.chunks_exact_mut(d / 8))
    {
        copy[..d].copy_from_slice(query);
        hadamard::rotate(&mut copy[..d], format.rotation);
        arrange::<S, N>(&copy[..d], place, to);
        for (sum, group) in sums.iter_mut().zip(copy[..d].chunks_exact(format.group)) {
            // Groups are multiples of 8; eight sums under way hide the latency of an addition.
            let mut lanes = [0.0; 8];
            for eight in group.as_chunks::<8>().0 {
                for (lane, x) in lanes.iter_mut().zip(eight) {
                    *lane += x;
                }
            }
            *sum = lanes.iter().sum();
        }
    }
}

/// Scores of `H` heads and the tokens of a block, `K` at a time; `own` is the heads' scratch.
#[inline(always)]
fn score<S: Simd, const N: usize, const H: usize, const K: usize>(
    simd: S,
    (at, (shared, lines, channels), ahead): (
        &Block<'_, S>,
        (Shared, &Lines, Option<&Channels>),
        &mut Ahead<'_>,
    ),
    own: &mut [f32],
    stride: usize,
    scores: &mut [f32],
) {
    let (queries, rest) = own.split_at_mut(H * arranged(at.d));
    let (folded, sums) = rest.split_at_mut(H * arranged(at.d));
    let row = H * N * at.vectors * S::F32_LANES;
    let (queries, folded) = (&queries[..row], &mut folded[..row]);
    let mut heads = [[0.0; MOST]; H];
    if let Some(channels) = channels {
        let constants = channels.fold::<S, H>(simd, queries, folded);
        products::<S, _, N, 1, 0, H, K>(simd, (at, InQueries, ahead), folded, &mut heads);
        for (head, constant) in heads.iter_mut().zip(constants) {
            head.iter_mut().for_each(|score| *score += constant);
        }
    } else {
        let (of, out) = ((at, OfGroups(lines), ahead), &mut heads);
        // Loops have known lengths where they are short, as with heads of 64 and 128 in usual groups.
        match (shared, at.vectors, N) {
            (Shared::One, 1, _) => products::<S, _, N, 1, 1, H, K>(simd, of, queries, out),
            (Shared::One, 2, 4) => products::<S, _, N, 1, 2, H, K>(simd, of, queries, out),
            (Shared::One, ..) => products::<S, _, N, 1, 0, H, K>(simd, of, queries, out),
            (Shared::Two, 2, 4) => products::<S, _, N, 2, 1, H, K>(simd, of, queries, out),
            (Shared::Two, ..) => products::<S, _, N, 2, 0, H, K>(simd, of, queries, out),
            (Shared::Four, ..) => products::<S, _, N, 4, 0, H, K>(simd, of, queries, out),
            (Shared::Lanes | Shared::All, vectors, _) => {
                let of = (at, OfLanes(lines), of.2);
                match vectors {
                    1 => products::<S, _, N, 1, 1, H, K>(simd, of, queries, out),
                    _ => products::<S, _, N, 1, 0, H, K>(simd, of, queries, out),
                }
            }
        }
        for (head, sums) in heads.iter_mut().zip(sums.chunks_exact(at.d / 8)) {
            let scores = S::as_mut_simd_f32s(head).0;
            for (offsets, &sum) in lines.offsets().iter().zip(sums) {
                let (offsets, sum) = (S::as_simd_f32s(offsets).0, simd.splat_f32s(sum));
                for (score, &offset) in scores.iter_mut().zip(offsets) {
                    *score = simd.mul_add_f32s(offset, sum, *score);
                }
            }
        }
    }
    for (head, scores) in heads.iter().zip(scores.chunks_mut(stride)) {
        scores[..at.count()].copy_from_slice(&head[..at.count()]);
    }
}

/// The sums of query times widened code times factor, of `H` heads and the tokens of a block, `K` at a time; `SHARED` vectors have one factor, and a token has
/// `PARTS` times as many where that is not 0.
#[inline(always)]
fn products<
    S: Simd,
    F: Factors<S>,
    const N: usize,
    const SHARED: usize,
    const PARTS: usize,
    const H: usize,
    const K: usize,
>(
    simd: S,
    (at, factors, ahead): (&Block<'_, S>, F, &mut Ahead<'_>),
    queries: &[f32],
    heads: &mut [[f32; MOST]; H],
) {
    let queries: &[[[S::f32s; H]; N]] = S::as_simd_f32s(queries).0.as_chunks().0.as_chunks().0;
    let queries: &[[[[S::f32s; H]; N]; SHARED]] = queries.as_chunks().0;
    let codes: &[[S::u32s; SHARED]] = at.codes.as_chunks().0;
    let parts = if PARTS > 0 { PARTS } else { queries.len() };
    let queries = &queries[..parts];
    let tiles = codes.chunks_exact(K * parts);
    let rest = tiles.remainder();
    for (i, tile) in (0..MOST / K).zip(tiles) {
        ahead.fetch(H, K * at.bytes);
        let mut totals = [[simd.splat_f32s(0.0); K]; H];
        for t in 0..K {
            let token = &tile[t * parts..(t + 1) * parts];
            let total = product(simd, factors, queries, token, i * K + t);
            for h in 0..H {
                totals[h][t] = total[h];
            }
        }
        let sums = lane_sums::<S, H, K>(simd, &totals);
        for h in 0..H {
            heads[h].as_chunks_mut::<K>().0[i] = sums[h];
        }
    }
    for (j, token) in (at.count() / K * K..MOST).zip(rest.chunks_exact(parts)) {
        let total = product(simd, factors, queries, token, j);
        for h in 0..H {
            heads[h][j] = simd.reduce_sum_f32s(total[h]);
        }
    }
}

/// Of one token, before the sum over lanes.
#[inline(always)]
fn product<S: Simd, F: Factors<S>, const N: usize, const SHARED: usize, const H: usize>(
    simd: S,
    factors: F,
    queries: &[[[[S::f32s; H]; N]; SHARED]],
    token: &[[S::u32s; SHARED]],
    j: usize,
) -> [S::f32s; H] {
    let zero = simd.splat_f32s(0.0);
    let mut total = [zero; H];
    for (part, (words, queries)) in token.iter().zip(queries).enumerate() {
        let mut sum = [zero; H];
        for b in 0..SHARED {
            for k in 0..N {
                let wide = code::<S, N>(simd, words[b], k);
                for h in 0..H {
                    sum[h] = simd.mul_add_f32s(queries[b][k][h], wide, sum[h]);
                }
            }
        }
        for h in 0..H {
            total[h] = factors.add(simd, j, part, sum[h], total[h]);
        }
    }
    total
}
