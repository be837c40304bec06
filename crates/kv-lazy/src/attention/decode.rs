//! Attention of one new token per sequence over everything cached: output and weights in one pass.
//!
//! Each (sequence, KV head) row is cut into chunks of a fixed number of tokens; a chunk computes its scores, a
//! local softmax and its share of the output for all query heads of the group, so that keys and values are read
//! once, from memory that was asked for one block ahead. Chunks are merged in order, which makes the result independent of the
//! number of threads. Storage may be f32, f16 or bf16; arithmetic is f32.

use super::chunk::{Chunk, Slots};
use super::element::Element;
use super::{Geometry, Reduce, RowView};
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

/// Tokens of a chunk: the unit of parallel work, and part of the definition of the rounding.
const CHUNK: usize = 512;
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
        interleaved: T::INTERLEAVED,
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
        let after = match rows.get(row + 1) {
            Some(next) if to == n => next.keys,
            _ => &rows[row].keys[to * head_dim..],
        };
        T::dispatch(Chunk {
            queries: &queries[row * group * head_dim..(row + 1) * group * head_dim],
            keys: &rows[row].keys[from * head_dim..to * head_dim],
            values: &rows[row].values[from * head_dim..to * head_dim],
            after,
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
