//! Attention of the last few queries, recomputed from the queries themselves: observation windows for policies that evict
//! rarely.

use super::{RecentQueries, Rows};
use crate::attention::products::{cap, products};
use crate::error::Result;
use std::borrow::Cow;

/// Logits of a head's recent queries.
pub(super) struct WindowLogits<'r> {
    /// `[positions, group, n]`; −∞ where a key is newer than the query.
    pub(super) logits: Vec<f32>,
    /// Query heads.
    pub(super) group: usize,
    /// Queries per head.
    pub(super) positions: usize,
    /// Tokens.
    pub(super) len: usize,
    /// The head's keys `[n, d]`.
    pub(super) keys: Cow<'r, [f32]>,
}

impl<'r> WindowLogits<'r> {
    /// q·k for every recent query of `head` and every key.
    pub(super) fn of(rows: &'r dyn Rows, head: usize) -> Result<Self> {
        let RecentQueries {
            queries,
            positions,
            softcap,
        } = rows.queries(head);
        let d = rows.head_dim();
        let keys = rows.keys(head, 0)?;
        let ids = rows.ids(head);
        let group = (queries.len() / d)
            .checked_div(positions.len())
            .unwrap_or(1);
        let mut logits = products(queries, &keys, d);
        if let Some(most) = softcap {
            cap(&mut logits, most);
        }
        for (i, row) in logits.chunks_exact_mut(ids.len().max(1)).enumerate() {
            let position = positions[i / group];
            for (logit, &id) in row.iter_mut().zip(ids) {
                if id > position {
                    *logit = f32::NEG_INFINITY;
                }
            }
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
