//! Attention of a few new tokens per sequence over everything cached: output and weights in one pass.
//!
//! Each (sequence, KV head) row is cut into chunks of a fixed number of tokens; a chunk computes its scores, a
//! local softmax and its share of the output for all queries of the group, so that keys and values are read
//! once, from memory that was asked for one block ahead. Chunks are merged in order, which makes the result independent of the
//! number of threads. Storage may be floats or quantised; arithmetic is f32.

use super::Geometry;
use super::chunk::{CHUNK, Chunk, Mask, Slots};
use super::rows::{Elements, RowView};
use super::weights::{Exported, Reduce, WeightKinds};
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

/// Multiply-adds below which handing work to other threads costs more than it saves.
const PARALLEL_FROM: usize = 1 << 16;

/// The queries of a call: `tokens` per row, whose keys are the row's last.
#[derive(Debug, Clone, Copy)]
pub(crate) struct DecodeQuery {
    /// Heads and dimensions.
    pub(crate) geometry: Geometry,
    /// New tokens per row; each sees the row's tokens up to its own.
    pub(crate) tokens: usize,
    /// Cap on q·k.
    pub(crate) cap: Option<f32>,
    /// Logical position of the first new token and the layer's sliding window, where it has one.
    pub(crate) window: Option<(u32, usize)>,
}

/// Where a call's weights go.
pub(crate) struct Export<'a> {
    /// Prepared for the rows of the call.
    pub(crate) into: &'a mut Exported,
    /// The exported query that the call's last query is.
    pub(crate) last: usize,
    /// Whether column sums are exported.
    pub(crate) columns: bool,
}

/// Workspace kept between steps, so that a step allocates little.
#[derive(Debug, Clone, Default)]
pub(crate) struct DecodeScratch {
    buffer: Vec<f32>,
}

/// Attends each row's queries, `queries` `[rows, group, tokens, head_dim]` already scaled, over the row's keys and values; writes `out` of the
/// same shape. Rows may hold different numbers of tokens.
///
/// On a softmax that is not finite returns the index of the first such row.
pub(crate) fn decode(
    query: DecodeQuery,
    queries: &[f32],
    rows: &[RowView<'_>],
    export: Option<Export<'_>>,
    scratch: &mut DecodeScratch,
    out: &mut [f32],
) -> std::result::Result<(), usize> {
    let Geometry { group, head_dim } = query.geometry;
    let lanes = group * query.tokens;
    let longest = rows.iter().map(RowView::len).max().unwrap_or(0);
    if longest == 0 {
        return Ok(());
    }
    let layout = Slots::new(rows, lanes, head_dim, longest);
    let chunks = |row: &RowView<'_>| row.chunks(CHUNK);
    let total = rows.iter().map(chunks).sum::<usize>() * layout.size();
    if scratch.buffer.len() < total {
        scratch.buffer.resize(total, 0.0);
    }
    let mut parts = &mut scratch.buffer[..total];

    let (wanted, mut weights): (Wanted, Vec<&mut [f32]>) = match export {
        Some(Export {
            into,
            last,
            columns,
        }) => {
            let wanted = Wanted {
                kinds: into.kinds(),
                queries: into.queries(),
                last,
                columns,
                blocks: into.blocks(),
            };
            (wanted, into.rows_mut().collect())
        }
        None => (Wanted::default(), Vec::new()),
    };
    let mut weights = weights.drain(..);
    let tasks: Vec<Task<'_>> = rows
        .iter()
        .zip(out.chunks_exact_mut(lanes * head_dim))
        .enumerate()
        .map(|(index, (row, out))| {
            let (mine, rest) = std::mem::take(&mut parts).split_at_mut(chunks(row) * layout.size());
            parts = rest;
            Task {
                index,
                parts: mine,
                out,
                weights: weights.next().unwrap_or_default(),
            }
        })
        .collect();

    let arch = Arch::new();
    let attend = |index: usize, chunk: usize, slots: &mut [f32]| {
        let row = &rows[index];
        let (first, part) = row.chunk(chunk, CHUNK, head_dim);
        let (row_after, chunk_after) = if chunk + 1 < row.chunks(CHUNK) {
            (Some(row), chunk + 1)
        } else {
            (rows.get(index + 1), 0)
        };
        let after = row_after.map_or(Elements::NONE, |row| {
            row.chunk(chunk_after, CHUNK, head_dim).1.keys
        });
        let chunk = Chunk {
            queries: &queries[index * lanes * head_dim..(index + 1) * lanes * head_dim],
            part,
            after: after.bytes(),
            cap: query.cap,
            mask: Mask {
                ids: row.ids.get(first..first + part.len).unwrap_or_default(),
                window: query.window,
                tokens: query.tokens,
                first,
                visible: row.len() + 1 - query.tokens,
            },
            layout,
            slots,
        };
        chunk.run();
    };
    let finish = |task: Task<'_>| {
        let mut heads = task.out.chunks_exact_mut(head_dim).enumerate();
        let good = heads.all(|(lane, out)| merge_lane(layout, task.parts, lane, out));
        for (number, part) in task.parts.chunks_exact(layout.size()).enumerate() {
            let (from, chunk) = rows[task.index].chunk(number, CHUNK, head_dim);
            arch.dispatch(Weights {
                wanted,
                layout,
                part,
                tokens: query.tokens,
                len: task.weights.len() / wanted.blocks.max(1),
                from,
                count: chunk.len,
                weights: &mut *task.weights,
            });
        }
        good
    };
    let whole = |task: Task<'_>| {
        let slots = task.parts.chunks_exact_mut(layout.size());
        let index = task.index;
        slots
            .enumerate()
            .for_each(|(chunk, slots)| attend(index, chunk, slots));
        finish(task)
    };

    let threads = rayon::current_num_threads();
    let work = rows.iter().map(RowView::len).sum::<usize>() * head_dim * lanes;
    let good: Vec<bool> = if threads == 1 || work < PARALLEL_FROM {
        tasks.into_iter().map(whole).collect()
    } else if rows.len().is_multiple_of(threads) || rows.len() >= 4 * threads {
        // Whole rows need the other threads only once; they must be many for all threads to end together.
        tasks.into_par_iter().map(whole).collect()
    } else {
        let split = |task: Task<'_>| {
            let slots = task.parts.par_chunks_exact_mut(layout.size());
            let index = task.index;
            slots
                .enumerate()
                .for_each(|(chunk, slots)| attend(index, chunk, slots));
            finish(task)
        };
        tasks.into_par_iter().map(split).collect()
    };
    good.iter().position(|good| !good).map_or(Ok(()), Err)
}

/// A row with its workspace, its outputs and the place for its weights, which is empty where they are not wanted.
struct Task<'a> {
    index: usize,
    parts: &'a mut [f32],
    out: &'a mut [f32],
    weights: &'a mut [f32],
}

/// Combines the chunks of one lane and leaves each chunk's weight factor in place of its maximum; false where the
/// softmax was not finite.
fn merge_lane(layout: Slots, parts: &mut [f32], lane: usize, out: &mut [f32]) -> bool {
    let (at_max, at_sum) = (layout.maximum(lane), layout.maximum(lane) + layout.lanes);
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
        for (o, x) in out.iter_mut().zip(layout.out(part, lane)) {
            *o += factor * x;
        }
    }
    true
}

/// Which of a call's weights are handed out.
#[derive(Clone, Copy, Default)]
struct Wanted {
    kinds: WeightKinds,
    queries: usize,
    last: usize,
    columns: bool,
    /// Blocks of n weights that a row has room for.
    blocks: usize,
}

/// Scales a chunk's exponentials to weights and reduces them over the group, or over all queries.
struct Weights<'a> {
    wanted: Wanted,
    layout: Slots,
    part: &'a [f32],
    /// Queries per head.
    tokens: usize,
    /// Tokens of the row.
    len: usize,
    /// The chunk's slots `from..from + count`.
    from: usize,
    count: usize,
    /// `[blocks, len]`.
    weights: &'a mut [f32],
}

impl WithSimd for Weights<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self {
            wanted,
            layout,
            part,
            tokens,
            len,
            from,
            count,
            weights,
        } = self;
        if weights.is_empty() {
            return;
        }
        let group = layout.lanes / tokens;
        let reductions = wanted.kinds.reductions().count();
        // A lane's exponentials and the factor that makes weights of them.
        let lane = |at, count| (layout.scores(part, at, count), part[layout.maximum(at)]);
        for query in 0..tokens {
            // The exported query that this one is, counted from the last.
            let Some(exported) = (wanted.last + query + 1).checked_sub(tokens) else {
                continue;
            };
            for (r, reduce) in wanted.kinds.reductions().enumerate() {
                let block = exported * reductions + r;
                let into = &mut weights[block * len + from..][..count];
                for g in 0..group {
                    let (scores, factor) = lane(g * tokens + query, count);
                    let factor = match reduce {
                        Reduce::Mean => factor * (1.0 / group as f32),
                        Reduce::Max | Reduce::Sum => factor,
                    };
                    reduce_into(simd, scores, factor, reduce == Reduce::Max, into);
                }
            }
        }
        if wanted.columns && wanted.kinds.columns() {
            let into = &mut weights[wanted.queries * reductions * len + from..][..count];
            for at in 0..layout.lanes {
                let (scores, factor) = lane(at, count);
                reduce_into(simd, scores, factor, false, into);
            }
        }
    }
}

/// Adds `factor` times the exponentials to `weights`, or takes the maximum of both.
#[inline(always)]
fn reduce_into<S: Simd>(
    simd: S,
    exponentials: &[f32],
    factor: f32,
    maximum: bool,
    weights: &mut [f32],
) {
    let (from, from_tail) = S::as_simd_f32s(exponentials);
    let (weights, weights_tail) = S::as_mut_simd_f32s(weights);
    let factors = simd.splat_f32s(factor);
    let pairs = weights.iter_mut().zip(from);
    let tails = weights_tail.iter_mut().zip(from_tail);
    if maximum {
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
