//! Scores of quantised keys.

use super::super::ahead::{Ahead, MOST, heads_at_once};
use super::super::dense::lane_sums;
use super::lines::{Channels, Lines};
use super::{Block, Kernel, after, arrange, arranged, code, load, scratch};
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
    fn run<S: Simd, const N: usize, const WHOLE: bool>(self, simd: S) {
        all_scores::<S, N, WHOLE>(simd, self);
    }
}

#[inline(always)]
fn all_scores<S: Simd, const N: usize, const WHOLE: bool>(simd: S, of: PackedScores<'_>) {
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
    let row = words.div_ceil(S::F32_LANES) * N * S::F32_LANES;
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
    let mut lines = Lines::new(format, if WHOLE { 0 } else { row / N });
    let mut channels = (format.channel > 0).then(|| Channels::new(d, row));
    let (tokens, mut from) = (keys.tokens(), 0);
    while from < tokens {
        // Groups along channels end with a block.
        let most = match format.channel {
            0 => MOST,
            channel => MOST.min(channel - (keys.skip + from) % channel),
        };
        let count = most.min(tokens - from);
        let at = Block::new::<S>(keys, from, count);
        let next = after(keys, from + count, next);
        let mut ahead = Ahead::new(next, MOST * words * 4, heads);
        let lines = match &mut channels {
            None => {
                lines.fill(keys, from, count);
                Some(&lines)
            }
            Some(channels) => {
                channels.fill::<S, N>(keys, (keys.skip + from) / format.channel);
                for own in all.chunks_exact_mut(room) {
                    let (query, rest) = own.split_at_mut(arranged(d));
                    let (folded, sums) = rest.split_at_mut(arranged(d));
                    sums[0] = channels.folded(simd, &query[..row], &mut folded[..row]);
                }
                None
            }
        };
        let mut h = 0;
        while h < heads {
            let width = heads_at_once(heads - h);
            let own = &all[h * room..(h + width) * room];
            let scores = &mut scores[h * stride + from..];
            let of = (&at, lines, &mut ahead);
            match width {
                4 => score::<S, N, WHOLE, 4, 2>(simd, of, own, stride, scores),
                2 => score::<S, N, WHOLE, 2, 4>(simd, of, own, stride, scores),
                _ => score::<S, N, WHOLE, 1, 8>(simd, of, own, stride, scores),
            }
            h += width;
        }
        from += count;
    }
}

/// Scores of `H` heads and the tokens of a block, `K` at a time; `own` is the heads' scratch. Without lines, queries hold the factors.
#[inline(always)]
fn score<S: Simd, const N: usize, const WHOLE: bool, const H: usize, const K: usize>(
    simd: S,
    (at, lines, ahead): (&Block<'_>, Option<&Lines>, &mut Ahead<'_>),
    own: &[f32],
    stride: usize,
    scores: &mut [f32],
) {
    let (room, count) = (scratch(at.d), at.count());
    // With factors in the queries it is the second arranged row that counts.
    let place = lines.map_or(arranged(at.d), |_| 0);
    let row = at.vectors * N * S::F32_LANES;
    let mut q: [&[[S::f32s; N]]; H] = [&[]; H];
    for h in 0..H {
        let vectors = S::as_simd_f32s(&own[h * room + place..][..row]).0;
        q[h] = vectors.as_chunks().0;
    }
    let mut heads = [[0.0; MOST]; H];
    let tiles = at.codes.chunks_exact(K * at.words);
    let rest = tiles.remainder();
    for (i, tile) in tiles.enumerate() {
        ahead.fetch(H, K * at.words * 4);
        let mut rows: [&[u32]; K] = [&[]; K];
        for t in 0..K {
            rows[t] = &tile[t * at.words..(t + 1) * at.words];
        }
        let dots = dot::<S, N, WHOLE, H, K>(simd, (at, lines), &q, rows, i * K);
        for h in 0..H {
            heads[h].as_chunks_mut::<K>().0[i] = dots[h];
        }
    }
    for (j, token) in (count / K * K..MOST).zip(rest.chunks_exact(at.words)) {
        let dots = dot::<S, N, WHOLE, H, 1>(simd, (at, lines), &q, [token], j);
        for h in 0..H {
            heads[h][j] = dots[h][0];
        }
    }
    for h in 0..H {
        let sums = &own[h * room + 2 * arranged(at.d)..(h + 1) * room];
        match lines {
            Some(lines) => {
                let scores = S::as_mut_simd_f32s(&mut heads[h]).0;
                for (offsets, &sum) in lines.offsets().iter().zip(sums) {
                    let (offsets, sum) = (S::as_simd_f32s(offsets).0, simd.splat_f32s(sum));
                    for (score, &offset) in scores.iter_mut().zip(offsets) {
                        *score = simd.mul_add_f32s(offset, sum, *score);
                    }
                }
            }
            None => heads[h].iter_mut().for_each(|score| *score += sums[0]),
        }
    }
    for (head, scores) in heads.iter().zip(scores.chunks_mut(stride)) {
        scores[..count].copy_from_slice(&head[..count]);
    }
}

/// The `H`×`K` sums of query times widened code times factor; the tokens are those from `first` on in the block.
#[inline(always)]
fn dot<S: Simd, const N: usize, const WHOLE: bool, const H: usize, const K: usize>(
    simd: S,
    (at, lines): (&Block<'_>, Option<&Lines>),
    q: &[&[[S::f32s; N]]; H],
    rows: [&[u32]; K],
    first: usize,
) -> [[f32; K]; H] {
    let zero = simd.splat_f32s(0.0);
    let mut total = [[zero; K]; H];
    for factor in 0..at.factors {
        let mut acc = [[zero; K]; H];
        for b in factor * at.shared..(factor + 1) * at.shared {
            let mut words = [simd.splat_u32s(0); K];
            for t in 0..K {
                words[t] = load::<S, WHOLE>(simd, rows[t], b);
            }
            for k in 0..N {
                let mut wide = [zero; K];
                for t in 0..K {
                    wide[t] = code::<S, N>(simd, words[t], k);
                }
                for h in 0..H {
                    let q = q[h][b][k];
                    for t in 0..K {
                        acc[h][t] = simd.mul_add_f32s(q, wide[t], acc[h][t]);
                    }
                }
            }
        }
        match lines {
            Some(lines) => {
                for t in 0..K {
                    let factor = match WHOLE {
                        true => simd.splat_f32s(lines.factors(factor)[first + t]),
                        false => lines.of_words::<S>(first + t, factor),
                    };
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
