//! Storage on the CPU: each row owns its vectors, so that rows grow, shrink and compact in place and in parallel.
//!
//! A quantised row has three segments: the first positions in f16, quantised tokens, and the newest tokens in f16 and in order. Tokens move
//! only within their segment; those that are no longer among the newest are quantised together and keep their slots.

use super::data::{Data, fits, read_as};
use super::relocation::Run;
use super::{Appended, Attended, Call, Layout, Relocation, Store};
use crate::attention::decode::DecodeScratch;
use crate::attention::{Causal, Elements, Exported, Geometry, Part, RowView, WIDEST, read};
use crate::error::{Error, Result};
use crate::quantise::{self, BLOCK};
use candle_core::{DType, Device, Tensor};
use half::{bf16, f16};
use rayon::prelude::*;
use std::borrow::Cow;

/// Tokens stored alike.
#[derive(Debug, Clone)]
struct Segment {
    keys: Data,
    values: Data,
    len: usize,
}

impl Segment {
    fn new(layout: quantise::Layout, packed: bool) -> Self {
        Self {
            keys: Data::new(layout.keys, packed),
            values: Data::new(layout.values, packed),
            len: 0,
        }
    }

    /// Appends tokens to a segment that is to hold `most`.
    fn extend(&mut self, keys: Elements<'_>, values: Elements<'_>, most: usize, d: usize) {
        let tokens = keys.tokens(d);
        if tokens == 0 {
            return;
        }
        if self.keys.capacity(d).min(self.values.capacity(d)) < self.len + tokens {
            let more = growth(self.len, tokens, most);
            self.keys.reserve(more, d);
            self.values.reserve(more, d);
        }
        self.keys.extend(keys);
        self.values.extend(values);
        self.len += tokens;
    }

    fn apply(&mut self, moves: &Relocation, d: usize) {
        self.keys.apply(moves, d);
        self.values.apply(moves, d);
        self.len = moves.len;
    }

    /// Gives back room for more than `most` tokens.
    fn shrink(&mut self, most: usize, d: usize) {
        let wanted = self.len.max(most);
        if self.keys.capacity(d).max(self.values.capacity(d)) > wanted {
            self.keys.shrink_to(wanted, d);
            self.values.shrink_to(wanted, d);
        }
    }

    fn view(&self) -> Part<'_> {
        Part {
            keys: self.keys.view(),
            values: self.values.view(),
            len: self.len,
        }
    }

    fn bytes(&self) -> usize {
        self.keys.bytes() + self.values.bytes()
    }
}

/// Tokens for which a vector of `len` that is to hold `most` makes room when `tokens` more do not fit: a quarter of what it holds, up to `most`.
fn growth(len: usize, tokens: usize, most: usize) -> usize {
    let more = super::growth(len);
    match most.checked_sub(len) {
        Some(left) if tokens <= left => more.min(left).max(tokens),
        _ => more.max(tokens),
    }
}

/// The segments of a row, in the order of slots.
const SINKS: usize = 0;
const BODY: usize = 1;
const RECENT: usize = 2;

#[derive(Debug, Clone)]
struct Row {
    segments: [Segment; 3],
    ids: Vec<u32>,
    /// Tokens that it is to hold at most; more may come, in prompts and steps of several tokens.
    most: usize,
    /// Whether nothing is evicted, so that a row which has come to hold more goes on as if `most` had not been said.
    keeps_all: bool,
}

impl Row {
    fn new(layout: quantise::Layout, most: usize) -> Self {
        Self {
            segments: [false, true, false].map(|packed| Segment::new(layout, packed)),
            ids: Vec::new(),
            most,
            keeps_all: false,
        }
    }

    fn view(&self) -> RowView<'_> {
        let [sinks, body, recent] = &self.segments;
        RowView {
            parts: [sinks.view(), body.view(), recent.view()],
            ids: &self.ids,
        }
    }

    fn bytes(&self) -> usize {
        self.segments.iter().map(Segment::bytes).sum()
    }

    /// Appends tokens at positions from `first` on; the first ones are kept apart where the layout says so.
    fn append(
        &mut self,
        keys: Elements<'_>,
        values: Elements<'_>,
        first: u32,
        layout: quantise::Layout,
        d: usize,
    ) {
        let tokens = keys.tokens(d);
        if self.keeps_all && self.ids.len().saturating_add(tokens) > self.most {
            self.most = usize::MAX;
        }
        let early = layout.sinks.saturating_sub(first as usize).min(tokens);
        let room = layout.room(self.most);
        let parts = [
            (SINKS, 0, early, room.sinks),
            (RECENT, early, tokens, room.recent),
        ];
        for (segment, from, to, most) in parts {
            let (keys, values) = (keys.slice(from, to, d), values.slice(from, to, d));
            self.segments[segment].extend(keys, values, most, d);
        }
        if self.ids.capacity() < self.ids.len() + tokens {
            let more = growth(self.ids.len(), tokens, self.most);
            self.ids.reserve_exact(more);
        }
        self.ids.extend(first..first + tokens as u32);
    }

    /// Replaces the token of a slot, which is stored as a float, by another.
    fn overwrite(
        &mut self,
        slot: usize,
        keys: Elements<'_>,
        values: Elements<'_>,
        id: u32,
        d: usize,
    ) {
        let recent = &mut self.segments[RECENT];
        recent.keys.overwrite(slot, keys, d);
        recent.values.overwrite(slot, values, d);
        self.ids[slot] = id;
    }

    /// How tokens move when those in the ascending slots `evict` leave: for the row, and for each segment. Rows that are not `quantised` have one.
    fn moves(
        &self,
        evict: &[u32],
        layout: Layout,
        quantised: bool,
    ) -> (Relocation, [Relocation; 3]) {
        let mut whole = Relocation::default();
        let mut first = 0;
        let mut rest = evict;
        let parts = [SINKS, BODY, RECENT].map(|segment| {
            let len = self.segments[segment].len;
            let (here, after) =
                rest.split_at(rest.partition_point(|&s| (s as usize) < first + len));
            rest = after;
            let local: Vec<u32> = here.iter().map(|&slot| slot - first as u32).collect();
            // The newest tokens of a quantised row stay in order.
            let layout = match segment {
                SINKS | RECENT if quantised => Layout::Compact,
                _ => layout,
            };
            let moves = Relocation::of(&local, len, layout);
            // Tokens that do not move in their segment do so where others before it left.
            let shift = first - whole.len;
            whole.runs.extend(moves.runs.iter().map(|run| Run {
                from: first + run.from,
                to: first + run.to,
                count: run.count,
            }));
            if shift > 0 && moves.len > 0 {
                whole.runs.push(Run {
                    from: first,
                    to: whole.len,
                    count: moves.len,
                });
            }
            whole.len += moves.len;
            first += len;
            moves
        });
        (whole, parts)
    }

    /// Moves tokens as some leave, after which up to `room` more may join.
    fn relocate(
        &mut self,
        (whole, parts): (&Relocation, &[Relocation; 3]),
        room: usize,
        layout: quantise::Layout,
        d: usize,
    ) {
        let evicted = whole.len < self.ids.len();
        for (segment, moves) in self.segments.iter_mut().zip(parts) {
            if moves.len < segment.len {
                segment.apply(moves, d);
            }
        }
        whole.apply(&mut self.ids, 1);
        // The first eviction after a prompt frees it; later ones find the storage already of the right size.
        if evicted {
            self.most = whole.len.saturating_add(room);
            self.keeps_all = false;
            let room = layout.room(self.most);
            let most = [room.sinks, room.packed, room.recent];
            for (segment, most) in self.segments.iter_mut().zip(most) {
                segment.shrink(most, d);
            }
            if self.ids.capacity() > self.most {
                self.ids.shrink_to(self.most);
            }
        }
    }

    /// Quantises the tokens beyond the newest `residual` in whole blocks; returns the bytes that were added before others were freed.
    fn settle(&mut self, residual: usize, layout: quantise::Layout, d: usize) -> usize {
        let room = layout.room(self.most);
        let [_, body, recent] = &mut self.segments;
        let blocks = recent.len.saturating_sub(residual) / BLOCK;
        if blocks == 0 {
            return 0;
        }
        let tokens = blocks * BLOCK;
        let before = body.bytes();
        let keys = recent.keys.view().slice(0, tokens, d);
        let values = recent.values.view().slice(0, tokens, d);
        body.extend(keys, values, room.packed, d);
        let added = body.bytes().saturating_sub(before);
        recent.keys.drop_first(tokens, d);
        recent.values.drop_first(tokens, d);
        recent.len -= tokens;
        recent.shrink(room.recent, d);
        added
    }
}

/// One layer's rows, `[batch · kv_heads]`.
#[derive(Debug, Clone)]
pub(crate) struct HostStore {
    rows: Vec<Row>,
    geometry: Geometry,
    layout: quantise::Layout,
    /// Tokens that a row is to hold at most.
    most: usize,
    /// Whether nothing is evicted.
    keeps_all: bool,
    /// Type of the tensors that are handed out.
    dtype: DType,
    scratch: DecodeScratch,
    exported: Exported,
}

impl HostStore {
    /// Rows that are each to hold `most` tokens at most, `usize::MAX` where that is not known.
    pub(crate) fn new(
        rows: usize,
        geometry: Geometry,
        layout: quantise::Layout,
        dtype: DType,
        most: usize,
    ) -> Self {
        Self {
            rows: vec![Row::new(layout, most); rows],
            geometry,
            layout,
            most,
            keeps_all: false,
            dtype,
            scratch: DecodeScratch::default(),
            exported: Exported::default(),
        }
    }

    /// The same for rows of which nothing is evicted: `most` is what they have room for, and more makes them grow.
    pub(crate) fn keeping_all(mut self) -> Self {
        self.keeps_all = true;
        self.rows.iter_mut().for_each(|row| row.keeps_all = true);
        self
    }

    /// A side of a row as f32, from slot `from` on; a copy unless it is stored so.
    fn side(&self, row: usize, from: usize, keys: bool) -> Cow<'_, [f32]> {
        let d = self.geometry.head_dim;
        let mut first = 0;
        let mut parts = Vec::new();
        for segment in &self.rows[row].segments {
            let start = from.clamp(first, first + segment.len) - first;
            let data = if keys { &segment.keys } else { &segment.values };
            if start < segment.len {
                parts.push(data.view().slice(start, segment.len, d));
            }
            first += segment.len;
        }
        if let [Elements::F32(all)] = parts[..] {
            return Cow::Borrowed(all);
        }
        let mut wide = Vec::with_capacity(first.saturating_sub(from) * d);
        for part in parts {
            part.widen_into(&mut wide);
        }
        Cow::Owned(wide)
    }

    fn tensor(&self, batch: usize, keys: bool) -> Result<Tensor> {
        let heads = self.rows.len().checked_div(batch).unwrap_or(0);
        let len = self.rows.first().map_or(0, |row| row.ids.len());
        if let Some(row) = self.rows.iter().find(|row| row.ids.len() != len) {
            return Err(Error::Shape {
                what: "keys or values as tensors",
                got: vec![row.ids.len()],
                expected: format!(
                    "{len} tokens in every head: heads that share budgets are no tensor"
                ),
            });
        }
        let shape = (batch, heads, len, self.geometry.head_dim);
        let all: Vec<f32> = (0..self.rows.len())
            .flat_map(|row| self.side(row, 0, keys).into_owned())
            .collect();
        Ok(Tensor::from_vec(all, shape, &Device::Cpu)?.to_dtype(self.dtype)?)
    }
}

/// A row's tokens of a step `[rows, tokens, d]`.
fn row_of(all: Elements<'_>, row: usize, tokens: usize, d: usize) -> Elements<'_> {
    all.slice(row * tokens, (row + 1) * tokens, d)
}

impl Store for HostStore {
    fn append(
        &mut self,
        k: &Tensor,
        v: &Tensor,
        first: u32,
        overwrite: &[Vec<u32>],
    ) -> Result<Appended> {
        let d = self.geometry.head_dim;
        let tokens = k.dim(2)?;
        if tokens == 0 {
            return Ok(Ok(()));
        }
        let (layout, rows) = (self.layout, &mut self.rows);
        read_as(layout.keys, k, |k| {
            read_as(layout.values, v, |v| {
                for (side, tensor, what) in [(layout.keys, k, "keys"), (layout.values, v, "values")]
                {
                    if let Some(row) =
                        (0..rows.len()).find(|&r| !fits(side, row_of(tensor, r, tokens, d)))
                    {
                        return Err((row, what));
                    }
                }
                for (r, row) in rows.iter_mut().enumerate() {
                    let (keys, values) = (row_of(k, r, tokens, d), row_of(v, r, tokens, d));
                    let slots = overwrite.get(r).map_or(&[][..], Vec::as_slice);
                    let replaced = slots.len().min(tokens);
                    for (t, &slot) in slots[..replaced].iter().enumerate() {
                        let (key, value) = (keys.slice(t, t + 1, d), values.slice(t, t + 1, d));
                        row.overwrite(slot as usize, key, value, first + t as u32, d);
                    }
                    let (keys, values) = (
                        keys.slice(replaced, tokens, d),
                        values.slice(replaced, tokens, d),
                    );
                    row.append(keys, values, first + replaced as u32, layout, d);
                }
                Ok(())
            })
        })?
    }

    fn overwrites(&self) -> bool {
        self.layout.residual.is_none()
    }

    fn replace_key(&mut self, row: usize, slot: usize, key: &[f32]) -> Result<()> {
        let d = self.geometry.head_dim;
        let mut first = 0;
        for segment in &mut self.rows[row].segments {
            if slot < first + segment.len {
                let at = slot - first;
                match self.layout.keys.dtype() {
                    DType::F32 => segment.keys.overwrite(at, Elements::F32(key), d),
                    DType::BF16 => {
                        let key: Vec<bf16> = key.iter().map(|&x| bf16::from_f32(x)).collect();
                        segment.keys.overwrite(at, Elements::BF16(&key), d);
                    }
                    _ => {
                        let key: Vec<f16> = key.iter().map(|&x| f16::from_f32(x)).collect();
                        segment.keys.overwrite(at, Elements::F16(&key), d);
                    }
                }
                return Ok(());
            }
            first += segment.len;
        }
        Ok(())
    }

    fn attend(&mut self, q: &Tensor, call: &Call) -> Result<Attended> {
        let views: Vec<RowView<'_>> = self.rows.iter().map(Row::view).collect();
        let step = Causal {
            geometry: self.geometry,
            tokens: q.dim(2)?,
            scores: call.scores,
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
        let quantised = self.layout.residual.is_some();
        let stored = self.layout;
        let (moves, parts): (Vec<Relocation>, Vec<[Relocation; 3]>) = self
            .rows
            .iter()
            .zip(evict)
            .map(|(row, evict)| row.moves(evict, layout, quantised))
            .unzip();
        let moved = |moves: &Relocation| moves.runs.iter().map(|run| run.count).sum::<usize>();
        // A single token that moves is not worth another thread.
        if moves.iter().map(moved).sum::<usize>() > 64 {
            let rows = self.rows.par_iter_mut().zip(&moves).zip(&parts);
            rows.for_each(|((row, moves), parts)| row.relocate((moves, parts), room, stored, d));
        } else {
            let rows = self.rows.iter_mut().zip(&moves).zip(&parts);
            rows.for_each(|((row, moves), parts)| row.relocate((moves, parts), room, stored, d));
        }
        Ok(moves)
    }

    fn settle(&mut self) -> Result<usize> {
        let Some(residual) = self.layout.residual else {
            return Ok(0);
        };
        let (layout, d) = (self.layout, self.geometry.head_dim);
        let ready = |row: &Row| row.segments[RECENT].len >= residual.saturating_add(BLOCK);
        if !self.rows.iter().any(ready) {
            return Ok(0);
        }
        let before = self.bytes();
        // All rows at once: what each adds before it frees.
        let added: usize = self
            .rows
            .par_iter_mut()
            .map(|row| row.settle(residual, layout, d))
            .sum();
        Ok(before + added)
    }

    fn rows(&self) -> usize {
        self.rows.len()
    }

    fn tensors(&self, batch: usize) -> Result<(Tensor, Tensor)> {
        Ok((self.tensor(batch, true)?, self.tensor(batch, false)?))
    }

    fn ids(&self, row: usize) -> &[u32] {
        &self.rows[row].ids
    }

    fn keys(&self, row: usize, from: usize) -> Result<Cow<'_, [f32]>> {
        Ok(self.side(row, from, true))
    }

    fn values(&self, row: usize, from: usize) -> Result<Cow<'_, [f32]>> {
        Ok(self.side(row, from, false))
    }

    fn bytes(&self) -> usize {
        self.rows.iter().map(Row::bytes).sum()
    }

    fn id_bytes(&self) -> usize {
        self.rows.iter().map(|row| row.ids.capacity() * 4).sum()
    }

    fn clear(&mut self) {
        let mut empty = Row::new(self.layout, self.most);
        empty.keeps_all = self.keeps_all;
        self.rows.fill(empty);
        self.scratch = DecodeScratch::default();
        self.exported.clear();
    }

    fn boxed_clone(&self) -> Box<dyn Store> {
        Box::new(self.clone())
    }
}
