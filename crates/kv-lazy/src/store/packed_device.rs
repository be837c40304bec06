//! Quantised storage as candle tensors, for devices other than the CPU.
//!
//! Every token is quantised when it is appended, on the host, so that codes are those of the CPU's storage. Tokens that are to stay in f16 for now
//! stand a second time in an overlay, which replaces them when rows are widened. Attention widens one layer's keys and values at a time: the
//! memory is saved, no time is.

use super::data::fits;
use super::device::sources;
use super::side::{SideData, UNUSED};
use super::{Appended, Attended, Call, Layout, Relocation, Store};
use crate::attention::device::{self, DeviceQuery, Mask};
use crate::attention::{Elements, Exported, Geometry, WIDEST, read};
use crate::error::Result;
use crate::quantise::{self, BLOCK, Side};
use candle_core::{DType, Device, Tensor};
use half::f16;
use std::borrow::Cow;

/// One layer's tensors.
#[derive(Debug, Clone)]
pub(crate) struct PackedDeviceStore {
    sides: Option<[SideData; 2]>,
    ids: Vec<Vec<u32>>,
    /// Per row the slot of each overlay entry, or [`UNUSED`]; oldest token first.
    entries: Vec<Vec<u32>>,
    exported: Exported,
    geometry: Geometry,
    layout: quantise::Layout,
    dtype: DType,
    device: Device,
}

impl PackedDeviceStore {
    pub(crate) fn new(
        rows: usize,
        geometry: Geometry,
        layout: quantise::Layout,
        dtype: DType,
        device: &Device,
    ) -> Self {
        Self {
            sides: None,
            ids: vec![Vec::new(); rows],
            entries: vec![Vec::new(); rows],
            exported: Exported::default(),
            geometry,
            layout,
            dtype,
            device: device.clone(),
        }
    }

    /// Keys and values `[batch, heads, n, d]` as f32.
    fn widened(&self, sides: &[SideData; 2], batch: usize) -> Result<[Tensor; 2]> {
        let shape = |x: Tensor| {
            let (rows, n, d) = x.dims3()?;
            x.reshape((batch, rows / batch, n, d))
        };
        let [keys, values] = sides;
        Ok([
            shape(keys.widened(&self.entries)?)?,
            shape(values.widened(&self.entries)?)?,
        ])
    }

    fn side(&self, which: usize, row: usize, from: usize) -> Result<Vec<f32>> {
        let Some(sides) = &self.sides else {
            return Ok(Vec::new());
        };
        let one = sides[which].row(row)?;
        let all = one.widened(std::slice::from_ref(&self.entries[row]))?;
        let n = all.dim(1)?;
        Ok(all.narrow(1, from, n - from)?.flatten_all()?.to_vec1()?)
    }
}

impl Store for PackedDeviceStore {
    fn append(&mut self, k: &Tensor, v: &Tensor, first: u32, _: &[Vec<u32>]) -> Result<Appended> {
        let (tokens, d, rows) = (k.dim(2)?, self.geometry.head_dim, self.ids.len());
        let mut sides = Vec::with_capacity(2);
        let parts = [
            (self.layout.keys, k, "keys"),
            (self.layout.values, v, "values"),
        ];
        for (which, (side, tensor, what)) in parts.into_iter().enumerate() {
            let tensor = tensor.to_device(&Device::Cpu)?;
            let mut new: Vec<f32> = read::<f32, _>(&tensor, <[f32]>::to_vec)?;
            if let Side::Packed(_) = side {
                let halves: Vec<f16> = new.iter().map(|&x| f16::from_f32(x)).collect();
                let row = |r: usize| &halves[r * tokens * d..(r + 1) * tokens * d];
                if let Some(row) = (0..rows).find(|&r| !fits(side, Elements::F16(row(r)))) {
                    return Ok(Err((row, what)));
                }
                new = halves.iter().map(|x| x.to_f32()).collect();
            }
            let old = self.sides.as_ref().map(|sides| &sides[which]);
            let appended = if let (None, Side::Exact(dtype)) = (old, side) {
                let new = Tensor::from_vec(new, (rows, tokens, d), &self.device)?;
                SideData::Exact(new.to_dtype(dtype)?)
            } else {
                SideData::appended(old, side, &new, rows, &self.device)?
            };
            sides.push(appended);
        }
        let [keys, values] = <[SideData; 2]>::try_from(sides).expect("keys and values");
        self.sides = Some([keys, values]);
        for (ids, entries) in self.ids.iter_mut().zip(&mut self.entries) {
            entries.extend(ids.len() as u32..(ids.len() + tokens) as u32);
            ids.extend(first..first + tokens as u32);
        }
        Ok(Ok(()))
    }

    fn overwrites(&self) -> bool {
        false
    }

    fn attend(&mut self, q: &Tensor, call: &Call) -> Result<Attended> {
        let Some(sides) = &self.sides else {
            return Ok(Err(0));
        };
        let (batch, tokens, len) = (q.dim(0)?, q.dim(2)?, self.len(0));
        let [k, v] = self.widened(sides, batch)?;
        let query = DeviceQuery {
            scores: call.scores,
            geometry: self.geometry,
            mask: Mask {
                tokens,
                offset: len - tokens,
                window: call.sliding_window.map(|w| (call.position, w.min(WIDEST))),
            },
        };
        let exported = if call.weights.is_empty() {
            None
        } else {
            let lens = self.ids.iter().map(Vec::len);
            self.exported.prepare(call.weights, call.queries, lens);
            Some(&mut self.exported)
        };
        let out = device::attend(q, &k, &v, Some(&self.ids), &query, exported)?;
        if !call.weights.is_empty()
            && let Some(row) = self.exported.not_finite()
        {
            return Ok(Err(row));
        }
        Ok(Ok(out))
    }

    fn exported(&self) -> &Exported {
        &self.exported
    }

    fn evict(&mut self, evict: &[Vec<u32>], layout: Layout, _: usize) -> Result<Vec<Relocation>> {
        let moves: Vec<Relocation> = self
            .ids
            .iter()
            .zip(evict)
            .map(|(ids, evict)| Relocation::of(evict, ids.len(), layout))
            .collect();
        let slots: Vec<Vec<u32>> = self
            .ids
            .iter()
            .zip(&moves)
            .map(|(ids, moves)| sources(moves, ids.len()))
            .collect();
        if let Some([keys, values]) = &self.sides {
            self.sides = Some([keys.selected(&slots)?, values.selected(&slots)?]);
        }
        for (row, moves) in moves.iter().enumerate() {
            let mut now = vec![UNUSED; self.ids[row].len()];
            for (new, &old) in slots[row].iter().enumerate() {
                now[old as usize] = new as u32;
            }
            for slot in &mut self.entries[row] {
                if *slot != UNUSED {
                    *slot = now[*slot as usize];
                }
            }
            moves.apply(&mut self.ids[row], 1);
        }
        Ok(moves)
    }

    fn settle(&mut self) -> Result<usize> {
        let (Some(residual), Some([keys, values])) = (self.layout.residual, &self.sides) else {
            return Ok(0);
        };
        let before = self.bytes();
        let mut kept: Vec<Vec<u32>> = Vec::with_capacity(self.ids.len());
        let mut entries = Vec::with_capacity(self.ids.len());
        let mut settled = false;
        let overlaid = self.entries.first().map_or(0, Vec::len);
        for (ids, slots) in self.ids.iter().zip(&self.entries) {
            let is_sink = |&e: &u32| (ids[slots[e as usize] as usize] as usize) < self.layout.sinks;
            let used = (0..slots.len() as u32).filter(|&e| slots[e as usize] != UNUSED);
            let (mut keep, recent): (Vec<u32>, Vec<u32>) = used.partition(is_sink);
            let blocks = recent.len().saturating_sub(residual) / BLOCK;
            settled |= blocks > 0;
            keep.extend(&recent[blocks * BLOCK..]);
            entries.push(
                keep.iter()
                    .map(|&e| slots[e as usize])
                    .collect::<Vec<u32>>(),
            );
            kept.push(keep);
        }
        let most = kept.iter().map(Vec::len).max().unwrap_or(0);
        // Entries of evicted tokens are dropped by the block too: a cache that evicts what is newest never quantises any.
        if !settled && overlaid - most < BLOCK {
            return Ok(0);
        }
        for (kept, entries) in kept.iter_mut().zip(&mut entries) {
            kept.resize(most, 0);
            entries.resize(most, UNUSED);
        }
        let sides = [keys.with_overlay(&kept)?, values.with_overlay(&kept)?];
        // Codes and scales are shared with what was before; the overlays are copies.
        let copied: usize = sides.iter().map(SideData::overlay_bytes).sum();
        self.sides = Some(sides);
        self.entries = entries;
        Ok(before + copied)
    }

    fn rows(&self) -> usize {
        self.ids.len()
    }

    fn tensors(&self, batch: usize) -> Result<(Tensor, Tensor)> {
        let Some(sides) = &self.sides else {
            let heads = self.ids.len().checked_div(batch).unwrap_or(0);
            let shape = (batch, heads, 0, self.geometry.head_dim);
            let empty = Tensor::zeros(shape, self.dtype, &self.device)?;
            return Ok((empty.clone(), empty));
        };
        let [k, v] = self.widened(sides, batch)?;
        Ok((k.to_dtype(self.dtype)?, v.to_dtype(self.dtype)?))
    }

    fn ids(&self, row: usize) -> &[u32] {
        &self.ids[row]
    }

    fn keys(&self, row: usize, from: usize) -> Result<Cow<'_, [f32]>> {
        self.side(0, row, from).map(Cow::Owned)
    }

    fn values(&self, row: usize, from: usize) -> Result<Cow<'_, [f32]>> {
        self.side(1, row, from).map(Cow::Owned)
    }

    fn bytes(&self) -> usize {
        self.sides
            .as_ref()
            .map_or(0, |sides| sides.iter().map(SideData::bytes).sum())
    }

    fn id_bytes(&self) -> usize {
        let slots = self.ids.iter().chain(&self.entries);
        slots.map(|slots| slots.capacity() * 4).sum()
    }

    fn clear(&mut self) {
        self.sides = None;
        self.ids.fill(Vec::new());
        self.entries.fill(Vec::new());
    }

    fn boxed_clone(&self) -> Box<dyn Store> {
        Box::new(self.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::super::HostStore;
    use super::*;
    use crate::attention::{Reduce, WeightKinds};
    use crate::quantise::StorageConfig;
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    /// The tensor path runs on any device; on the CPU it can be held against the other.
    #[test]
    fn quantised_tensors_and_rows_on_the_host_hold_the_same_numbers_through_evictions() {
        for storage in ["int8", "k8v4", "int4"] {
            let mut storage: StorageConfig = storage.parse().unwrap();
            storage.residual = 8;
            let mut rng = ChaCha8Rng::seed_from_u64(3);
            let geometry = Geometry {
                group: 2,
                head_dim: 32,
            };
            let layout = storage.layout(32, DType::F32, 0).unwrap();
            let mut host = HostStore::new(4, geometry, layout, DType::F32, usize::MAX);
            let mut device = PackedDeviceStore::new(4, geometry, layout, DType::F32, &Device::Cpu);
            let mut position = 0u32;
            for (i, tokens) in [70, 1, 33, 4, 1, 40, 3, 1].into_iter().enumerate() {
                let mut random = |heads: usize| {
                    let data: Vec<f32> = (0..2 * heads * tokens * 32)
                        .map(|_| rng.random_range(-1.0..1.0))
                        .collect();
                    Tensor::from_vec(data, (2, heads, tokens, 32), &Device::Cpu).unwrap()
                };
                let (q, k, v) = (random(4), random(2), random(2));
                let call = Call {
                    scores: 0.4.into(),
                    position,
                    sliding_window: None,
                    weights: WeightKinds::last(Reduce::Sum),
                    queries: 1,
                };
                let stores: [&mut dyn Store; 2] = [&mut host, &mut device];
                let [a, b] = stores.map(|store| {
                    store.append(&k, &v, position, &[]).unwrap().unwrap();
                    let out = store.attend(&q, &call).unwrap().unwrap();
                    (out, store.exported().block(3, 0).2.to_vec())
                });
                let far = (a.0 - b.0).unwrap().abs().unwrap().max_all().unwrap();
                assert!(far.to_scalar::<f32>().unwrap() < 2e-5, "{storage:?} {i}");
                assert!(a.1.iter().zip(&b.1).all(|(x, y)| (x - y).abs() < 1e-5));
                position += tokens as u32;
                // Compacted, so that slots agree.
                let len = host.len(0) as u32;
                let evict: Vec<Vec<u32>> = (0..4u32)
                    .map(|row| {
                        (0..len)
                            .filter(|s| s % 9 == row)
                            .take(len as usize / 10)
                            .collect()
                    })
                    .collect();
                let moves = host.evict(&evict, Layout::Compact, 0).unwrap();
                let others = device.evict(&evict, Layout::Compact, 0).unwrap();
                for (row, (a, b)) in moves.iter().zip(&others).enumerate() {
                    assert_eq!(sources(a, len as usize), sources(b, len as usize));
                    assert_eq!(host.ids(row), device.ids(row));
                }
                let full = device.bytes();
                host.settle().unwrap();
                device.settle().unwrap();
                assert!(device.bytes() <= full);
                for row in 0..4 {
                    for (a, b) in [
                        (host.keys(row, 2).unwrap(), device.keys(row, 2).unwrap()),
                        (host.values(row, 0).unwrap(), device.values(row, 0).unwrap()),
                    ] {
                        assert_eq!(a.len(), b.len());
                        assert!(a.iter().zip(&*b).all(|(x, y)| (x - y).abs() < 1e-6));
                    }
                }
            }
            let exact = 2 * 4 * host.len(0) * 32 * 4;
            assert!(device.bytes() < exact / 2, "{} of {exact}", device.bytes());
        }
    }

    /// A row that never has a block beyond its residual, because what leaves is among the newest, quantises nothing and must not grow.
    #[test]
    fn rows_that_evict_their_newest_tokens_do_not_grow() {
        let geometry = Geometry {
            group: 1,
            head_dim: 32,
        };
        let layout = StorageConfig::int8().layout(32, DType::F32, 0).unwrap();
        let mut store = PackedDeviceStore::new(2, geometry, layout, DType::F32, &Device::Cpu);
        let tensor = |tokens| Tensor::randn(0f32, 1.0, (1, 2, tokens, 32), &Device::Cpu).unwrap();
        let mut most = 0;
        for step in 0..300u32 {
            let tokens = if step == 0 { 60 } else { 1 };
            let first = if step == 0 { 0 } else { 59 + step };
            let (k, v) = (tensor(tokens), tensor(tokens));
            store.append(&k, &v, first, &[]).unwrap().unwrap();
            if step > 0 {
                store
                    .evict(&[vec![59], vec![58]], Layout::Compact, 0)
                    .unwrap();
            }
            store.settle().unwrap();
            assert_eq!(store.len(0), 60);
            // What was evicted goes by the block.
            if step < 100 {
                most = most.max(store.bytes());
            }
            assert!(store.bytes() <= most, "{} of {most}", store.bytes());
        }
        assert!(most < 2 * 2 * 32 * 3 * (60 + 2 * BLOCK), "{most}");
    }
}
