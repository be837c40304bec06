//! Attention of one new token per sequence over everything cached: output and weights in one pass.
//!
//! Each (sequence, KV head) row is cut into chunks of a fixed number of tokens; a chunk computes its scores, a
//! local softmax and its share of the output for all query heads of the group, so that keys and values are read
//! once, from memory that was asked for one block ahead. Chunks are merged in order, which makes the result independent of the
//! number of threads. Storage may be f32, f16 or bf16; arithmetic is f32.

use super::element::Element;
use super::exp::exp_in_place;
use super::machine::prefetch;
use super::{Geometry, Reduce, RowView};
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

/// Tokens of a chunk: the unit of parallel work, and part of the definition of the rounding.
const CHUNK: usize = 512;
/// Tokens worked on at a time: this block and the next fit the first-level cache, widened to f32 and with heads of 128.
const BLOCK: usize = 16;
/// Multiply-adds below which handing work to other threads costs more than it saves.
const PARALLEL_FROM: usize = 1 << 16;
/// Bytes of a cache line.
const LINE: usize = 64;

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
    let parts = &mut scratch.buffer[..total];
    let (reduce, weights) = match export {
        Some((reduce, weights)) => {
            let from = weights.len();
            weights.resize(from + rows.len() * n, 0.0);
            (reduce, &mut weights[from..])
        }
        None => (Reduce::default(), &mut [][..]),
    };

    let arch = Arch::new();
    let attend = |row: usize, chunk: usize, slots: &mut [f32]| {
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
    let finish = |parts: &mut [f32], weights: &mut [f32], out: &mut [f32]| {
        let mut heads = out.chunks_exact_mut(head_dim).enumerate();
        let good = heads.all(|(g, out)| merge_head(layout, parts, g, out));
        let parts = parts.chunks_exact(layout.size());
        for (part, weights) in parts.zip(weights.chunks_mut(CHUNK)) {
            arch.dispatch(Export {
                reduce,
                layout,
                part,
                weights,
            });
        }
        good
    };
    let per_row = chunks * layout.size();
    let mut weights = weights.chunks_exact_mut(n);
    let tasks = parts
        .chunks_exact_mut(per_row)
        .zip(out.chunks_exact_mut(group * head_dim))
        .enumerate()
        .map(|(row, (parts, out))| (row, parts, out, weights.next().unwrap_or_default()));
    let whole = |(row, parts, out, weights): Task<'_>| {
        let slots = parts.chunks_exact_mut(layout.size());
        slots
            .enumerate()
            .for_each(|(chunk, slots)| attend(row, chunk, slots));
        finish(parts, weights, out)
    };

    let threads = rayon::current_num_threads();
    let worth_it = rows.len() * n * head_dim * group >= PARALLEL_FROM;
    let good: Vec<bool> = if threads == 1 || !worth_it {
        tasks.map(whole).collect()
    } else {
        let tasks: Vec<Task<'_>> = tasks.collect();
        // Whole rows need the other threads only once; they must be many for all threads to end together.
        if rows.len().is_multiple_of(threads) || rows.len() >= 4 * threads {
            tasks.into_par_iter().map(whole).collect()
        } else {
            let split = |(row, parts, out, weights): Task<'_>| {
                let slots = parts.par_chunks_exact_mut(layout.size());
                slots
                    .enumerate()
                    .for_each(|(chunk, slots)| attend(row, chunk, slots));
                finish(parts, weights, out)
            };
            tasks.into_par_iter().map(split).collect()
        }
    };
    good.iter().position(|good| !good).map_or(Ok(()), Err)
}

/// A row with its workspace, its outputs and the place for its weights, which is empty where they are not wanted.
type Task<'a> = (usize, &'a mut [f32], &'a mut [f32], &'a mut [f32]);

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

    /// Where the maximum of query head `g` stands; its sum stands `group` further on.
    fn maximum(self, g: usize) -> usize {
        self.group * (self.tokens + self.head_dim) + g
    }
}

/// Combines the chunks of one query head and leaves each chunk's weight factor in place of its maximum; false where the
/// softmax was not finite.
fn merge_head(layout: Slots, parts: &mut [f32], g: usize, out: &mut [f32]) -> bool {
    let (at_max, at_sum) = (layout.maximum(g), layout.maximum(g) + layout.group);
    let max = parts
        .chunks_exact(layout.size())
        .fold(f32::NEG_INFINITY, |max, part| max.max(part[at_max]));
    let mut total = 0.0;
    for part in parts.chunks_exact_mut(layout.size()) {
        part[at_max] = (part[at_max] - max).exp();
        total += part[at_sum] * part[at_max];
    }
    if !(total.is_finite() && total > 0.0) {
        return false;
    }
    out.fill(0.0);
    for part in parts.chunks_exact_mut(layout.size()) {
        part[at_max] /= total;
        let factor = part[at_max];
        for (o, x) in out.iter_mut().zip(layout.out(part, g)) {
            *o += factor * x;
        }
    }
    true
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
            let next = self.keys.get((b + 1) * BLOCK * d..).unwrap_or_default();
            let mut ahead = Ahead::new(if next.is_empty() { self.values } else { next }, d);
            let keys = T::widen(keys, widen);
            let mut g = 0;
            while g < group {
                let width = heads_at_once(group - g);
                let queries = &self.queries[g * d..(g + width) * d];
                let scores = &mut scores[g * stride + b * BLOCK..];
                match width {
                    4 => score_block::<S, 4, 2, T>(simd, queries, keys, stride, &mut ahead, scores),
                    2 => score_block::<S, 2, 4, T>(simd, queries, keys, stride, &mut ahead, scores),
                    _ => score_block::<S, 1, 8, T>(simd, queries, keys, stride, &mut ahead, scores),
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
            let next = self.values.get((b + 1) * BLOCK * d..).unwrap_or_default();
            let mut ahead = Ahead::new(next, d);
            let values = T::widen(values, widen);
            let mut g = 0;
            while g < group {
                let width = heads_at_once(group - g);
                let weights = &scores[g * stride + b * BLOCK..];
                let out = &mut out[g * d..(g + width) * d];
                match width {
                    4 => mix_block::<S, 4, 2, T>(simd, weights, values, stride, &mut ahead, out),
                    2 => mix_block::<S, 2, 4, T>(simd, weights, values, stride, &mut ahead, out),
                    _ => mix_block::<S, 1, 8, T>(simd, weights, values, stride, &mut ahead, out),
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

/// What the next block will read, asked for piece by piece while this one is computed: all at once would fill the machine's queue of
/// outstanding lines and stop it.
struct Ahead<'a, T> {
    next: &'a [T],
    head_dim: usize,
}

impl<'a, T> Ahead<'a, T> {
    /// The first block of `data`, whose rows have `head_dim` elements.
    #[inline(always)]
    fn new(data: &'a [T], head_dim: usize) -> Self {
        let next = &data[..data.len().min(BLOCK * head_dim)];
        Self { next, head_dim }
    }

    /// Asks for the next `elements`.
    #[inline(always)]
    fn fetch(&mut self, elements: usize) {
        let (now, later) = self.next.split_at(elements.min(self.next.len()));
        for line in now.chunks_exact(LINE / std::mem::size_of::<T>()) {
            prefetch(&line[0]);
        }
        self.next = later;
    }
}

// Fewer heads at once take more keys or columns at once: eight sums under way hide the latency of the multiply-add.

/// scores[h, j] = q_h · k_j for `H` query heads and all keys of a block, `K` at a time; `scores` has row stride `stride`.
#[inline(always)]
fn score_block<S: Simd, const H: usize, const K: usize, T>(
    simd: S,
    queries: &[f32],
    keys: &[f32],
    stride: usize,
    ahead: &mut Ahead<'_, T>,
    scores: &mut [f32],
) {
    let d = ahead.head_dim;
    let mut at = 0;
    let mut tiles = keys.chunks_exact(K * d);
    for tile in tiles.by_ref() {
        ahead.fetch(K * d);
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
fn mix_block<S: Simd, const H: usize, const L: usize, T>(
    simd: S,
    weights: &[f32],
    values: &[f32],
    stride: usize,
    ahead: &mut Ahead<'_, T>,
    out: &mut [f32],
) {
    let d = ahead.head_dim;
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
        ahead.fetch(L * S::F32_LANES * count);
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
    weights: &'a mut [f32],
}

impl WithSimd for Export<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Slots { group, tokens, .. } = self.layout;
        let count = self.weights.len();
        let share = match self.reduce {
            Reduce::Mean => 1.0 / group as f32,
            Reduce::Max | Reduce::Sum => 1.0,
        };
        let (weights, weights_tail) = S::as_mut_simd_f32s(self.weights);
        for g in 0..group {
            let factor = self.part[self.layout.maximum(g)] * share;
            let factors = simd.splat_f32s(factor);
            let (part, part_tail) = S::as_simd_f32s(&self.part[g * tokens..][..count]);
            let pairs = weights.iter_mut().zip(part);
            let tails = weights_tail.iter_mut().zip(part_tail);
            if self.reduce == Reduce::Max {
                for (w, &e) in pairs {
                    *w = simd.max_f32s(*w, simd.mul_f32s(e, factors));
                }
                for (w, e) in tails {
                    *w = w.max(e * factor);
                }
            } else {
                for (w, &e) in pairs {
                    *w = simd.mul_add_f32s(e, factors, *w);
                }
                for (w, e) in tails {
                    *w += e * factor;
                }
            }
        }
    }
}
