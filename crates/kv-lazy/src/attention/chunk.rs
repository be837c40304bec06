//! One chunk of a row's tokens under all its queries: scores, a local softmax, and the chunk's share of the output.

use super::dense::{Mix, Scores};
use super::element::Element;
use super::exp::exp_in_place;
use super::packed::{self, PackedMix, PackedScores};
use super::rows::{Elements, Part, RowView};
use super::scores::softcap_in_place;
use pulp::{Arch, Simd, WithSimd};

/// Tokens of a chunk: the unit of parallel work, and part of the definition of the rounding.
pub(super) const CHUNK: usize = 512;

/// How one chunk's slice of the workspace is divided. A *lane* is one query of one query head, `[group, tokens]`.
#[derive(Clone, Copy)]
pub(super) struct Slots {
    /// Query heads times queries.
    pub(super) lanes: usize,
    pub(super) head_dim: usize,
    /// Cached tokens of a chunk at most.
    pub(super) tokens: usize,
    /// Numbers per lane for the kernels' own use.
    scratch: usize,
}

impl Slots {
    /// For chunks of `rows`, whose longest holds `longest` tokens.
    pub(super) fn new(rows: &[RowView<'_>], lanes: usize, head_dim: usize, longest: usize) -> Self {
        let scratch = |elements: Elements<'_>| match elements {
            Elements::Packed(_) => packed::scratch(head_dim),
            _ if elements.interleaved() => head_dim,
            _ => 0,
        };
        let parts = rows.iter().flat_map(|row| &row.parts);
        Self {
            lanes,
            head_dim,
            tokens: longest.min(CHUNK),
            scratch: parts
                .map(|part| scratch(part.keys).max(scratch(part.values)))
                .max()
                .unwrap_or(0),
        }
    }

    pub(super) fn size(self) -> usize {
        self.lanes * (self.tokens + 2 + self.head_dim + self.scratch)
    }

    /// (scores `[lanes, tokens]`, output `[lanes, head_dim]`, maxima and sums `[2, lanes]`, scratch).
    fn split(self, slots: &mut [f32]) -> (&mut [f32], &mut [f32], &mut [f32], &mut [f32]) {
        let (scores, rest) = slots.split_at_mut(self.lanes * self.tokens);
        let (out, rest) = rest.split_at_mut(self.lanes * self.head_dim);
        let (stats, scratch) = rest.split_at_mut(2 * self.lanes);
        (scores, out, stats, scratch)
    }

    /// A lane's part of the chunk's scores, of which `count` are in use.
    pub(super) fn scores(self, part: &[f32], lane: usize, count: usize) -> &[f32] {
        &part[lane * self.tokens..][..count]
    }

    pub(super) fn out(self, part: &[f32], lane: usize) -> &[f32] {
        let from = self.lanes * self.tokens + lane * self.head_dim;
        &part[from..from + self.head_dim]
    }

    /// Where the maximum of a lane stands; its sum stands `lanes` further on.
    pub(super) fn maximum(self, lane: usize) -> usize {
        self.lanes * (self.tokens + self.head_dim) + lane
    }
}

/// What the queries of a chunk may see of it.
#[derive(Clone, Copy)]
pub(super) struct Mask<'a> {
    /// Logical positions of the chunk's tokens.
    pub(super) ids: &'a [u32],
    /// Logical position of the first query and the sliding window, where the layer has one.
    pub(super) window: Option<(u32, usize)>,
    /// Queries per head.
    pub(super) tokens: usize,
    /// Slot of the chunk's first token in its row.
    pub(super) first: usize,
    /// Tokens of the row that the first query sees; each later query sees one more.
    pub(super) visible: usize,
}

/// One chunk of one row.
pub(super) struct Chunk<'a> {
    /// `[lanes, head_dim]`, scaled.
    pub(super) queries: &'a [f32],
    pub(super) part: Part<'a>,
    /// What is read after the values.
    pub(super) after: &'a [u8],
    /// Cap on scores.
    pub(super) cap: Option<f32>,
    pub(super) mask: Mask<'a>,
    pub(super) layout: Slots,
    pub(super) slots: &'a mut [f32],
}

impl Chunk<'_> {
    /// Leaves e^(score − maximum), the share of the output and the statistics in the workspace.
    pub(super) fn run(self) {
        let Self {
            queries,
            part,
            after,
            cap,
            mask,
            layout,
            slots,
        } = self;
        let Part { keys, values, len } = part;
        let (scores, out, stats, scratch) = layout.split(slots);
        let next = values.bytes();
        match keys {
            Elements::F32(keys) => dense_scores(queries, keys, next, layout, scores, scratch),
            Elements::F16(keys) => dense_scores(queries, keys, next, layout, scores, scratch),
            Elements::BF16(keys) => dense_scores(queries, keys, next, layout, scores, scratch),
            Elements::Packed(keys) => packed::run(PackedScores {
                queries,
                keys,
                next,
                stride: layout.tokens,
                scores,
                scratch,
            }),
        }
        Arch::new().dispatch(Softmax {
            scores,
            stats,
            count: len,
            cap,
            mask,
            layout,
        });
        match values {
            Elements::F32(values) => dense_mix(scores, values, after, layout, out, scratch),
            Elements::F16(values) => dense_mix(scores, values, after, layout, out, scratch),
            Elements::BF16(values) => dense_mix(scores, values, after, layout, out, scratch),
            Elements::Packed(values) => packed::run(PackedMix {
                weights: scores,
                stride: layout.tokens,
                values,
                next: after,
                out,
                scratch,
            }),
        }
    }
}

fn dense_scores<T: Element>(
    queries: &[f32],
    keys: &[T],
    next: &[u8],
    layout: Slots,
    scores: &mut [f32],
    scratch: &mut [f32],
) {
    T::dispatch(Scores {
        queries,
        keys,
        head_dim: layout.head_dim,
        next,
        stride: layout.tokens,
        scores,
        scratch,
    });
}

fn dense_mix<T: Element>(
    weights: &[f32],
    values: &[T],
    next: &[u8],
    layout: Slots,
    out: &mut [f32],
    scratch: &mut [f32],
) {
    T::dispatch(Mix {
        weights,
        stride: layout.tokens,
        values,
        head_dim: layout.head_dim,
        next,
        out,
        scratch,
    });
}

/// Masks each lane's scores and replaces them by e^(score − maximum).
struct Softmax<'a> {
    scores: &'a mut [f32],
    stats: &'a mut [f32],
    count: usize,
    cap: Option<f32>,
    mask: Mask<'a>,
    layout: Slots,
}

impl WithSimd for Softmax<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Slots { lanes, tokens, .. } = self.layout;
        for lane in 0..lanes {
            let scores = &mut self.scores[lane * tokens..][..self.count];
            let query = lane % self.mask.tokens;
            if let Some(cap) = self.cap {
                softcap_in_place(simd, scores, cap);
            }
            if let Some((position, window)) = self.mask.window {
                let position = position as usize + query;
                for (score, &id) in scores.iter_mut().zip(self.mask.ids) {
                    if position >= id as usize + window {
                        *score = f32::NEG_INFINITY;
                    }
                }
            }
            let visible = (self.mask.visible + query).saturating_sub(self.mask.first);
            if let Some(hidden) = scores.get_mut(visible..) {
                hidden.fill(f32::NEG_INFINITY);
            }
            let max = maximum(simd, scores);
            // A chunk that is masked as a whole weighs nothing; NaN scores do not count as masked.
            let masked = max == f32::NEG_INFINITY && !scores.iter().any(|x| x.is_nan());
            self.stats[lane] = max;
            self.stats[lanes + lane] = if masked {
                scores.fill(0.0);
                0.0
            } else {
                exp_in_place(simd, scores, max)
            };
        }
    }
}

/// The largest of `scores`; what it makes of NaN depends on the machine.
#[inline(always)]
pub(super) fn maximum<S: Simd>(simd: S, scores: &[f32]) -> f32 {
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
