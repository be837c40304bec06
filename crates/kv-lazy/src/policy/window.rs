//! Attention of the last few queries, recomputed from the queries themselves: observation windows for policies that evict
//! rarely.

use super::{RecentQueries, Rows};
use crate::error::Result;

/// Logits of a head's recent queries.
pub(super) struct WindowLogits {
    /// `[positions, group, n]`; −∞ where a key is newer than the query.
    pub(super) logits: Vec<f32>,
    /// Query heads.
    pub(super) group: usize,
    /// Queries per head.
    pub(super) positions: usize,
    /// Tokens.
    pub(super) len: usize,
    /// The head's keys `[n, d]`.
    pub(super) keys: Vec<f32>,
}

impl WindowLogits {
    /// q·k for every recent query of `head` and every key.
    pub(super) fn of(rows: &dyn Rows, head: usize) -> Result<Self> {
        let RecentQueries {
            queries,
            positions,
            softcap,
        } = rows.queries(head);
        let capped = |x: f32| softcap.map_or(x, |cap| cap * (x / cap).tanh());
        let d = rows.head_dim();
        let keys = rows.keys(head, 0)?;
        let ids = rows.ids(head);
        let group = (queries.len() / d)
            .checked_div(positions.len())
            .unwrap_or(1);
        let mut logits = Vec::with_capacity(queries.len() / d * ids.len());
        for (i, query) in queries.chunks_exact(d).enumerate() {
            let position = positions[i / group];
            logits.extend(keys.chunks_exact(d).zip(ids).map(|(key, &id)| {
                if id <= position {
                    capped(dot(query, key))
                } else {
                    f32::NEG_INFINITY
                }
            }));
        }
        Ok(Self {
            logits,
            group,
            positions: positions.len(),
            len: ids.len(),
            keys,
        })
    }
}

/// Dot product in eight lanes.
pub(super) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0f32; 8];
    let (mut xs, mut ys) = (a.chunks_exact(8), b.chunks_exact(8));
    for (x, y) in xs.by_ref().zip(ys.by_ref()) {
        for i in 0..8 {
            lanes[i] += x[i] * y[i];
        }
    }
    let tail: f32 = xs
        .remainder()
        .iter()
        .zip(ys.remainder())
        .map(|(x, y)| x * y)
        .sum();
    lanes.iter().sum::<f32>() + tail
}

/// Softmax in place; −∞ weighs nothing. A row of nothing but −∞ becomes zero.
pub(super) fn softmax(row: &mut [f32]) {
    let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    if max == f32::NEG_INFINITY {
        row.fill(0.0);
        return;
    }
    let mut sum = 0.0;
    for x in row.iter_mut() {
        *x = (*x - max).exp();
        sum += *x;
    }
    for x in row {
        *x /= sum;
    }
}
