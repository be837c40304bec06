//! The kernel for f32, f16 and bf16: scores of a chunk's keys and the mix of its values under several query heads at once.
//!
//! Keys and values are widened in registers, once for every four heads, and never stored wide. Elements that widen interleaved meet queries
//! that were brought into the same order once per chunk, and the output is brought back. What is read next is asked for piece
//! by piece, spread over all the work on what is there.

use super::ahead::{Ahead, MOST, heads_at_once};
use super::element::{Element, Kernel, Widen};
use super::machine::sum_eight;
use pulp::Simd;

/// Tokens worked on at a time: this block and the next fit the first-level cache with heads of 128.
const fn block<T>() -> usize {
    2 * MOST / std::mem::size_of::<T>()
}

/// scores[h, j] = q_h · k_j for all heads and keys of a chunk.
pub(super) struct Scores<'a, T> {
    /// `[heads, d]`.
    pub(super) queries: &'a [f32],
    /// `[tokens, d]`.
    pub(super) keys: &'a [T],
    pub(super) head_dim: usize,
    /// What is read after the keys.
    pub(super) next: &'a [u8],
    /// Row length of `scores`.
    pub(super) stride: usize,
    pub(super) scores: &'a mut [f32],
    /// Room for the queries in another order.
    pub(super) scratch: &'a mut [f32],
}

impl<T: Element> Kernel<T> for Scores<'_, T> {
    fn row(&self) -> usize {
        self.head_dim
    }

    #[inline(always)]
    fn run<S: Simd, W: Widen<T>>(self, simd: S, widen: W) {
        let (d, block, stride) = (self.head_dim, block::<T>(), self.stride);
        let heads = self.queries.len() / d;
        let queries = if W::INTERLEAVED {
            let pairs = self.queries.chunks_exact(d);
            for (from, to) in pairs.zip(self.scratch.chunks_exact_mut(d)) {
                part_even_and_odd::<S>(from, to);
            }
            &*self.scratch
        } else {
            self.queries
        };
        for (b, keys) in self.keys.chunks(block * d).enumerate() {
            let next = self.keys.get((b + 1) * block * d..).unwrap_or_default();
            let next = if next.is_empty() {
                self.next
            } else {
                T::bytes(next)
            };
            let mut ahead = Ahead::new(next, block * d * std::mem::size_of::<T>(), heads);
            let mut h = 0;
            while h < heads {
                let width = heads_at_once(heads - h);
                let queries = &queries[h * d..(h + width) * d];
                let scores = &mut self.scores[h * stride + b * block..];
                let at = (simd, widen, &mut ahead, d);
                match width {
                    4 => score_block::<S, W, T, 4, 2>(at, queries, keys, stride, scores),
                    2 => score_block::<S, W, T, 2, 4>(at, queries, keys, stride, scores),
                    _ => score_block::<S, W, T, 1, 8>(at, queries, keys, stride, scores),
                }
                h += width;
            }
        }
    }
}

/// out[h] = Σ_j weights[h, j] v_j for all heads and values of a chunk.
pub(super) struct Mix<'a, T> {
    /// `[heads, stride]`.
    pub(super) weights: &'a [f32],
    pub(super) stride: usize,
    /// `[tokens, d]`.
    pub(super) values: &'a [T],
    pub(super) head_dim: usize,
    /// What is read after the values.
    pub(super) next: &'a [u8],
    /// `[heads, d]`.
    pub(super) out: &'a mut [f32],
    /// Room for the output in another order.
    pub(super) scratch: &'a mut [f32],
}

impl<T: Element> Kernel<T> for Mix<'_, T> {
    fn row(&self) -> usize {
        self.head_dim
    }

    #[inline(always)]
    fn run<S: Simd, W: Widen<T>>(self, simd: S, widen: W) {
        let (d, block, stride) = (self.head_dim, block::<T>(), self.stride);
        let heads = self.out.len() / d;
        self.out.fill(0.0);
        for (b, values) in self.values.chunks(block * d).enumerate() {
            let next = self.values.get((b + 1) * block * d..).unwrap_or_default();
            let next = if next.is_empty() {
                self.next
            } else {
                T::bytes(next)
            };
            let mut ahead = Ahead::new(next, block * d * std::mem::size_of::<T>(), heads);
            let mut h = 0;
            while h < heads {
                let width = heads_at_once(heads - h);
                let weights = &self.weights[h * stride + b * block..];
                let out = &mut self.out[h * d..(h + width) * d];
                let at = (simd, widen, &mut ahead, d);
                match width {
                    4 => mix_block::<S, W, T, 4, 1>(at, weights, values, stride, out),
                    2 => mix_block::<S, W, T, 2, 2>(at, weights, values, stride, out),
                    _ => mix_block::<S, W, T, 1, 4>(at, weights, values, stride, out),
                }
                h += width;
            }
        }
        if W::INTERLEAVED {
            let pairs = self.out.chunks_exact_mut(d);
            for (out, parted) in pairs.zip(self.scratch.chunks_exact_mut(d)) {
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

/// The machine's vectors, how to widen into them, what to ask for meanwhile, and the elements of a head.
type At<'a, 'b, S, W> = (S, W, &'a mut Ahead<'b>, usize);

// Fewer heads at once take more keys or columns at once: eight sums under way hide the latency of the multiply-add.

/// scores[h, j] = q_h · k_j for `H` query heads and all keys of a block, `K` at a time; `scores` has row stride `stride`.
#[inline(always)]
fn score_block<S: Simd, W: Widen<T>, T: Element, const H: usize, const K: usize>(
    (simd, widen, ahead, d): At<'_, '_, S, W>,
    queries: &[f32],
    keys: &[T],
    stride: usize,
    scores: &mut [f32],
) {
    let count = keys.len() / d;
    // In arrays, so that the loop needs no index checked.
    let mut heads = [[0.0; MOST]; H];
    let tiles = keys.chunks_exact(K * d);
    let rest = tiles.remainder();
    for (i, tile) in (0..MOST / K).zip(tiles) {
        ahead.fetch(H, K * d * std::mem::size_of::<T>());
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
pub(super) fn lane_sums<S: Simd, const H: usize, const K: usize>(
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
    (simd, widen, ahead, d): At<'_, '_, S, W>,
    weights: &[f32],
    values: &[T],
    stride: usize,
    out: &mut [f32],
) {
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
        ahead.fetch(H, L * width * count * std::mem::size_of::<T>());
        mix_packs::<S, W, T, H, L>((simd, widen, d), &heads, values, pack, out);
        pack += L;
    }
    while pack < packs {
        ahead.fetch(H, width * count * std::mem::size_of::<T>());
        mix_packs::<S, W, T, H, 1>((simd, widen, d), &heads, values, pack, out);
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
    (simd, widen, d): (S, W, usize),
    weights: &[[f32; MOST]; H],
    values: &[T],
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
