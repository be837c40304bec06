//! Storage as candle tensors `[B, Hkv, n, d]`, for devices other than the CPU.
//!
//! Compaction flattens to `[rows · n, d]` and selects whole rows, which needs one u32 per token and not one per element;
//! nothing is sorted on the device. Tokens are appended in place where there is room, behind what was handed out before, which does not change. Every
//! change is computed before it is stored, so that a failed operation leaves the cache as it was.

use super::side;
use super::{Appended, Attended, Call, Layout, Relocation, Store};
use crate::attention::device::{self, DeviceQuery, Mask};
use crate::attention::{Exported, Geometry, WIDEST, expect_shape};
use crate::error::Result;
use crate::quantise;
use candle_core::{DType, Device, Tensor};
use std::borrow::Cow;

/// One layer's tensors.
#[derive(Debug)]
pub(crate) struct DeviceStore {
    /// `[B, Hkv, capacity, d]`, of which the tokens in `ids` are filled.
    kv: Option<(Tensor, Tensor)>,
    ids: Vec<Vec<u32>>,
    exported: Exported,
    geometry: Geometry,
    /// Types in which keys and values are stored.
    dtypes: (DType, DType),
    /// Type of the tensors that are handed out.
    dtype: DType,
    device: Device,
}

impl DeviceStore {
    pub(crate) fn new(
        rows: usize,
        geometry: Geometry,
        layout: quantise::Layout,
        dtype: DType,
        device: &Device,
    ) -> Self {
        Self {
            kv: None,
            ids: vec![Vec::new(); rows],
            exported: Exported::default(),
            geometry,
            dtypes: (layout.keys.dtype(), layout.values.dtype()),
            dtype,
            device: device.clone(),
        }
    }

    /// The filled part of keys and values.
    fn filled(&self) -> Result<Option<(Tensor, Tensor)>> {
        let len = self.len(0);
        Ok(match &self.kv {
            None => None,
            Some((k, v)) => Some((k.narrow(2, 0, len)?, v.narrow(2, 0, len)?)),
        })
    }

    /// `held`, of which `len` tokens are filled, with `new` behind them: in place where there is room.
    fn appended(held: Option<&Tensor>, len: usize, new: &Tensor) -> Result<Tensor> {
        let new = new.contiguous()?;
        let Some(held) = held else {
            return Ok(new);
        };
        let (batch, heads, capacity, d) = held.dims4()?;
        // Checked here, because what is written in place is not undone.
        let expected = [batch, heads, new.dim(2)?, d];
        expect_shape("new tokens", &new, &expected)?;
        let wanted = len + new.dim(2)?;
        if wanted <= capacity {
            held.slice_set(&new, 2, len)?;
            return Ok(held.clone());
        }
        let capacity = wanted.max(len + super::growth(len));
        let grown = Tensor::zeros((batch, heads, capacity, d), held.dtype(), held.device())?;
        if len > 0 {
            grown.slice_set(&held.narrow(2, 0, len)?.contiguous()?, 2, 0)?;
        }
        grown.slice_set(&new, 2, len)?;
        Ok(grown)
    }

    /// Row-wise selection of slots, the same number in each row.
    fn select(&self, tensor: &Tensor, slots: &[Vec<u32>]) -> Result<Tensor> {
        let (batch, heads, n, d) = tensor.dims4()?;
        let selected = side::select(&tensor.reshape((batch * heads, n, d))?, slots)?;
        let kept = slots.first().map_or(0, Vec::len);
        Ok(selected.reshape((batch, heads, kept, d))?)
    }

    /// The same with room for `room` tokens behind, so that as many are appended in place.
    fn select_with_room(&self, tensor: &Tensor, slots: &[Vec<u32>], room: usize) -> Result<Tensor> {
        let selected = self.select(tensor, slots)?;
        let (batch, heads, kept, d) = selected.dims4()?;
        if room == 0 || kept == 0 {
            return Ok(selected);
        }
        let shape = (batch, heads, kept.saturating_add(room), d);
        let roomy = Tensor::zeros(shape, selected.dtype(), &self.device)?;
        roomy.slice_set(&selected, 2, 0)?;
        Ok(roomy)
    }

    fn row(&self, tensor: Option<&Tensor>, row: usize, from: usize) -> Result<Vec<f32>> {
        let Some(tensor) = tensor else {
            return Ok(Vec::new());
        };
        // A row by itself: making all of them contiguous for each would be quadratic.
        let (_, heads, n, _) = tensor.dims4()?;
        let row = tensor.get(row / heads)?.get(row % heads)?;
        let row = row.narrow(0, from, n - from)?;
        Ok(row.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?)
    }
}

/// Where the tokens of a row of `len` come from that moved so.
pub(super) fn sources(moves: &Relocation, len: usize) -> Vec<u32> {
    let mut slots: Vec<u32> = (0..len as u32).collect();
    moves.apply(&mut slots, 1);
    slots
}

impl Store for DeviceStore {
    fn append(
        &mut self,
        k: &Tensor,
        v: &Tensor,
        first: u32,
        overwrite: &[Vec<u32>],
    ) -> Result<Appended> {
        let tokens = k.dim(2)?;
        let (k, v) = (k.to_dtype(self.dtypes.0)?, v.to_dtype(self.dtypes.1)?);
        let len = self.len(0);
        let held = self.kv.as_ref();
        let (mut k, mut v) = (
            Self::appended(held.map(|kv| &kv.0), len, &k)?,
            Self::appended(held.map(|kv| &kv.1), len, &v)?,
        );
        let mut ids = self.ids.clone();
        for ids in &mut ids {
            ids.extend(first..first + tokens as u32);
        }
        if overwrite.iter().any(|slots| !slots.is_empty()) {
            let len = len + tokens;
            (k, v) = (k.narrow(2, 0, len)?, v.narrow(2, 0, len)?);
            let moves: Vec<Relocation> = overwrite
                .iter()
                .map(|slots| Relocation::overwrite(slots, len, tokens))
                .collect();
            let slots: Vec<Vec<u32>> = moves.iter().map(|moves| sources(moves, len)).collect();
            (k, v) = (self.select(&k, &slots)?, self.select(&v, &slots)?);
            for (ids, moves) in ids.iter_mut().zip(&moves) {
                moves.apply(ids, 1);
            }
        }
        (self.kv, self.ids) = (Some((k, v)), ids);
        Ok(Ok(()))
    }

    fn overwrites(&self) -> bool {
        true
    }

    fn settle(&mut self) -> Result<usize> {
        Ok(0)
    }

    fn attend(&mut self, q: &Tensor, call: &Call) -> Result<Attended> {
        let Some((k, v)) = self.filled()? else {
            return Ok(Err(0));
        };
        let (tokens, len) = (q.dim(2)?, self.len(0));
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
        // Policies act on weights: NaN must not pass for one.
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

    fn evict(
        &mut self,
        evict: &[Vec<u32>],
        layout: Layout,
        room: usize,
    ) -> Result<Vec<Relocation>> {
        let moves: Vec<Relocation> = self
            .ids
            .iter()
            .zip(evict)
            .map(|(ids, evict)| Relocation::of(evict, ids.len(), layout))
            .collect();
        if let Some((k, v)) = &self.filled()? {
            let slots: Vec<Vec<u32>> = self
                .ids
                .iter()
                .zip(&moves)
                .map(|(ids, moves)| sources(moves, ids.len()))
                .collect();
            // Never more than there was: caches that evict late would reserve what they may never fill.
            let kept = slots.first().map_or(0, Vec::len);
            let capacity = self.kv.as_ref().map_or(Ok(0), |(k, _)| k.dim(2))?;
            let room = room.min(capacity.saturating_sub(kept));
            let of = |tensor: &Tensor| self.select_with_room(tensor, &slots, room);
            self.kv = Some((of(k)?, of(v)?));
        }
        for (ids, moves) in self.ids.iter_mut().zip(&moves) {
            moves.apply(ids, 1);
        }
        Ok(moves)
    }

    fn rows(&self) -> usize {
        self.ids.len()
    }

    fn tensors(&self, batch: usize) -> Result<(Tensor, Tensor)> {
        match self.filled()? {
            Some((k, v)) => Ok((k.to_dtype(self.dtype)?, v.to_dtype(self.dtype)?)),
            None => {
                let heads = self.ids.len().checked_div(batch).unwrap_or(0);
                let shape = (batch, heads, 0, self.geometry.head_dim);
                let empty = Tensor::zeros(shape, self.dtype, &self.device)?;
                Ok((empty.clone(), empty))
            }
        }
    }

    fn ids(&self, row: usize) -> &[u32] {
        &self.ids[row]
    }

    fn keys(&self, row: usize, from: usize) -> Result<Cow<'_, [f32]>> {
        self.row(self.filled()?.map(|kv| kv.0).as_ref(), row, from)
            .map(Cow::Owned)
    }

    fn values(&self, row: usize, from: usize) -> Result<Cow<'_, [f32]>> {
        self.row(self.filled()?.map(|kv| kv.1).as_ref(), row, from)
            .map(Cow::Owned)
    }

    fn bytes(&self) -> usize {
        self.kv.as_ref().map_or(0, |(k, v)| {
            k.elem_count() * self.dtypes.0.size_in_bytes()
                + v.elem_count() * self.dtypes.1.size_in_bytes()
        })
    }

    fn id_bytes(&self) -> usize {
        self.ids.iter().map(|ids| ids.capacity() * 4).sum()
    }

    fn clear(&mut self) {
        self.kv = None;
        self.ids.fill(Vec::new());
    }

    fn boxed_clone(&self) -> Box<dyn Store> {
        Box::new(self.clone())
    }
}

impl Clone for DeviceStore {
    /// A deep copy: two stores that appended to the same tensors in place would overwrite each other.
    fn clone(&self) -> Self {
        let copy = |x: &Tensor| x.copy().expect("a tensor of this device can be copied");
        Self {
            kv: self.kv.as_ref().map(|(k, v)| (copy(k), copy(v))),
            ids: self.ids.clone(),
            exported: self.exported.clone(),
            geometry: self.geometry,
            dtypes: self.dtypes,
            dtype: self.dtype,
            device: self.device.clone(),
        }
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
    fn tensor_operations_and_host_kernels_agree_through_appends_evictions_and_windows() {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let geometry = Geometry {
            group: 2,
            head_dim: 16,
        };
        let layout = StorageConfig::default().layout(16, DType::F32, 0).unwrap();
        let mut host = HostStore::new(4, geometry, layout, DType::F32, usize::MAX);
        let mut device = DeviceStore::new(4, geometry, layout, DType::F32, &Device::Cpu);
        let mut position = 0u32;
        for (i, tokens) in [9, 1, 1, 4, 1, 1, 3, 1, 1].into_iter().enumerate() {
            let mut random = |heads: usize| {
                let data: Vec<f32> = (0..2 * heads * tokens * 16)
                    .map(|_| rng.random_range(-1.0..1.0))
                    .collect();
                Tensor::from_vec(data, (2, heads, tokens, 16), &Device::Cpu).unwrap()
            };
            let (q, k, v) = (random(4), random(2), random(2));
            let overwrite: Vec<Vec<u32>> = if i == 5 {
                (0..4).map(|row| vec![row + 1]).collect()
            } else {
                Vec::new()
            };
            let mean = WeightKinds::last(Reduce::Mean);
            for weights in [
                WeightKinds::NONE,
                WeightKinds::COLUMNS,
                mean,
                mean.union(WeightKinds::last(Reduce::Max))
                    .union(WeightKinds::COLUMNS),
            ] {
                for sliding_window in [None, Some(5)] {
                    let call = Call {
                        scores: crate::attention::Scores {
                            scale: 0.8,
                            softcap: sliding_window.map(|_| 2.0),
                        },
                        position,
                        sliding_window,
                        weights,
                        queries: tokens.min(2),
                    };
                    let mut pair: [Box<dyn Store>; 2] =
                        [Box::new(host.clone()), Box::new(device.clone())];
                    let [a, b] = [0, 1].map(|s| {
                        pair[s]
                            .append(&k, &v, position, &overwrite)
                            .unwrap()
                            .unwrap();
                        let out = pair[s].attend(&q, &call).unwrap().unwrap();
                        let exported = pair[s].exported();
                        let mut all = Vec::new();
                        for row in 0..4 * usize::from(!weights.is_empty()) {
                            for block in 0..exported.blocks() {
                                all.extend_from_slice(exported.block(row, block).2);
                            }
                        }
                        (out, all)
                    });
                    let far = (a.0 - b.0).unwrap().abs().unwrap().max_all().unwrap();
                    assert!(far.to_scalar::<f32>().unwrap() < 1e-5);
                    assert_eq!(a.1.len(), b.1.len());
                    assert!(a.1.iter().zip(&b.1).all(|(x, y)| (x - y).abs() < 1e-5));
                }
            }
            host.append(&k, &v, position, &overwrite).unwrap().unwrap();
            device
                .append(&k, &v, position, &overwrite)
                .unwrap()
                .unwrap();
            position += tokens as u32;
            if i % 3 == 1 {
                let len = host.len(0);
                let evict: Vec<Vec<u32>> = (0..4u32)
                    .map(|row| {
                        (0..len as u32)
                            .filter(|slot| slot % 4 == row)
                            .take(len / 5)
                            .collect()
                    })
                    .collect();
                let layout = if i == 4 {
                    Layout::SlotReuse
                } else {
                    Layout::Compact
                };
                let moves = host.evict(&evict, layout, 0).unwrap();
                assert_eq!(device.evict(&evict, layout, 0).unwrap(), moves);
            }
            for row in 0..4 {
                assert_eq!(host.ids(row), device.ids(row));
                assert_eq!(host.keys(row, 1).unwrap(), device.keys(row, 1).unwrap());
                assert_eq!(host.values(row, 0).unwrap(), device.values(row, 0).unwrap());
            }
            let exact = 2 * 4 * device.len(0) * 16 * 4;
            assert!((exact..=exact + 2 * 4 * 32 * 16 * 4).contains(&device.bytes()));
        }
    }

    #[test]
    fn what_evicts_every_some_steps_keeps_its_storage() {
        let geometry = Geometry {
            group: 1,
            head_dim: 8,
        };
        let tensor =
            |tokens: usize| Tensor::randn(0f32, 1.0, (1, 2, tokens, 8), &Device::Cpu).unwrap();
        let layout = StorageConfig::default().layout(8, DType::F32, 0).unwrap();
        let mut store = DeviceStore::new(2, geometry, layout, DType::F32, &Device::Cpu);
        let (budget, every) = (100u32, 10u32);
        let append = |store: &mut DeviceStore, tokens: u32, at: u32| {
            let (k, v) = (tensor(tokens as usize), tensor(tokens as usize));
            store.append(&k, &v, at, &[]).unwrap().unwrap();
        };
        append(&mut store, budget + every, 0);
        let most = store.bytes();
        for round in 0..5 {
            let oldest: Vec<u32> = (0..every).collect();
            let kept = store.keys(1, every as usize).unwrap().into_owned();
            store
                .evict(&[oldest.clone(), oldest], Layout::Compact, every as usize)
                .unwrap();
            assert_eq!(store.keys(1, 0).unwrap(), kept);
            for step in 0..every {
                append(&mut store, 1, budget + round * every + step);
                assert_eq!(store.bytes(), most, "round {round}, step {step}");
            }
        }
        // Room that never was there is not reserved.
        store
            .evict(&[vec![0], vec![0]], Layout::Compact, 1 << 20)
            .unwrap();
        assert_eq!(store.bytes(), most);
    }

    #[test]
    fn a_failed_append_leaves_keys_values_and_positions_as_they_were() {
        let geometry = Geometry {
            group: 1,
            head_dim: 8,
        };
        let tensor = |tokens: usize, d: usize| {
            Tensor::randn(0f32, 1.0, (1, 2, tokens, d), &Device::Cpu).unwrap()
        };
        let layout = StorageConfig::default().layout(8, DType::F32, 0).unwrap();
        let mut store = DeviceStore::new(2, geometry, layout, DType::F32, &Device::Cpu);
        store
            .append(&tensor(5, 8), &tensor(5, 8), 0, &[])
            .unwrap()
            .unwrap();
        let both = |store: &DeviceStore| {
            [store.keys(1, 0), store.values(1, 0)].map(|side| side.unwrap().into_owned())
        };
        let before = both(&store);
        assert!(store.append(&tensor(1, 8), &tensor(1, 7), 5, &[]).is_err());
        assert_eq!(store.len(1), 5);
        assert_eq!(both(&store), before);
        let slots = [vec![2], vec![99]];
        let one = tensor(1, 8);
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            store.append(&one, &one, 5, &slots)
        }));
        assert!(!matches!(result, Ok(Ok(Ok(())))));
        assert_eq!((store.len(1), both(&store)), (5, before));
        store
            .append(&tensor(1, 8), &tensor(1, 8), 5, &[])
            .unwrap()
            .unwrap();
        assert_eq!(store.len(0), 6);
        let bytes = store.bytes();
        assert!(
            (2 * 2 * 6 * 8 * 4..=2 * 2 * 37 * 8 * 4).contains(&bytes),
            "{bytes}"
        );
    }
}
