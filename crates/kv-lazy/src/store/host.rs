//! Storage on the CPU: each row owns its vectors, so that rows grow, shrink and compact in place and in parallel.

use super::{Attended, Call, Layout, Relocation, Store};
use crate::attention::decode::DecodeScratch;
use crate::attention::{Causal, Element, Exported, Geometry, RowView, WIDEST, read};
use crate::error::Result;
use candle_core::{Device, Tensor};
use rayon::prelude::*;

/// Tokens a row grows by at least when it is full.
const GROWTH: usize = 32;

#[derive(Debug, Clone, Default)]
struct Row<T> {
    keys: Vec<T>,
    values: Vec<T>,
    ids: Vec<u32>,
}

impl<T: Element> Row<T> {
    fn append(&mut self, keys: &[T], values: &[T], first: u32, overwrite: &[u32], d: usize) {
        let tokens = keys.len() / d;
        let replaced = overwrite.len().min(tokens);
        for (t, &slot) in overwrite[..replaced].iter().enumerate() {
            let slot = slot as usize;
            self.keys[slot * d..(slot + 1) * d].copy_from_slice(&keys[t * d..(t + 1) * d]);
            self.values[slot * d..(slot + 1) * d].copy_from_slice(&values[t * d..(t + 1) * d]);
            self.ids[slot] = first + t as u32;
        }
        let (keys, values) = (&keys[replaced * d..], &values[replaced * d..]);
        if self.keys.capacity() < self.keys.len() + keys.len() {
            let more = keys.len().max((self.ids.len() / 4).max(GROWTH) * d);
            self.keys.reserve_exact(more);
            self.values.reserve_exact(more);
            self.ids.reserve_exact(more / d);
        }
        self.keys.extend_from_slice(keys);
        self.values.extend_from_slice(values);
        self.ids
            .extend(first + replaced as u32..first + tokens as u32);
    }

    fn relocate(&mut self, moves: &Relocation, room: usize, d: usize) {
        moves.apply(&mut self.keys, d);
        moves.apply(&mut self.values, d);
        moves.apply(&mut self.ids, 1);
        let wanted = moves.len.saturating_add(room);
        // The first eviction after a prompt frees it; later ones find the storage already of the right size.
        if self.ids.capacity() > wanted || self.keys.capacity() / d > wanted {
            self.keys.shrink_to(wanted * d);
            self.values.shrink_to(wanted * d);
            self.ids.shrink_to(wanted);
        }
    }
}

/// One layer's rows, `[batch · kv_heads]`.
#[derive(Debug, Clone)]
pub(crate) struct HostStore<T> {
    rows: Vec<Row<T>>,
    geometry: Geometry,
    scratch: DecodeScratch,
    exported: Exported,
}

impl<T: Element> HostStore<T> {
    pub(crate) fn new(rows: usize, geometry: Geometry) -> Self {
        Self {
            rows: vec![Row::default(); rows],
            geometry,
            scratch: DecodeScratch::default(),
            exported: Exported::default(),
        }
    }

    fn widened(&self, from: usize, source: &[T]) -> Vec<f32> {
        T::widened(&source[from * self.geometry.head_dim..]).into_owned()
    }
}

impl<T: Element> Store for HostStore<T> {
    fn append(&mut self, k: &Tensor, v: &Tensor, first: u32, overwrite: &[Vec<u32>]) -> Result<()> {
        let d = self.geometry.head_dim;
        let width = k.dim(2)? * d;
        if width == 0 {
            return Ok(());
        }
        let rows = &mut self.rows;
        read::<T, _>(k, |k| {
            read::<T, _>(v, |v| {
                for (r, row) in rows.iter_mut().enumerate() {
                    let slots = overwrite.get(r).map_or(&[][..], Vec::as_slice);
                    let new = r * width..(r + 1) * width;
                    row.append(&k[new.clone()], &v[new], first, slots, d);
                }
            })
        })?
    }

    fn attend(&mut self, q: &Tensor, call: &Call) -> Result<Attended> {
        let views: Vec<RowView<'_>> = self
            .rows
            .iter()
            .map(|row| RowView {
                keys: T::elements(&row.keys),
                values: T::elements(&row.values),
                ids: &row.ids,
            })
            .collect();
        let step = Causal {
            geometry: self.geometry,
            tokens: q.dim(2)?,
            scale: call.scale as f32,
            window: call.sliding_window.map(|w| (call.position, w.min(WIDEST))),
        };
        let exported = if call.weights.is_empty() {
            None
        } else {
            let lens = self.rows.iter().map(|row| row.ids.len());
            self.exported.prepare(call.weights, call.queries, lens);
            Some(&mut self.exported)
        };
        let mut out = vec![0.0; q.elem_count()];
        let scratch = &mut self.scratch;
        let done = read::<f32, _>(q, |q| step.attend(q, &views, exported, scratch, &mut out))?;
        if let Err(row) = done {
            return Ok(Err(row));
        }
        let out = Tensor::from_vec(out, q.dims(), &Device::Cpu)?.to_dtype(q.dtype())?;
        Ok(Ok(out))
    }

    fn exported(&self) -> &Exported {
        &self.exported
    }

    fn evict(
        &mut self,
        evict: &[Vec<u32>],
        layout: Layout,
        room: usize,
    ) -> Result<Vec<Relocation>> {
        let d = self.geometry.head_dim;
        let moves: Vec<Relocation> = self
            .rows
            .iter()
            .zip(evict)
            .map(|(row, evict)| Relocation::of(evict, row.ids.len(), layout))
            .collect();
        let moved = |moves: &Relocation| moves.runs.iter().map(|run| run.count).sum::<usize>();
        // A single token that moves is not worth another thread.
        if moves.iter().map(moved).sum::<usize>() > 64 {
            let pairs = self.rows.par_iter_mut().zip(&moves);
            pairs.for_each(|(row, moves)| row.relocate(moves, room, d));
        } else {
            let pairs = self.rows.iter_mut().zip(&moves);
            pairs.for_each(|(row, moves)| row.relocate(moves, room, d));
        }
        Ok(moves)
    }

    fn rows(&self) -> usize {
        self.rows.len()
    }

    fn tensors(&self, batch: usize) -> Result<(Tensor, Tensor)> {
        let shape = [
            batch,
            self.rows.len().checked_div(batch).unwrap_or(0),
            self.rows.first().map_or(0, |row| row.ids.len()),
            self.geometry.head_dim,
        ];
        let gather = |part: fn(&Row<T>) -> &[T]| {
            let all: Vec<T> = self.rows.iter().flat_map(part).copied().collect();
            Tensor::from_vec(all, shape.to_vec(), &Device::Cpu)
        };
        Ok((gather(|row| &row.keys)?, gather(|row| &row.values)?))
    }

    fn ids(&self, row: usize) -> &[u32] {
        &self.rows[row].ids
    }

    fn keys(&self, row: usize, from: usize) -> Result<Vec<f32>> {
        Ok(self.widened(from, &self.rows[row].keys))
    }

    fn values(&self, row: usize, from: usize) -> Result<Vec<f32>> {
        Ok(self.widened(from, &self.rows[row].values))
    }

    fn bytes(&self) -> usize {
        let elements: usize = self
            .rows
            .iter()
            .map(|row| row.keys.capacity() + row.values.capacity())
            .sum();
        elements * std::mem::size_of::<T>()
    }

    fn id_bytes(&self) -> usize {
        self.rows.iter().map(|row| row.ids.capacity() * 4).sum()
    }

    fn clear(&mut self) {
        self.rows.fill(Row::default());
        self.scratch = DecodeScratch::default();
        self.exported.clear();
    }

    fn boxed_clone(&self) -> Box<dyn Store> {
        Box::new(self.clone())
    }
}
