//! Attention of one new token per sequence over everything cached: output and weights in one pass.
//!
//! Each (sequence, KV head) row is cut into chunks of a fixed number of tokens; a chunk computes its scores, a
//! local softmax and its share of the output for all query heads of the group, so that keys and values are read
//! once. Chunks are merged in order, which makes the result independent of the number of threads. Storage may be
//! f32, f16 or bf16; arithmetic is f32.

use super::element::Element;
use super::exp::exp_in_place;
use super::{Geometry, Reduce, RowView};
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

/// Tokens of a chunk: the unit of parallel work, and part of the definition of the rounding.
const CHUNK: usize = 512;
/// Tokens widened at a time: a block of keys stays in the first-level cache.
const BLOCK: usize = 32;
/// Multiply-adds below which handing work to other threads costs more than it saves.
const PARALLEL_FROM: usize = 1 << 16;

/// Where one query per row stands, and what it may see.
#[derive(Debug, Clone, Copy)]
pub(crate) struct DecodeQuery {
    /// Heads and dimensions.
    pub(crate) geometry: Geometry,
    /// Logical position of the new token and the layer's sliding window, where it has one.
    pub(crate) window: Option<(u32, usize)>,
}

/// Workspace kept between steps, so that a step allocates nothing.
#[derive(Debug, Clone, Default)]
pub(crate) struct DecodeScratch {
    buffer: Vec<f32>,
}

/// Attends each row's group of queries, `queries` `[rows, group, head_dim]` already scaled, over the row's
/// keys and values; writes `out` of the same shape. With `export`, appends per row the weights of all `n` tokens reduced over the
/// group to the vector. All rows hold the same number of tokens.
///
/// On a softmax that is not finite returns the index of the first such row.
pub(crate) fn decode<T: Element>(
    query: DecodeQuery,
    queries: &[f32],
    rows: &[RowView<'_, T>],
    export: Option<(Reduce, &mut Vec<f32>)>,
    scratch: &mut DecodeScratch,
    out: &mut [f32],
) -> std::result::Result<(), usize> {
    let Geometry {
        group, head_dim, ..
    } = query.geometry;
    let n = rows.first().map_or(0, |row| row.len(head_dim));
    if n == 0 {
        return Ok(());
    }
    let chunks = n.div_ceil(CHUNK);
    let layout = Slots {
        group,
        head_dim,
        tokens: n.min(CHUNK),
        widen: T::scratch(BLOCK.min(n) * head_dim),
    };
    let total = rows.len() * chunks * layout.size();
    if scratch.buffer.len() < total {
        scratch.buffer.resize(total, 0.0);
    }
    let buffer = &mut scratch.buffer[..total];
    let arch = Arch::new();
    let run = |(task, slots): (usize, &mut [f32])| {
        let (row, chunk) = (task / chunks, task % chunks);
        let from = chunk * CHUNK;
        let to = (from + CHUNK).min(n);
        arch.dispatch(Chunk {
            queries: &queries[row * group * head_dim..(row + 1) * group * head_dim],
            keys: &rows[row].keys[from * head_dim..to * head_dim],
            values: &rows[row].values[from * head_dim..to * head_dim],
            ids: query.window.map(|w| (&rows[row].ids[from..to], w)),
            layout,
            slots,
        });
    };
    if rows.len() * n * head_dim * group >= PARALLEL_FROM && rows.len() * chunks > 1 {
        buffer
            .par_chunks_mut(layout.size())
            .enumerate()
            .for_each(run);
    } else {
        buffer.chunks_mut(layout.size()).enumerate().for_each(run);
    }

    let mut export = export.map(|(reduce, weights)| {
        let from = weights.len();
        weights.resize(from + rows.len() * n, 0.0);
        (reduce, &mut weights[from..])
    });
    let mut factors = vec![0.0; chunks * group];
    for (row, parts) in buffer.chunks_exact(chunks * layout.size()).enumerate() {
        for (g, out) in out[row * group * head_dim..(row + 1) * group * head_dim]
            .chunks_exact_mut(head_dim)
            .enumerate()
        {
            merge_head(layout, parts, g, &mut factors, out).map_err(|()| row)?;
        }
        if let Some((reduce, weights)) = &mut export {
            let weights = &mut weights[row * n..(row + 1) * n];
            for ((part, weights), factors) in parts
                .chunks_exact(layout.size())
                .zip(weights.chunks_mut(CHUNK))
                .zip(factors.chunks_exact(group))
            {
                arch.dispatch(Export {
                    reduce: *reduce,
                    layout,
                    part,
                    factors,
                    weights,
                });
            }
        }
    }
    Ok(())
}

/// How one chunk's slice of the workspace is divided.
#[derive(Clone, Copy)]
struct Slots {
    group: usize,
    head_dim: usize,
    tokens: usize,
    widen: usize,
}

impl Slots {
    fn size(self) -> usize {
        self.group * (self.tokens + self.head_dim + 2) + self.widen
    }

    /// (scores `[group, tokens]`, output `[group, head_dim]`, maxima and sums `[2, group]`, widened block).
    fn split(self, slots: &mut [f32]) -> (&mut [f32], &mut [f32], &mut [f32], &mut [f32]) {
        let (scores, rest) = slots.split_at_mut(self.group * self.tokens);
        let (out, rest) = rest.split_at_mut(self.group * self.head_dim);
        let (stats, widen) = rest.split_at_mut(2 * self.group);
        (scores, out, stats, widen)
    }

    fn out(self, part: &[f32], g: usize) -> &[f32] {
        let from = self.group * self.tokens + g * self.head_dim;
        &part[from..from + self.head_dim]
    }

    /// (maximum, sum) of query head `g`.
    fn stats(self, part: &[f32], g: usize) -> (f32, f32) {
        let at = self.group * (self.tokens + self.head_dim);
        (part[at + g], part[at + self.group + g])
    }
}

/// Combines the chunks of one query head; leaves each chunk's weight factor in `factors` `[chunks, group]`.
fn merge_head(
    layout: Slots,
    parts: &[f32],
    g: usize,
    factors: &mut [f32],
    out: &mut [f32],
) -> std::result::Result<(), ()> {
    let parts = || parts.chunks_exact(layout.size());
    let max = parts()
        .map(|p| layout.stats(p, g).0)
        .fold(f32::NEG_INFINITY, f32::max);
    let mut total = 0.0;
    for (part, factor) in parts().zip(factors.chunks_exact_mut(layout.group)) {
        let (local, sum) = layout.stats(part, g);
        factor[g] = (local - max).exp();
        total += sum * factor[g];
    }
    if !(total.is_finite() && total > 0.0) {
        return Err(());
    }
    out.fill(0.0);
    for (part, factor) in parts().zip(factors.chunks_exact_mut(layout.group)) {
        factor[g] /= total;
        for (o, x) in out.iter_mut().zip(layout.out(part, g)) {
            *o += factor[g] * x;
        }
    }
    Ok(())
}

/// Scores, local softmax and partial output of one chunk of one row.
struct Chunk<'a, T> {
    queries: &'a [f32],
    keys: &'a [T],
    values: &'a [T],
    ids: Option<(&'a [u32], (u32, usize))>,
    layout: Slots,
    slots: &'a mut [f32],
}

impl<T: Element> WithSimd for Chunk<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Slots {
            group,
            head_dim: d,
            tokens: stride,
            ..
        } = self.layout;
        let (scores, out, stats, widen) = self.layout.split(self.slots);
        let count = self.keys.len() / d;
        for (b, keys) in self.keys.chunks(BLOCK * d).enumerate() {
            let keys = T::widen(keys, widen);
            let mut g = 0;
            while g < group {
                let width = heads_at_once(group - g);
                let queries = &self.queries[g * d..(g + width) * d];
                let scores = &mut scores[g * stride + b * BLOCK..];
                match width {
                    4 => score_block::<S, 4, 2>(simd, queries, keys, d, stride, scores),
                    2 => score_block::<S, 2, 4>(simd, queries, keys, d, stride, scores),
                    _ => score_block::<S, 1, 8>(simd, queries, keys, d, stride, scores),
                }
                g += width;
            }
        }
        for g in 0..group {
            let scores = &mut scores[g * stride..g * stride + count];
            if let Some((ids, (position, window))) = self.ids {
                for (score, &id) in scores.iter_mut().zip(ids) {
                    if (position - id) as usize >= window {
                        *score = f32::NEG_INFINITY;
                    }
                }
            }
            let max = maximum(simd, scores);
            // A chunk that is masked as a whole weighs nothing; NaN scores do not count as masked.
            let masked = max == f32::NEG_INFINITY && !scores.iter().any(|x| x.is_nan());
            stats[g] = max;
            stats[group + g] = if masked {
                scores.fill(0.0);
                0.0
            } else {
                exp_in_place(simd, scores, max)
            };
        }
        out.fill(0.0);
        for (b, values) in self.values.chunks(BLOCK * d).enumerate() {
            let values = T::widen(values, widen);
            let mut g = 0;
            while g < group {
                let width = heads_at_once(group - g);
                let weights = &scores[g * stride + b * BLOCK..];
                let out = &mut out[g * d..(g + width) * d];
                match width {
                    4 => mix_block::<S, 4, 2>(simd, weights, stride, values, d, out),
                    2 => mix_block::<S, 2, 4>(simd, weights, stride, values, d, out),
                    _ => mix_block::<S, 1, 8>(simd, weights, stride, values, d, out),
                }
                g += width;
            }
        }
    }
}

// Closures are avoided in what follows: they are functions of their own, which need not be compiled for the vector
// instructions that were dispatched to.

/// Query heads taken together when so many are left: fours, twos and ones.
#[inline(always)]
fn heads_at_once(left: usize) -> usize {
    match left {
        4.. => 4,
        2 | 3 => 2,
        _ => 1,
    }
}

/// The largest of `scores`; what it makes of NaN depends on the machine.
#[inline(always)]
fn maximum<S: Simd>(simd: S, scores: &[f32]) -> f32 {
    let (head, tail) = S::as_simd_f32s(scores);
    let mut max = simd.splat_f32s(f32::NEG_INFINITY);
    for &x in head {
        max = simd.max_f32s(max, x);
    }
    let mut max = simd.reduce_max_f32s(max);
    for &x in tail {
        max = max.max(x);
    }
    max
}

// Fewer heads at once take more keys or columns at once: eight sums under way hide the latency of the multiply-add.

/// scores[h, j] = q_h · k_j for `H` query heads and all keys of a block, `K` at a time; `scores` has row stride `stride`.
#[inline(always)]
fn score_block<S: Simd, const H: usize, const K: usize>(
    simd: S,
    queries: &[f32],
    keys: &[f32],
    d: usize,
    stride: usize,
    scores: &mut [f32],
) {
    let mut at = 0;
    let mut tiles = keys.chunks_exact(K * d);
    for tile in tiles.by_ref() {
        let mut rows: [&[f32]; K] = [&[]; K];
        for t in 0..K {
            rows[t] = &tile[t * d..(t + 1) * d];
        }
        let dots = dot::<S, H, K>(simd, queries, rows, d);
        for (h, dots) in dots.iter().enumerate() {
            scores[h * stride + at..h * stride + at + K].copy_from_slice(dots);
        }
        at += K;
    }
    for key in tiles.remainder().chunks_exact(d) {
        let dots = dot::<S, H, 1>(simd, queries, [key], d);
        for (h, dots) in dots.iter().enumerate() {
            scores[h * stride + at] = dots[0];
        }
        at += 1;
    }
}

/// The `H`×`K` dot products of `H` queries with `K` keys.
#[inline(always)]
fn dot<S: Simd, const H: usize, const K: usize>(
    simd: S,
    queries: &[f32],
    keys: [&[f32]; K],
    d: usize,
) -> [[f32; K]; H] {
    let vectors = d / S::F32_LANES;
    let whole = vectors * S::F32_LANES;
    let mut q: [&[S::f32s]; H] = [&[]; H];
    for h in 0..H {
        q[h] = &S::as_simd_f32s(&queries[h * d..h * d + whole]).0[..vectors];
    }
    let mut k: [&[S::f32s]; K] = [&[]; K];
    for t in 0..K {
        k[t] = &S::as_simd_f32s(&keys[t][..whole]).0[..vectors];
    }
    let mut acc = [[simd.splat_f32s(0.0); K]; H];
    for i in 0..vectors {
        for h in 0..H {
            let q = q[h][i];
            for t in 0..K {
                acc[h][t] = simd.mul_add_f32s(q, k[t][i], acc[h][t]);
            }
        }
    }
    let mut dots = [[0.0; K]; H];
    for h in 0..H {
        for t in 0..K {
            let mut dot = simd.reduce_sum_f32s(acc[h][t]);
            for i in whole..d {
                dot += queries[h * d + i] * keys[t][i];
            }
            dots[h][t] = dot;
        }
    }
    dots
}

/// out[h] += Σ_j weights[h, j] v_j for `H` query heads and the values of a block, `L` vectors of columns at a time.
#[inline(always)]
fn mix_block<S: Simd, const H: usize, const L: usize>(
    simd: S,
    weights: &[f32],
    stride: usize,
    values: &[f32],
    d: usize,
    out: &mut [f32],
) {
    // The block's weights by token, so that the loops below need no index into them.
    let mut packed = [[0.0; H]; BLOCK];
    let count = values.len() / d;
    for h in 0..H {
        let row = &weights[h * stride..h * stride + count];
        for (packed, &weight) in packed.iter_mut().zip(row) {
            packed[h] = weight;
        }
    }
    let packed = &packed[..count];
    let mut lane = 0;
    while lane + L * S::F32_LANES <= d {
        mix_lanes::<S, H, L>(simd, packed, values, d, lane, out);
        lane += L * S::F32_LANES;
    }
    while lane + S::F32_LANES <= d {
        mix_lanes::<S, H, 1>(simd, packed, values, d, lane, out);
        lane += S::F32_LANES;
    }
    if lane < d {
        for (row, weights) in values.chunks_exact(d).zip(packed) {
            for (h, w) in weights.iter().enumerate() {
                for i in lane..d {
                    out[h * d + i] += w * row[i];
                }
            }
        }
    }
}

/// `L` vectors' worth of columns of [`mix_block`], kept in registers over the block.
#[inline(always)]
fn mix_lanes<S: Simd, const H: usize, const L: usize>(
    simd: S,
    weights: &[[f32; H]],
    values: &[f32],
    d: usize,
    lane: usize,
    out: &mut [f32],
) {
    let width = L * S::F32_LANES;
    let mut acc = [[simd.splat_f32s(0.0); L]; H];
    for (row, weights) in values.chunks_exact(d).zip(weights) {
        let v = S::as_simd_f32s(&row[lane..lane + width]).0;
        let Some((v, _)) = v.split_first_chunk::<L>() else {
            return;
        };
        for h in 0..H {
            let w = simd.splat_f32s(weights[h]);
            for l in 0..L {
                acc[h][l] = simd.mul_add_f32s(w, v[l], acc[h][l]);
            }
        }
    }
    for h in 0..H {
        let held = S::as_mut_simd_f32s(&mut out[h * d + lane..h * d + lane + width]).0;
        for (held, acc) in held.iter_mut().zip(acc[h]) {
            *held = simd.add_f32s(*held, acc);
        }
    }
}

/// Scales a chunk's exponentials to weights and reduces them over the group.
struct Export<'a> {
    reduce: Reduce,
    layout: Slots,
    part: &'a [f32],
    factors: &'a [f32],
    weights: &'a mut [f32],
}

impl WithSimd for Export<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let count = self.weights.len();
        let share = 1.0 / self.factors.len() as f32;
        for (g, &factor) in self.factors.iter().enumerate() {
            let part = &self.part[g * self.layout.tokens..][..count];
            let pairs = self.weights.iter_mut().zip(part);
            match self.reduce {
                Reduce::Max => {
                    for (w, e) in pairs {
                        let x = e * factor;
                        *w = if x > *w { x } else { *w };
                    }
                }
                Reduce::Sum => {
                    for (w, e) in pairs {
                        *w += e * factor;
                    }
                }
                Reduce::Mean => {
                    for (w, e) in pairs {
                        *w += e * (factor * share);
                    }
                }
            }
        }
    }
}
