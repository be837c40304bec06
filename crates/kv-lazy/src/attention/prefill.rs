//! Causal attention of many new tokens at once, blocked over queries.
//!
//! A task takes one vector-width block of queries of one head and holds their scores transposed, `[key, query]`, so
//! that keys and values are read in their natural layout, the softmax runs down the columns without horizontal
//! sums, and keys right of the diagonal are never touched. Tasks own disjoint outputs and sum in a fixed order:
//! the result does not depend on the number of threads.

use super::element::Element;
use super::exp::exp;
use super::{Geometry, RowView};
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;
use std::borrow::Cow;

/// Keys whose scores one register tile computes.
const KEYS: usize = 6;
/// Value columns that one register tile accumulates.
const COLUMNS: usize = 4;
/// Keys per pass over the values: their block stays in the second-level cache.
const VALUE_BLOCK: usize = 256;

/// The queries of a prefill: `tokens` per row after `offset` cached keys.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PrefillQuery {
    /// Heads and dimensions.
    pub(crate) geometry: Geometry,
    /// New tokens T.
    pub(crate) tokens: usize,
    /// Keys physically before the first new token: new token t sees keys 0..=offset + t.
    pub(crate) offset: usize,
    /// Factor on q·k.
    pub(crate) scale: f32,
    /// Logical position of the first new token and the sliding window, where there is one.
    pub(crate) window: Option<(u32, usize)>,
}

/// Attends `queries` `[rows, group, tokens, head_dim]` over `rows`, which already hold the new tokens' keys and values,
/// into `out` of the same shape. With `columns`, adds the weights of every key summed over all queries of the row's group
/// to the row's slice of it (`[rows, n]`).
///
/// On a softmax that is not finite returns the index of the first such row.
pub(crate) fn prefill<T: Element>(
    query: PrefillQuery,
    queries: &[f32],
    rows: &[RowView<'_, T>],
    columns: Option<&mut [f32]>,
    out: &mut [f32],
) -> std::result::Result<(), usize> {
    let Geometry {
        group, head_dim, ..
    } = query.geometry;
    let per_head = query.tokens * head_dim;
    if per_head == 0 || rows.is_empty() {
        return Ok(());
    }
    let keys: Vec<Cow<'_, [f32]>> = rows.par_iter().map(|row| T::widened(row.keys)).collect();
    let values: Vec<Vec<f32>> = rows
        .par_iter()
        .map(|row| panels(&T::widened(row.values), head_dim))
        .collect();
    let arch = Arch::new();
    let block = arch.dispatch(BlockWidth);
    let want_columns = columns.is_some();
    let parts: Vec<Vec<(bool, Vec<f32>)>> = out
        .par_chunks_mut(per_head)
        .enumerate()
        .map(|(head, out)| {
            let row = head / group;
            let queries = &queries[head * per_head..(head + 1) * per_head];
            out.par_chunks_mut(block * head_dim)
                .enumerate()
                .map_init(Buffers::default, |buffers, (b, out)| {
                    arch.dispatch(Block {
                        query,
                        first: b * block,
                        queries: &queries[b * block * head_dim..][..out.len()],
                        keys: &keys[row],
                        values: &values[row],
                        ids: rows[row].ids,
                        want_columns,
                        buffers,
                        out,
                    })
                })
                .collect()
        })
        .collect();
    if let Some(head) = parts.iter().position(|blocks| blocks.iter().any(|b| !b.0)) {
        return Err(head / group);
    }
    if let Some(columns) = columns {
        let n = query.offset + query.tokens;
        for (head, blocks) in parts.iter().enumerate() {
            let row = &mut columns[head / group * n..(head / group + 1) * n];
            for (_, part) in blocks {
                row.iter_mut().zip(part).for_each(|(sum, x)| *sum += x);
            }
        }
    }
    Ok(())
}

/// Values `[n, d]` as panels `[d / COLUMNS, n, COLUMNS]`, the last filled up with zeros: a tile then reads them front to back.
fn panels(values: &[f32], d: usize) -> Vec<f32> {
    let n = values.len() / d;
    let mut packed = vec![0.0; d.div_ceil(COLUMNS) * COLUMNS * n];
    for (p, panel) in packed.chunks_exact_mut(n * COLUMNS).enumerate() {
        let columns = p * COLUMNS..((p + 1) * COLUMNS).min(d);
        for (to, row) in panel.chunks_exact_mut(COLUMNS).zip(values.chunks_exact(d)) {
            to[..columns.len()].copy_from_slice(&row[columns.clone()]);
        }
    }
    packed
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
    /// The block's queries, scaled and transposed: `[head_dim, block]`.
    queries: Vec<f32>,
    /// `[keys, block]`.
    scores: Vec<f32>,
    /// `[head_dim rounded up to whole panels, block]`.
    out: Vec<f32>,
}

struct Block<'a> {
    query: PrefillQuery,
    first: usize,
    queries: &'a [f32],
    keys: &'a [f32],
    /// In panels.
    values: &'a [f32],
    ids: &'a [u32],
    want_columns: bool,
    buffers: &'a mut Buffers,
    out: &'a mut [f32],
}

impl WithSimd for Block<'_> {
    /// Whether the softmax was finite, and the weights summed over the block's queries per key if wanted.
    type Output = (bool, Vec<f32>);

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> (bool, Vec<f32>) {
        let width = 2 * S::F32_LANES;
        let d = self.query.geometry.head_dim;
        let count = self.queries.len() / d;
        let diagonal = self.query.offset + self.first;
        let end = diagonal + count;
        let start = self.first_key();
        let Buffers {
            queries,
            scores,
            out,
        } = self.buffers;

        queries.clear();
        queries.resize(d * width, 0.0);
        for (t, row) in self.queries.chunks_exact(d).enumerate() {
            for (i, &x) in row.iter().enumerate() {
                queries[i * width + t] = x * self.query.scale;
            }
        }
        if scores.len() < (end - start) * width {
            scores.resize((end - start) * width, 0.0);
        }
        let scores = &mut scores[..(end - start) * width];
        score_tiles::<S>(simd, queries, &self.keys[start * d..end * d], d, scores);
        // Keys of the diagonal: token t of the block sees those up to its own; idle lanes repeat the last token's view.
        for j in diagonal + 1..end {
            let hidden = (j - diagonal).min(width);
            scores[(j - start) * width..][..hidden].fill(f32::NEG_INFINITY);
        }
        if let Some((position, window)) = self.query.window {
            let position = position as usize + self.first;
            mask_window(
                scores,
                &self.ids[start..end],
                position,
                window,
                width,
                count,
            );
        }

        let (max, sum) = softmax_columns::<S>(simd, scores);
        out.clear();
        let panels = d.div_ceil(COLUMNS);
        out.resize(panels * COLUMNS * width, 0.0);
        let n = self.values.len() / (panels * COLUMNS);
        for (b, scores) in scores.chunks(VALUE_BLOCK * width).enumerate() {
            let keys = start + b * VALUE_BLOCK..start + b * VALUE_BLOCK + scores.len() / width;
            for (p, out) in out.chunks_exact_mut(COLUMNS * width).enumerate() {
                let panel = &self.values[p * n * COLUMNS..(p + 1) * n * COLUMNS];
                mix_tile::<S>(
                    simd,
                    scores,
                    &panel[keys.start * COLUMNS..keys.end * COLUMNS],
                    out,
                );
            }
        }
        let sums: &[f32] = pulp::bytemuck::cast_slice(&sum);
        let maxima: &[f32] = pulp::bytemuck::cast_slice(&max);
        let finite = sums[..count].iter().all(|s| s.is_finite() && *s > 0.0)
            && maxima[..count].iter().all(|m| m.is_finite());
        for (t, row) in self.out.chunks_exact_mut(d).enumerate() {
            let norm = 1.0 / sums[t];
            for (i, o) in row.iter_mut().enumerate() {
                *o = out[i * width + t] * norm;
            }
        }
        let mut columns = Vec::new();
        if self.want_columns {
            columns.resize(end, 0.0);
            for (column, row) in columns[start..].iter_mut().zip(scores.chunks_exact(width)) {
                *column = row[..count].iter().zip(sums).map(|(e, s)| e / s).sum();
            }
        }
        (finite, columns)
    }
}

impl Block<'_> {
    /// The first key that any query of the block may see: a prefix outside the sliding window is skipped.
    fn first_key(&self) -> usize {
        let Some((position, window)) = self.query.window else {
            return 0;
        };
        let position = position as usize + self.first;
        self.ids
            .iter()
            .position(|&id| position < id as usize + window)
            .unwrap_or(self.query.offset + self.first)
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

/// Replaces scores by e^(score − column maximum); returns the maxima and sums of the columns.
#[inline(always)]
fn softmax_columns<S: Simd>(simd: S, scores: &mut [f32]) -> ([S::f32s; 2], [S::f32s; 2]) {
    let scores = S::as_mut_simd_f32s(scores).0;
    let mut max = [simd.splat_f32s(f32::NEG_INFINITY); 2];
    for row in scores.chunks_exact(2) {
        max[0] = simd.max_f32s(max[0], row[0]);
        max[1] = simd.max_f32s(max[1], row[1]);
    }
    let mut sum = [simd.splat_f32s(0.0); 2];
    for row in scores.chunks_exact_mut(2) {
        for c in 0..2 {
            row[c] = exp(simd, simd.sub_f32s(row[c], max[c]));
            sum[c] = simd.add_f32s(sum[c], row[c]);
        }
    }
    (max, sum)
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
