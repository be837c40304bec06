//! Causal attention of many new tokens at once, blocked over queries.
//!
//! A block is one vector width of queries of one head; its scores are held transposed, `[key, query]`, so
//! that keys and values are read in their natural layout, the softmax runs down the columns without horizontal
//! sums, and keys right of the diagonal are never touched. A task takes several blocks of one row and goes over the keys and values a tile at a
//! time, widened and packed in a scratch of fixed size, with a running maximum per query: nothing that grows with what is cached is copied or held,
//! except the weights of the task's queries where column sums are wanted. Tasks own
//! disjoint outputs and sum in a fixed order: the result does not depend on the number of threads.

use super::exp::exp;
use super::rows::Which;
use super::scores::softcap_in_place;
use super::{Geometry, RowView};
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

/// Keys whose scores one register tile computes.
const KEYS: usize = 6;
/// Value columns that one register tile accumulates.
const COLUMNS: usize = 4;
/// Keys or values that are widened at a time: a multiple of [`KEYS`] that stays in the second-level cache.
const TILE: usize = 192;
/// Blocks of a task, which share a widened tile.
const SHARE: usize = 8;
/// The same where the weights of all its queries are held for column sums.
const SHARE_WITH_COLUMNS: usize = 2;
/// Parts of a row's tasks whose column sums are accumulated apart: what bounds both parallelism and memory.
const STRIPES: usize = 16;

/// The queries of a prefill: `tokens` per row, whose keys are the row's last.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PrefillQuery {
    /// Heads and dimensions.
    pub(crate) geometry: Geometry,
    /// New tokens T; each sees the row's tokens up to its own.
    pub(crate) tokens: usize,
    /// Factor on q·k.
    pub(crate) scale: f32,
    /// Cap on the product.
    pub(crate) cap: Option<f32>,
    /// Logical position of the first new token and the sliding window, where there is one.
    pub(crate) window: Option<(u32, usize)>,
}

/// Attends `queries` `[rows, group, tokens, head_dim]` over `rows`, which already hold the new tokens' keys and values,
/// into `out` of the same shape. With `columns`, one slice per row, the weights of every key summed over all queries of the row's group are added
/// to it.
///
/// On a softmax that is not finite returns the index of the first such row.
pub(crate) fn prefill(
    query: PrefillQuery,
    queries: &[f32],
    rows: &[RowView<'_>],
    columns: Option<Vec<&mut [f32]>>,
    out: &mut [f32],
) -> std::result::Result<(), usize> {
    let Geometry { group, head_dim } = query.geometry;
    let per_head = query.tokens * head_dim;
    if per_head == 0 || rows.is_empty() {
        return Ok(());
    }
    let arch = Arch::new();
    let width = arch.dispatch(BlockWidth);
    let share = match columns {
        Some(_) => SHARE_WITH_COLUMNS,
        None => SHARE,
    };

    let mut stripes: Vec<Stripe<'_>> = Vec::new();
    for (row, out) in out.chunks_exact_mut(group * per_head).enumerate() {
        let offset = rows[row].len() - query.tokens;
        let mut blocks: Vec<Block<'_>> = out
            .chunks_exact_mut(per_head)
            .enumerate()
            .flat_map(|(head, out)| {
                let parts = out.chunks_mut(width * head_dim).enumerate();
                parts.map(move |(b, out)| Block {
                    head,
                    first: b * width,
                    end: offset + b * width + out.len() / head_dim,
                    out,
                })
            })
            .collect();
        // Blocks of a task see about the same keys.
        blocks.sort_by_key(|block| block.first);
        let count = STRIPES.min(blocks.len().div_ceil(share));
        let first = stripes.len();
        stripes.extend((0..count).map(|_| Stripe {
            row,
            tasks: Vec::new(),
        }));
        let mut blocks = blocks.into_iter().peekable();
        let mut task = 0;
        while blocks.peek().is_some() {
            let blocks: Vec<Block<'_>> = blocks.by_ref().take(share).collect();
            stripes[first + task % count].tasks.push(blocks);
            task += 1;
        }
    }
    let want_columns = columns.is_some();
    let done: Vec<(usize, bool, Vec<f32>)> = stripes
        .into_par_iter()
        .map_init(Buffers::default, |buffers, Stripe { row, tasks }| {
            let len = rows[row].len();
            let mut sums = if want_columns {
                vec![0.0; len]
            } else {
                Vec::new()
            };
            let mut finite = true;
            for blocks in tasks {
                finite &= arch.dispatch(Work {
                    query,
                    queries: &queries[row * group * per_head..(row + 1) * group * per_head],
                    row: &rows[row],
                    offset: len - query.tokens,
                    blocks,
                    columns: &mut sums,
                    buffers,
                });
            }
            (row, finite, sums)
        })
        .collect();
    if let Some((row, ..)) = done.iter().find(|(_, finite, _)| !finite) {
        return Err(*row);
    }
    if let Some(mut columns) = columns {
        for (row, _, sums) in &done {
            let into = columns[*row].iter_mut();
            into.zip(sums).for_each(|(sum, x)| *sum += x);
        }
    }
    Ok(())
}

/// Tasks of one row whose column sums go to the same place, in order.
struct Stripe<'a> {
    row: usize,
    tasks: Vec<Vec<Block<'a>>>,
}

/// One vector width of queries of one head.
struct Block<'a> {
    head: usize,
    /// First query.
    first: usize,
    /// The keys that some query of the block sees: up to here.
    end: usize,
    /// Outputs of its queries, `[queries, head_dim]`.
    out: &'a mut [f32],
}

/// Queries of a block: two vectors of the machine.
struct BlockWidth;
impl WithSimd for BlockWidth {
    type Output = usize;
    fn with_simd<S: Simd>(self, _: S) -> usize {
        2 * S::F32_LANES
    }
}

#[derive(Default)]
struct Buffers {
    /// Per block its queries, scaled and transposed: `[head_dim, width]`.
    queries: Vec<f32>,
    /// Per block the scores of a tile, or of all keys where column sums are wanted: `[keys, width]`.
    scores: Vec<f32>,
    /// Per block and tile the maxima that its exponentials are relative to: `[width]`.
    offsets: Vec<f32>,
    /// Per block `[head_dim rounded up to whole panels, width]`.
    out: Vec<f32>,
    /// A tile's keys or values, where they are not stored as f32.
    wide: Vec<f32>,
    /// A tile's values in panels.
    panels: Vec<f32>,
}

struct Work<'a, 'b> {
    query: PrefillQuery,
    /// `[group, tokens, head_dim]`.
    queries: &'a [f32],
    row: &'a RowView<'a>,
    /// Keys before the first query's own.
    offset: usize,
    blocks: Vec<Block<'b>>,
    /// Column sums of the row, to be added to; empty where they are not wanted.
    columns: &'a mut [f32],
    buffers: &'a mut Buffers,
}

impl WithSimd for Work<'_, '_> {
    /// Whether the softmax of all queries was finite.
    type Output = bool;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> bool {
        let width = 2 * S::F32_LANES;
        let Self {
            query,
            queries: all,
            row,
            offset,
            mut blocks,
            columns,
            buffers,
        } = self;
        let d = query.geometry.head_dim;
        let per_head = query.tokens * d;
        let count = blocks.len();
        let start = first_key(query, row, blocks[0].first, offset);
        let end = blocks[count - 1].end;
        let rounded = d.div_ceil(COLUMNS) * COLUMNS;
        let held = if columns.is_empty() {
            TILE
        } else {
            end - start
        };
        let tiles = (end - start).div_ceil(TILE);
        let Buffers {
            queries,
            scores,
            offsets,
            out,
            wide,
            panels,
        } = buffers;
        queries.clear();
        queries.resize(count * d * width, 0.0);
        for (block, to) in blocks.iter().zip(queries.chunks_exact_mut(d * width)) {
            let from = &all[block.head * per_head + block.first * d..][..block.out.len()];
            for (t, row) in from.chunks_exact(d).enumerate() {
                for (i, &x) in row.iter().enumerate() {
                    to[i * width + t] = x * query.scale;
                }
            }
        }
        out.clear();
        out.resize(count * rounded * width, 0.0);
        for buffer in [(&mut *scores, held), (&mut *offsets, tiles)] {
            let (buffer, rows) = buffer;
            if buffer.len() < count * rows * width {
                buffer.resize(count * rows * width, 0.0);
            }
        }
        let none = simd.splat_f32s(f32::NEG_INFINITY);
        let zero = simd.splat_f32s(0.0);
        let mut maxima = vec![[none; 2]; count];
        let mut sums = vec![[zero; 2]; count];

        for tile in 0..tiles {
            let from = start + tile * TILE;
            let to = (from + TILE).min(end);
            // Where a block's scores of this tile are.
            let place = |b: usize| {
                b * held * width
                    + if held == TILE && columns.is_empty() {
                        0
                    } else {
                        tile * TILE * width
                    }
            };
            let keys = row.widened(Which::Keys, from, to, d, wide);
            for (b, block) in blocks.iter().enumerate() {
                let to = to.min(block.end);
                if from >= to {
                    continue;
                }
                let scores = &mut scores[place(b)..][..(to - from) * width];
                let queries = &queries[b * d * width..(b + 1) * d * width];
                score_tiles::<S>(simd, queries, &keys[..(to - from) * d], d, scores);
                if let Some(cap) = query.cap {
                    softcap_in_place(simd, scores, cap);
                }
                hide(
                    query,
                    row,
                    (block.first, block.out.len() / d),
                    scores,
                    (from, offset),
                    width,
                );
                let out = &mut out[b * rounded * width..(b + 1) * rounded * width];
                let relative = softmax_tile::<S>(simd, scores, &mut maxima[b], &mut sums[b], out);
                let into = &mut offsets[(b * tiles + tile) * width..][..width];
                into.copy_from_slice(pulp::bytemuck::cast_slice(&relative));
            }
            let values = row.widened(Which::Values, from, to, d, wide);
            pack(values, d, panels);
            let n = to - from;
            for (b, block) in blocks.iter().enumerate() {
                let to = to.min(block.end);
                if from >= to {
                    continue;
                }
                let scores = &scores[place(b)..][..(to - from) * width];
                let out = &mut out[b * rounded * width..(b + 1) * rounded * width];
                for (p, out) in out.chunks_exact_mut(COLUMNS * width).enumerate() {
                    let panel = &panels[p * n * COLUMNS..][..(to - from) * COLUMNS];
                    mix_tile::<S>(simd, scores, panel, out);
                }
            }
        }

        let mut finite = true;
        for (b, block) in blocks.iter_mut().enumerate() {
            let count = block.out.len() / d;
            let totals: &[f32] = &pulp::bytemuck::cast_slice(&sums[b])[..count];
            let maxima: &[f32] = &pulp::bytemuck::cast_slice(&maxima[b])[..count];
            finite &= totals.iter().all(|s| s.is_finite() && *s > 0.0)
                && maxima.iter().all(|m| m.is_finite());
            let from = &out[b * rounded * width..(b + 1) * rounded * width];
            for (t, row) in block.out.chunks_exact_mut(d).enumerate() {
                let norm = 1.0 / totals[t];
                for (i, o) in row.iter_mut().enumerate() {
                    *o = from[i * width + t] * norm;
                }
            }
            if columns.is_empty() {
                continue;
            }
            let scores = &scores[b * held * width..][..(block.end - start) * width];
            for (tile, scores) in scores.chunks(TILE * width).enumerate() {
                let relative = &offsets[(b * tiles + tile) * width..][..count];
                let mut factors = [0.0; MOST_QUERIES];
                for t in 0..count {
                    factors[t] = (relative[t] - maxima[t]).exp() / totals[t];
                }
                let columns = columns[start + tile * TILE..].iter_mut();
                for (column, row) in columns.zip(scores.chunks_exact(width)) {
                    let pairs = row[..count].iter().zip(&factors);
                    *column += pairs.map(|(e, f)| e * f).sum::<f32>();
                }
            }
        }
        finite
    }
}

/// Queries of a block on the machine with the widest vectors.
const MOST_QUERIES: usize = 64;

/// The first key that any query from `first` on may see: a prefix outside the sliding window is skipped.
fn first_key(query: PrefillQuery, row: &RowView<'_>, first: usize, offset: usize) -> usize {
    let Some((position, window)) = query.window else {
        return 0;
    };
    let position = position as usize + first;
    let seen = |&id: &u32| position < id as usize + window;
    let ids = &row.ids[..offset + first];
    ids.iter().position(seen).unwrap_or(ids.len())
}

/// Hides from the `count` queries from `first` on the keys after their own and those outside the sliding window; `scores` `[keys, width]` begins at
/// key `from`.
fn hide(
    query: PrefillQuery,
    row: &RowView<'_>,
    (first, count): (usize, usize),
    scores: &mut [f32],
    (from, offset): (usize, usize),
    width: usize,
) {
    let diagonal = offset + first;
    let keys = scores.len() / width;
    // Idle lanes repeat the last token's view.
    for j in (diagonal + 1).max(from)..from + keys {
        let hidden = (j - diagonal).min(count);
        scores[(j - from) * width..][..hidden].fill(f32::NEG_INFINITY);
    }
    if let Some((position, window)) = query.window {
        let ids = &row.ids[from..from + keys];
        mask_window(scores, ids, position as usize + first, window, width, count);
    }
}

/// Values `[n, d]` as panels `[d / COLUMNS, n, COLUMNS]`, the last filled up with zeros: a register tile then reads them front to back.
fn pack(values: &[f32], d: usize, packed: &mut Vec<f32>) {
    let n = values.len() / d;
    packed.clear();
    packed.resize(d.div_ceil(COLUMNS) * COLUMNS * n, 0.0);
    for (p, panel) in packed.chunks_exact_mut(n * COLUMNS).enumerate() {
        let columns = p * COLUMNS..((p + 1) * COLUMNS).min(d);
        for (to, row) in panel.chunks_exact_mut(COLUMNS).zip(values.chunks_exact(d)) {
            to[..columns.len()].copy_from_slice(&row[columns.clone()]);
        }
    }
}

/// Hides keys that have left the sliding window of token t at `position` + t; `scores` is `[ids, width]`.
fn mask_window(
    scores: &mut [f32],
    ids: &[u32],
    position: usize,
    window: usize,
    width: usize,
    count: usize,
) {
    for (row, &id) in scores.chunks_exact_mut(width).zip(ids) {
        // Token t sees ids above position + t − window. Idle lanes keep something finite, which is never read.
        let hidden_from = (id as usize + window).saturating_sub(position);
        if hidden_from < count {
            row[hidden_from..count].fill(f32::NEG_INFINITY);
        }
    }
}

/// scores[j, t] = k_j · q_t with `queries` `[d, width]`.
#[inline(always)]
fn score_tiles<S: Simd>(simd: S, queries: &[f32], keys: &[f32], d: usize, scores: &mut [f32]) {
    let width = 2 * S::F32_LANES;
    let mut tiles = keys.chunks_exact(KEYS * d);
    let mut targets = scores.chunks_exact_mut(KEYS * width);
    for (keys, scores) in tiles.by_ref().zip(targets.by_ref()) {
        score_tile::<S, KEYS>(simd, queries, keys, d, scores);
    }
    for (key, scores) in tiles
        .remainder()
        .chunks_exact(d)
        .zip(targets.into_remainder().chunks_exact_mut(width))
    {
        score_tile::<S, 1>(simd, queries, key, d, scores);
    }
}

#[inline(always)]
fn score_tile<S: Simd, const R: usize>(
    simd: S,
    queries: &[f32],
    keys: &[f32],
    d: usize,
    scores: &mut [f32],
) {
    let mut rows: [&[f32]; R] = [&[]; R];
    for r in 0..R {
        rows[r] = &keys[r * d..(r + 1) * d];
    }
    let queries = S::as_simd_f32s(queries).0;
    let mut acc = [[simd.splat_f32s(0.0); 2]; R];
    for (i, q) in queries.chunks_exact(2).enumerate().take(d) {
        for r in 0..R {
            let k = simd.splat_f32s(rows[r][i]);
            acc[r][0] = simd.mul_add_f32s(k, q[0], acc[r][0]);
            acc[r][1] = simd.mul_add_f32s(k, q[1], acc[r][1]);
        }
    }
    let scores = S::as_mut_simd_f32s(scores).0;
    for (row, acc) in scores.chunks_exact_mut(2).zip(&acc) {
        row.copy_from_slice(acc);
    }
}

/// Replaces a tile's scores by e^(score − running maximum) and brings maximum, sum and output `[_, width]` up to date; returns the maxima that the
/// exponentials are relative to. Where nothing was seen yet that is 0.
#[inline(always)]
fn softmax_tile<S: Simd>(
    simd: S,
    scores: &mut [f32],
    max: &mut [S::f32s; 2],
    sum: &mut [S::f32s; 2],
    out: &mut [f32],
) -> [S::f32s; 2] {
    let scores = S::as_mut_simd_f32s(scores).0;
    let none = simd.splat_f32s(f32::NEG_INFINITY);
    let zero = simd.splat_f32s(0.0);
    let mut tile = [none; 2];
    for row in scores.chunks_exact(2) {
        tile[0] = simd.max_f32s(tile[0], row[0]);
        tile[1] = simd.max_f32s(tile[1], row[1]);
    }
    let mut relative = [zero; 2];
    let mut shrink = [zero; 2];
    for c in 0..2 {
        let new = simd.max_f32s(max[c], tile[c]);
        relative[c] = simd.select_f32s(simd.equal_f32s(new, none), zero, new);
        shrink[c] = exp(simd, simd.sub_f32s(max[c], relative[c]));
        max[c] = new;
    }
    let mut part = [zero; 2];
    for row in scores.chunks_exact_mut(2) {
        for c in 0..2 {
            row[c] = exp(simd, simd.sub_f32s(row[c], relative[c]));
            part[c] = simd.add_f32s(part[c], row[c]);
        }
    }
    for c in 0..2 {
        sum[c] = simd.mul_add_f32s(sum[c], shrink[c], part[c]);
    }
    for out in S::as_mut_simd_f32s(out).0.chunks_exact_mut(2) {
        out[0] = simd.mul_f32s(out[0], shrink[0]);
        out[1] = simd.mul_f32s(out[1], shrink[1]);
    }
    relative
}

/// out[c, t] += Σ_j values[j, c] · weights[j, t] for one panel of values.
#[inline(always)]
fn mix_tile<S: Simd>(simd: S, weights: &[f32], panel: &[f32], out: &mut [f32]) {
    let weights = S::as_simd_f32s(weights).0;
    let out = S::as_mut_simd_f32s(out).0;
    let mut acc = [[simd.splat_f32s(0.0); 2]; COLUMNS];
    for (acc, out) in acc.iter_mut().zip(out.chunks_exact(2)) {
        acc.copy_from_slice(out);
    }
    for (w, values) in weights.chunks_exact(2).zip(panel.chunks_exact(COLUMNS)) {
        for c in 0..COLUMNS {
            let v = simd.splat_f32s(values[c]);
            acc[c][0] = simd.mul_add_f32s(v, w[0], acc[c][0]);
            acc[c][1] = simd.mul_add_f32s(v, w[1], acc[c][1]);
        }
    }
    for (row, acc) in out.chunks_exact_mut(2).zip(&acc) {
        row.copy_from_slice(acc);
    }
}
