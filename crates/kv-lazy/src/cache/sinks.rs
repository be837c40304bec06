//! Sinks that move up to the newest tokens, so that cached tokens have consecutive positions (StreamingLLM, arXiv 2309.17453).
//!
//! Attention sees differences of positions alone. The newest tokens are consecutive as they are, so it suffices to place the S sinks right before the oldest of them: S rotations
//! a step. They start from the unrotated keys in f32, so that errors do not add up.

use crate::attention::read;
use crate::error::Result;
use crate::rotary::Rotary;
use crate::store::Store;
use candle_core::Tensor;

/// The sinks of each row.
#[derive(Debug, Clone)]
pub(super) struct MovingSinks {
    count: usize,
    head_dim: usize,
    /// Unrotated keys `[sinks, d]` of each row, as far as they have come.
    rows: Vec<Vec<f32>>,
    /// By how many positions each row's sinks have moved.
    moved: Vec<u32>,
}

impl MovingSinks {
    pub(super) fn new(count: usize, rows: usize, head_dim: usize) -> Self {
        Self {
            count,
            head_dim,
            rows: vec![Vec::new(); rows],
            moved: vec![0; rows],
        }
    }

    /// Keeps the keys `[B, Hkv, T, d]` of a step whose first position is `first`, as far as they are sinks.
    pub(super) fn append(&mut self, k: &Tensor, first: u32, rotary: &Rotary) -> Result<()> {
        let tokens = k.dim(2)?;
        let new = self.count.saturating_sub(first as usize).min(tokens);
        if new == 0 {
            return Ok(());
        }
        let d = self.head_dim;
        read::<f32, _>(k, |k| {
            for (held, keys) in self.rows.iter_mut().zip(k.chunks_exact(tokens * d)) {
                for (position, key) in (i64::from(first)..).zip(keys.chunks_exact(d).take(new)) {
                    let from = held.len();
                    held.extend_from_slice(key);
                    rotary.rotate(&mut held[from..], -position);
                }
            }
        })
    }

    /// Places the sinks of every row right before the oldest of its other tokens.
    pub(super) fn place(&mut self, store: &mut dyn Store, rotary: &Rotary) -> Result<()> {
        let d = self.head_dim;
        let mut key = vec![0.0; d];
        for (row, keys) in self.rows.iter().enumerate() {
            let ids = store.ids(row);
            let sinks = self.count as u32;
            let oldest = ids.iter().copied().filter(|&id| id >= sinks).min();
            let moved = oldest.map_or(0, |oldest| oldest - sinks);
            if moved == self.moved[row] {
                continue;
            }
            let slots: Vec<(usize, u32)> = ids
                .iter()
                .enumerate()
                .filter(|(_, id)| **id < sinks)
                .map(|(slot, &id)| (slot, id))
                .collect();
            for (slot, id) in slots {
                key.copy_from_slice(&keys[id as usize * d..][..d]);
                rotary.rotate(&mut key, i64::from(id) + i64::from(moved));
                store.replace_key(row, slot, &key)?;
            }
            self.moved[row] = moved;
        }
        Ok(())
    }

    pub(super) fn clear(&mut self) {
        self.rows.fill(Vec::new());
        self.moved.fill(0);
    }

    pub(super) fn bytes(&self) -> usize {
        self.rows.iter().map(|row| row.len() * 4 + 4).sum()
    }
}
