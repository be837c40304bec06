//! The last few queries of a layer, for policies that recompute attention at eviction.

use crate::attention::{Scores, read};
use crate::error::Result;
use crate::policy::RecentQueries;
use candle_core::Tensor;

/// A ring of the last `capacity` positions' queries, scaled, for each (sequence, KV head).
#[derive(Debug, Clone)]
pub(super) struct QueryRing {
    capacity: usize,
    group: usize,
    head_dim: usize,
    /// Per row `[positions, group, d]`.
    rows: Vec<Vec<f32>>,
    positions: Vec<u32>,
    next: usize,
    softcap: Option<f32>,
}

impl QueryRing {
    pub(super) fn new(capacity: usize, rows: usize, group: usize, head_dim: usize) -> Self {
        Self {
            capacity,
            group,
            head_dim,
            rows: vec![Vec::new(); rows],
            positions: Vec::new(),
            next: 0,
            softcap: None,
        }
    }

    /// Notes the last queries of `q` `[B, Hq, T, d]`, whose first is at `position`.
    pub(super) fn push(&mut self, q: &Tensor, scores: Scores, position: u32) -> Result<()> {
        let tokens = q.dim(2)?;
        let scale = scores.scale as f32;
        self.softcap = scores.cap();
        let taken = tokens.min(self.capacity);
        let q = q
            .narrow(2, tokens - taken, taken)?
            .to_device(&candle_core::Device::Cpu)?;
        let (group, d) = (self.group, self.head_dim);
        read::<f32, _>(&q, |q| {
            for t in 0..taken {
                let slot = self.next;
                self.next = (self.next + 1) % self.capacity;
                let at = position + (tokens - taken + t) as u32;
                match self.positions.get_mut(slot) {
                    Some(held) => *held = at,
                    None => self.positions.push(at),
                }
                for (row, heads) in self.rows.iter_mut().zip(q.chunks_exact(group * taken * d)) {
                    row.resize(self.positions.len() * group * d, 0.0);
                    for g in 0..group {
                        let to = &mut row[(slot * group + g) * d..][..d];
                        let from = &heads[(g * taken + t) * d..][..d];
                        to.iter_mut().zip(from).for_each(|(to, x)| *to = x * scale);
                    }
                }
            }
        })
    }

    pub(super) fn row(&self, row: usize) -> RecentQueries<'_> {
        RecentQueries {
            queries: &self.rows[row],
            positions: &self.positions,
            softcap: self.softcap,
        }
    }

    pub(super) fn clear(&mut self) {
        self.rows.fill(Vec::new());
        self.positions.clear();
        self.next = 0;
    }

    pub(super) fn bytes(&self) -> usize {
        self.rows.iter().map(|row| row.len() * 4).sum()
    }
}
