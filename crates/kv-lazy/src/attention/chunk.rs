//! The kernel: one chunk of a row's tokens under all query heads of the group.
//!
//! Keys and values are widened in registers, once for every four heads, and never stored wide. Elements that widen interleaved meet queries
//! that were brought into the same order once per chunk, and the output is brought back. What is read next is asked for piece
//! by piece, spread over all the work on what is there.

use super::element::{Element, Kernel, Widen};
use super::exp::exp_in_place;
use super::machine::{prefetch, sum_eight};
use pulp::Simd;

/// Bytes of a cache line.
const LINE: usize = 64;

/// Tokens worked on at a time: this block and the next fit the first-level cache with heads of 128.
const fn block<T>() -> usize {
    2 * MOST / std::mem::size_of::<T>()
}

/// Tokens of a block of the narrowest elements.
const MOST: usize = 32;

/// How one chunk's slice of the workspace is divided.
#[derive(Clone, Copy)]
pub(super) struct Slots {
    pub(super) group: usize,
    pub(super) head_dim: usize,
    pub(super) tokens: usize,
    /// Whether elements widen interleaved, which takes a copy of the queries.
    pub(super) interleaved: bool,
}

impl Slots {
    pub(super) fn size(self) -> usize {
        let copies = 1 + usize::from(self.interleaved);
        self.group * (self.tokens + 2 + copies * self.head_dim)
    }

    /// (scores `[group, tokens]`, output `[group, head_dim]`, maxima and sums `[2, group]`, arranged queries).
    fn split(self, slots: &mut [f32]) -> (&mut [f32], &mut [f32], &mut [f32], &mut [f32]) {
        let (scores, rest) = slots.split_at_mut(self.group * self.tokens);
        let (out, rest) = rest.split_at_mut(self.group * self.head_dim);
        let (stats, arranged) = rest.split_at_mut(2 * self.group);
        (scores, out, stats, arranged)
    }

    pub(super) fn out(self, part: &[f32], g: usize) -> &[f32] {
        let from = self.group * self.tokens + g * self.head_dim;
        &part[from..from + self.head_dim]
    }

    /// Where the maximum of query head `g` stands; its sum stands `group` further on.
    pub(super) fn maximum(self, g: usize) -> usize {
        self.group * (self.tokens + self.head_dim) + g
    }
}

/// Scores, local softmax and partial output of one chunk of one row.
pub(super) struct Chunk<'a, T> {
    pub(super) queries: &'a [f32],
    pub(super) keys: &'a [T],
    pub(super) values: &'a [T],
    /// What is read after the values.
    pub(super) after: &'a [T],
    pub(super) ids: Option<(&'a [u32], (u32, usize))>,
    pub(super) layout: Slots,
    pub(super) slots: &'a mut [f32],
}

impl<T: Element> Kernel<T> for Chunk<'_, T> {
    #[inline(always)]
    fn run<S: Simd, W: Widen<T>>(self, simd: S, widen: W) {
        let Slots {
            group,
            head_dim: d,
            tokens: stride,
            ..
        } = self.layout;
        let block = block::<T>();
        let (scores, out, stats, arranged) = self.layout.split(self.slots);
        let count = self.keys.len() / d;
        let queries = if W::INTERLEAVED {
            let pairs = self.queries.chunks_exact(d);
            for (from, to) in pairs.zip(arranged.chunks_exact_mut(d)) {
                part_even_and_odd::<S>(from, to);
            }
            &*arranged
        } else {
            self.queries
        };
        for (b, keys) in self.keys.chunks(block * d).enumerate() {
            let next = self.keys.get((b + 1) * block * d..).unwrap_or_default();
            let next = if next.is_empty() { self.values } else { next };
            let mut ahead = Ahead::new(next, d, group);
            let mut g = 0;
            while g < group {
                let width = heads_at_once(group - g);
                let queries = &queries[g * d..(g + width) * d];
                let scores = &mut scores[g * stride + b * block..];
                let at = (simd, widen, &mut ahead);
                match width {
                    4 => score_block::<S, W, T, 4, 2>(at, queries, keys, stride, scores),
                    2 => score_block::<S, W, T, 2, 4>(at, queries, keys, stride, scores),
                    _ => score_block::<S, W, T, 1, 8>(at, queries, keys, stride, scores),
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
        for (b, values) in self.values.chunks(block * d).enumerate() {
            let next = self.values.get((b + 1) * block * d..).unwrap_or_default();
            let next = if next.is_empty() { self.after } else { next };
            let mut ahead = Ahead::new(next, d, group);
            let mut g = 0;
            while g < group {
                let width = heads_at_once(group - g);
                let weights = &scores[g * stride + b * block..];
                let out = &mut out[g * d..(g + width) * d];
                let at = (simd, widen, &mut ahead);
                match width {
                    4 => mix_block::<S, W, T, 4, 1>(at, weights, values, stride, out),
                    2 => mix_block::<S, W, T, 2, 2>(at, weights, values, stride, out),
                    _ => mix_block::<S, W, T, 1, 4>(at, weights, values, stride, out),
                }
                g += width;
            }
        }
        if W::INTERLEAVED {
            for (out, parted) in out.chunks_exact_mut(d).zip(arranged.chunks_exact_mut(d)) {
                parted.copy_from_slice(out);
                join_even_and_odd::<S>(parted, out);
            }
        }
    }
}

// Closures are avoided in what follows: they are functions of their own, which need not be compiled for the vector
// instructions that were dispatched to.

/// Of each pack's worth of `from` the even elements, then the odd ones.
#[inline(always)]
fn part_even_and_odd<S: Simd>(from: &[f32], to: &mut [f32]) {
    to.copy_from_slice(from);
    let width = 2 * S::F32_LANES;
    for (from, to) in from.chunks_exact(width).zip(to.chunks_exact_mut(width)) {
        let (even, odd) = to.split_at_mut(S::F32_LANES);
        for ((pair, even), odd) in from.as_chunks::<2>().0.iter().zip(even).zip(odd) {
            [*even, *odd] = *pair;
        }
    }
}

/// The reverse of [`part_even_and_odd`], for what fills packs.
#[inline(always)]
fn join_even_and_odd<S: Simd>(from: &[f32], to: &mut [f32]) {
    let width = 2 * S::F32_LANES;
    for (from, to) in from.chunks_exact(width).zip(to.chunks_exact_mut(width)) {
        let (even, odd) = from.split_at(S::F32_LANES);
        for ((pair, even), odd) in to.as_chunks_mut::<2>().0.iter_mut().zip(even).zip(odd) {
            *pair = [*even, *odd];
        }
    }
}

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
    /// Lines that are still to be asked for.
    lines: std::slice::Chunks<'a, T>,
    head_dim: usize,
    /// Work that a line stands for, done so far and paid for by asking; in elements under one head.
    line: usize,
    done: usize,
    paid: usize,
}

impl<'a, T> Ahead<'a, T> {
    /// The first block of `data`, whose rows have `head_dim` elements, for `group` heads.
    #[inline(always)]
    fn new(data: &'a [T], head_dim: usize, group: usize) -> Self {
        let line = LINE / std::mem::size_of::<T>();
        Self {
            lines: data[..data.len().min(block::<T>() * head_dim)].chunks(line),
            head_dim,
            line: line * group,
            done: 0,
            paid: 0,
        }
    }

    /// Asks for as large a share of the next block as `heads` times `elements` are of all heads' work on this one.
    #[inline(always)]
    fn fetch(&mut self, heads: usize, elements: usize) {
        self.done += heads * elements;
        while self.paid < self.done {
            let Some(line) = self.lines.next() else {
                return;
            };
            prefetch(&line[0]);
            self.paid += self.line;
        }
    }
}

/// The machine's vectors, how to widen into them, and what to ask for meanwhile.
type At<'a, 'b, S, W, T> = (S, W, &'a mut Ahead<'b, T>);

// Fewer heads at once take more keys or columns at once: eight sums under way hide the latency of the multiply-add.

/// scores[h, j] = q_h · k_j for `H` query heads and all keys of a block, `K` at a time; `scores` has row stride `stride`.
#[inline(always)]
fn score_block<S: Simd, W: Widen<T>, T: Element, const H: usize, const K: usize>(
    (simd, widen, ahead): At<'_, '_, S, W, T>,
    queries: &[f32],
    keys: &[T],
    stride: usize,
    scores: &mut [f32],
) {
    let d = ahead.head_dim;
    let count = keys.len() / d;
    // In arrays, so that the loop needs no index checked.
    let mut heads = [[0.0; MOST]; H];
    let tiles = keys.chunks_exact(K * d);
    let rest = tiles.remainder();
    for (i, tile) in (0..MOST / K).zip(tiles) {
        ahead.fetch(H, K * d);
        let mut rows: [&[T]; K] = [&[]; K];
        for t in 0..K {
            rows[t] = &tile[t * d..(t + 1) * d];
        }
        let dots = dot::<S, W, T, H, K>(simd, widen, queries, rows, d);
        for h in 0..H {
            heads[h].as_chunks_mut::<K>().0[i] = dots[h];
        }
    }
    for (j, key) in (count / K * K..MOST).zip(rest.chunks_exact(d)) {
        let dots = dot::<S, W, T, H, 1>(simd, widen, queries, [key], d);
        for h in 0..H {
            heads[h][j] = dots[h][0];
        }
    }
    let whole = T::packs::<S>(&keys[..d]).len() * 2 * S::F32_LANES;
    if whole < d {
        for (j, key) in (0..MOST).zip(keys.chunks_exact(d)) {
            for h in 0..H {
                for i in whole..d {
                    heads[h][j] += queries[h * d + i] * key[i].single();
                }
            }
        }
    }
    for (head, scores) in heads.iter().zip(scores.chunks_mut(stride)) {
        scores[..count].copy_from_slice(&head[..count]);
    }
}

/// The `H`×`K` dot products of `H` queries with `K` keys, as far as whole packs reach.
#[inline(always)]
fn dot<S: Simd, W: Widen<T>, T: Element, const H: usize, const K: usize>(
    simd: S,
    widen: W,
    queries: &[f32],
    keys: [&[T]; K],
    d: usize,
) -> [[f32; K]; H] {
    let packs = T::packs::<S>(keys[0]).len();
    let mut q: [&[[S::f32s; 2]]; H] = [&[]; H];
    for h in 0..H {
        let vectors = S::as_simd_f32s(&queries[h * d..(h + 1) * d]).0;
        q[h] = &vectors.as_chunks().0[..packs];
    }
    let mut k: [&[T::Pack<S>]; K] = [&[]; K];
    for t in 0..K {
        k[t] = &T::packs::<S>(keys[t])[..packs];
    }
    let mut acc = [[simd.splat_f32s(0.0); K]; H];
    for i in 0..packs {
        let mut wide = [[simd.splat_f32s(0.0); 2]; K];
        for t in 0..K {
            wide[t] = widen.widen(simd, &k[t][i]);
        }
        for half in 0..2 {
            for h in 0..H {
                let q = q[h][i][half];
                for t in 0..K {
                    acc[h][t] = simd.mul_add_f32s(q, wide[t][half], acc[h][t]);
                }
            }
        }
    }
    lane_sums::<S, H, K>(simd, &acc)
}

/// The sum of each vector's lanes.
#[inline(always)]
fn lane_sums<S: Simd, const H: usize, const K: usize>(
    simd: S,
    vectors: &[[S::f32s; K]; H],
) -> [[f32; K]; H] {
    let mut sums = [[0.0; K]; H];
    if H * K == 8
        && let Some(eight) = vectors.as_flattened().first_chunk()
        && let Some(eight) = sum_eight(simd, eight)
    {
        sums.as_flattened_mut().copy_from_slice(&eight);
        return sums;
    }
    for h in 0..H {
        for t in 0..K {
            sums[h][t] = simd.reduce_sum_f32s(vectors[h][t]);
        }
    }
    sums
}

/// out[h] += Σ_j weights[h, j] v_j for `H` query heads and the values of a block, `L` packs of columns at a time.
#[inline(always)]
fn mix_block<S: Simd, W: Widen<T>, T: Element, const H: usize, const L: usize>(
    (simd, widen, ahead): At<'_, '_, S, W, T>,
    weights: &[f32],
    values: &[T],
    stride: usize,
    out: &mut [f32],
) {
    let d = ahead.head_dim;
    let count = values.len() / d;
    // In arrays, as above.
    let mut heads = [[0.0; MOST]; H];
    for (head, weights) in heads.iter_mut().zip(weights.chunks(stride)) {
        head[..count].copy_from_slice(&weights[..count]);
    }
    let packs = T::packs::<S>(&values[..d]).len();
    let width = 2 * S::F32_LANES;
    let mut pack = 0;
    while pack + L <= packs {
        ahead.fetch(H, L * width * count);
        mix_packs::<S, W, T, H, L>(simd, widen, &heads, values, d, pack, out);
        pack += L;
    }
    while pack < packs {
        ahead.fetch(H, width * count);
        mix_packs::<S, W, T, H, 1>(simd, widen, &heads, values, d, pack, out);
        pack += 1;
    }
    let whole = packs * width;
    if whole < d {
        for (j, value) in (0..MOST).zip(values.chunks_exact(d)) {
            for h in 0..H {
                for i in whole..d {
                    out[h * d + i] += heads[h][j] * value[i].single();
                }
            }
        }
    }
}

/// `L` packs' worth of columns of [`mix_block`], kept in registers over the block.
#[inline(always)]
fn mix_packs<S: Simd, W: Widen<T>, T: Element, const H: usize, const L: usize>(
    simd: S,
    widen: W,
    weights: &[[f32; MOST]; H],
    values: &[T],
    d: usize,
    pack: usize,
    out: &mut [f32],
) {
    let width = 2 * S::F32_LANES;
    let mut acc = [[[simd.splat_f32s(0.0); 2]; L]; H];
    for (j, row) in (0..MOST).zip(values.chunks_exact(d)) {
        let packs = T::packs::<S>(&row[pack * width..(pack + L) * width]);
        let Some((packs, _)) = packs.split_first_chunk::<L>() else {
            return;
        };
        let mut wide = [[simd.splat_f32s(0.0); 2]; L];
        for l in 0..L {
            wide[l] = widen.widen(simd, &packs[l]);
        }
        for h in 0..H {
            let w = simd.splat_f32s(weights[h][j]);
            for l in 0..L {
                for half in 0..2 {
                    acc[h][l][half] = simd.mul_add_f32s(w, wide[l][half], acc[h][l][half]);
                }
            }
        }
    }
    for h in 0..H {
        let from = h * d + pack * width;
        let held = S::as_mut_simd_f32s(&mut out[from..from + L * width]).0;
        for (held, acc) in held.iter_mut().zip(acc[h].as_flattened()) {
            *held = simd.add_f32s(*held, *acc);
        }
    }
}
