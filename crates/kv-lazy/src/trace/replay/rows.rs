//! What a replayed cache holds: positions into the trace.

use crate::error::Result;
use crate::policy::{RecentQueries, Rows};
use crate::rotary::Rotary;
use crate::store::Relocation;
use crate::trace::LayerTrace;

/// Resident positions of each KV head, and the last queries.
pub(super) struct TraceRows<'a> {
    data: &'a LayerTrace,
    scale: f32,
    window: usize,
    ids: Vec<Vec<u32>>,
    /// Per KV head `[positions, group, d]`.
    queries: Vec<Vec<f32>>,
    positions: Vec<u32>,
    rotary: Option<&'a Rotary>,
}

impl<'a> TraceRows<'a> {
    /// `window` last queries are kept.
    pub(super) fn new(
        data: &'a LayerTrace,
        scale: f64,
        window: usize,
        rotary: Option<&'a Rotary>,
    ) -> Self {
        Self {
            data,
            scale: scale as f32,
            window,
            ids: vec![Vec::new(); data.kv_heads],
            queries: vec![Vec::new(); data.kv_heads],
            positions: Vec::new(),
            rotary,
        }
    }

    /// Positions `first..first + count` join.
    pub(super) fn append(&mut self, first: usize, count: usize) {
        for ids in &mut self.ids {
            ids.extend(first as u32..(first + count) as u32);
        }
        if self.window == 0 {
            return;
        }
        let end = first + count;
        let start = end.saturating_sub(self.window);
        self.positions = (start as u32..end as u32).collect();
        for (head, queries) in self.queries.iter_mut().enumerate() {
            queries.clear();
            for t in start..end {
                for g in 0..self.data.group() {
                    let query = self.data.query(head * self.data.group() + g, t);
                    queries.extend(query.iter().map(|x| x * self.scale));
                }
            }
        }
    }

    pub(super) fn ids_of(&self, head: usize) -> &[u32] {
        &self.ids[head]
    }

    pub(super) fn relocate(&mut self, head: usize, moves: &Relocation) {
        moves.apply(&mut self.ids[head], 1);
    }

    fn gather(&self, data: &[f32], head: usize, from: usize) -> Vec<f32> {
        let d = self.data.head_dim;
        self.ids[head][from..]
            .iter()
            .flat_map(|&id| &data[id as usize * d..(id as usize + 1) * d])
            .copied()
            .collect()
    }
}

impl Rows for TraceRows<'_> {
    fn head_dim(&self) -> usize {
        self.data.head_dim
    }
    fn ids(&self, head: usize) -> &[u32] {
        &self.ids[head]
    }
    fn keys(&self, head: usize, from: usize) -> Result<Vec<f32>> {
        Ok(self.gather(self.data.keys(head), head, from))
    }
    fn values(&self, head: usize, from: usize) -> Result<Vec<f32>> {
        Ok(self.gather(self.data.values(head), head, from))
    }
    fn queries(&self, head: usize) -> RecentQueries<'_> {
        RecentQueries {
            softcap: None,
            queries: &self.queries[head],
            positions: &self.positions,
        }
    }
    fn rotary(&self) -> Option<&Rotary> {
        self.rotary
    }
}
