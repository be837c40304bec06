//! The network on flat buffers: forward with a tape, explicit backward pass through time.
//!
//! Time-major buffers `[steps, batch, width]`. Input products of all steps are one matrix product; a step costs one product
//! with `W_hh` forward and one backward; weight gradients are one product over all steps.

use super::{
    input::{Input, InputKind},
    model::{LayerRef, ReadOut, Rnn},
    packed::{Packed, PackedLayer},
    product::{Store, View, product},
    step::StepBuffers,
};
use crate::{
    cell::Cell,
    error::{Error, Result, check_finite},
    params::ParamSet,
};
use std::borrow::Cow;

/// Hidden (and LSTM cell) states of all layers, each `[batch, H]`.
#[derive(Debug, Clone, PartialEq)]
pub struct State {
    batch: usize,
    pub(crate) h: Vec<Vec<f32>>,
    pub(crate) c: Vec<Vec<f32>>,
}

impl State {
    /// All zero.
    pub fn zeros(rnn: &Rnn, batch: usize) -> Self {
        let zeros: Vec<Vec<f32>> = rnn
            .config()
            .hidden
            .iter()
            .map(|h| vec![0.0; h * batch])
            .collect();
        let c = if rnn.config().cell == Cell::Lstm {
            zeros.clone()
        } else {
            Vec::new()
        };
        Self { batch, h: zeros, c }
    }

    /// Number of sequences.
    pub fn batch(&self) -> usize {
        self.batch
    }

    /// Hidden state of a layer, `[batch, H]`.
    pub fn hidden(&self, layer: usize) -> &[f32] {
        &self.h[layer]
    }
}

/// What one layer leaves behind for its backward pass.
#[derive(Debug, Clone, Default)]
struct LayerTape {
    /// Activated gates `[T, B, gH]`; the backward pass turns them into gradients of the pre-activations.
    gates: Vec<f32>,
    /// States `[T + 1, B, H]`, the first being the initial one.
    h: Vec<f32>,
    /// Cell states `[T + 1, B, H]` (LSTM).
    c: Vec<f32>,
    /// tanh of the cell states (LSTM), or the recurrent part of the candidate (GRU), `[T, B, H]`.
    aux: Vec<f32>,
}

/// Buffers of a forward and backward pass, reused from batch to batch.
#[derive(Debug, Clone, Default)]
pub struct Tape {
    steps: usize,
    batch: usize,
    layers: Vec<LayerTape>,
    embedded: Vec<f32>,
    packed: Packed,
    /// Gradient of `W_ih` transposed, for one-hot inputs.
    table: Vec<f32>,
    d_out: Vec<f32>,
    d_below: Vec<f32>,
    d_state: Vec<f32>,
    d_cell: Vec<f32>,
    scratch: Vec<f32>,
}

impl Tape {
    /// An empty tape.
    pub fn new() -> Self {
        Self::default()
    }

    /// States of the top layer after each step, `[steps, batch, H]`, from the last forward pass.
    pub fn top(&self) -> &[f32] {
        match self.layers.last() {
            Some(top) => &top.h[top.h.len() / (self.steps + 1)..],
            None => &[],
        }
    }

    /// Runs all layers over `steps` steps from `state`, which becomes the state after the last one.
    ///
    /// # Errors
    /// The input's length is not `steps * batch` (times the width), a symbol is outside the alphabet, a value is not finite.
    pub fn forward(
        &mut self,
        rnn: &Rnn,
        input: Input<'_>,
        steps: usize,
        state: &mut State,
    ) -> Result<()> {
        let mut packed = std::mem::take(&mut self.packed);
        packed.fill(rnn, None);
        let done = self.forward_packed(rnn, &packed, input, steps, state);
        self.packed = packed;
        done
    }

    /// The same with the weights already laid out.
    pub(super) fn forward_packed(
        &mut self,
        rnn: &Rnn,
        packed: &Packed,
        input: Input<'_>,
        steps: usize,
        state: &mut State,
    ) -> Result<()> {
        let batch = state.batch;
        check_input(rnn, input, steps * batch)?;
        (self.steps, self.batch) = (steps, batch);
        self.layers
            .resize_with(rnn.config().hidden.len(), LayerTape::default);
        for l in 0..self.layers.len() {
            let layer = rnn.layer(l);
            let (below, rest) = self.layers.split_at_mut(l);
            let tape = &mut rest[0];
            let weights = &packed.layers[l];
            let positions = steps * batch;
            match (below.last(), input, rnn.config().input) {
                (Some(b), ..) => weights.dense_input(
                    layer,
                    &b.h[batch * layer.width..],
                    positions,
                    &mut tape.gates,
                ),
                (None, Input::Vectors(x), _) => {
                    weights.dense_input(layer, x, positions, &mut tape.gates)
                }
                (None, Input::Symbols(s), InputKind::Embedding { dim, .. }) => {
                    let table = rnn.params().slot(0);
                    self.embedded.clear();
                    self.embedded.extend(
                        s.iter()
                            .flat_map(|&s| &table[s as usize * dim..(s as usize + 1) * dim]),
                    );
                    weights.dense_input(layer, &self.embedded, positions, &mut tape.gates);
                }
                (None, Input::Symbols(s), _) => weights.one_hot_input(layer, s, &mut tape.gates),
            }
            tape.start(&state.h[l], state.c.get(l).map(Vec::as_slice), steps);
            for t in 0..steps {
                let at = At {
                    cell: rnn.config().cell,
                    layer,
                    t,
                    batch,
                };
                tape.step(at, weights, &mut self.scratch);
            }
            let (size, end) = (batch * layer.hidden, steps * batch * layer.hidden);
            state.h[l].copy_from_slice(&tape.h[end..end + size]);
            if let Some(c) = state.c.get_mut(l) {
                c.copy_from_slice(&tape.c[end..end + size]);
            }
        }
        Ok(())
    }

    /// Read-out of rows of top states of the last forward pass, with the weights it had: `rows` are indices
    /// `step * batch + sequence`; `None` takes all. `[rows, outputs]`.
    pub fn read_out(&self, rnn: &Rnn, rows: Option<&[usize]>, logits: &mut Vec<f32>) {
        self.read_out_packed(rnn, &self.packed, rows, logits);
    }

    pub(super) fn read_out_packed(
        &self,
        rnn: &Rnn,
        packed: &Packed,
        rows: Option<&[usize]>,
        logits: &mut Vec<f32>,
    ) {
        let count = rows.map_or(self.steps * self.batch, <[usize]>::len);
        packed.read_out(rnn, &self.read_out_input(rnn, rows), count, logits);
    }

    /// What the read-out sees: the top states of `rows` (`None`: all), after the activation.
    pub(crate) fn read_out_input(&self, rnn: &Rnn, rows: Option<&[usize]>) -> Cow<'_, [f32]> {
        let h = rnn.config().hidden[rnn.config().hidden.len() - 1];
        let mut top = match rows {
            None => Cow::Borrowed(self.top()),
            Some(rows) => rows
                .iter()
                .flat_map(|&r| &self.top()[r * h..(r + 1) * h])
                .copied()
                .collect::<Vec<f32>>()
                .into(),
        };
        if rnn.config().read_out == ReadOut::Relu {
            top.to_mut().iter_mut().for_each(|v| *v = v.max(0.0));
        }
        top
    }

    /// States of a layer, `[steps + 1, batch, H]`, the first being the initial one, from the last forward pass.
    pub(crate) fn states(&self, layer: usize) -> &[f32] {
        &self.layers[layer].h
    }

    /// The embedded symbols of the last forward pass, `[steps * batch, dim]`.
    pub(crate) fn embedded(&self) -> &[f32] {
        &self.embedded
    }

    /// Backward pass from the gradient of the read-out `[rows, outputs]`, adding to `gradients`.
    pub(crate) fn backward(
        &mut self,
        rnn: &Rnn,
        input: Input<'_>,
        rows: Option<&[usize]>,
        d_logits: &[f32],
        gradients: &mut ParamSet,
    ) {
        let config = rnn.config();
        let cell = config.cell;
        let (steps, batch) = (self.steps, self.batch);
        let positions = steps * batch;
        let mut h = config.hidden[config.hidden.len() - 1];
        let out = config.output_slot();
        let count = rows.map_or(positions, <[usize]>::len);
        // Read-out.
        let top = self.read_out_input(rnn, rows);
        let d = View::new(d_logits, count, config.outputs);
        product(
            gradients.slot_mut(out),
            h,
            Store::Add,
            d.t(),
            View::new(&top, count, h),
        );
        add_rows(gradients.slot_mut(out + 1), d_logits);
        let w_out = View::new(rnn.params().slot(out), config.outputs, h);
        let mut picked = vec![0.0; count * h];
        product(&mut picked, h, Store::Replace, d, w_out);
        if config.read_out == ReadOut::Relu {
            for (p, v) in picked.iter_mut().zip(top.iter()) {
                if *v <= 0.0 {
                    *p = 0.0;
                }
            }
        }
        match rows {
            None => self.d_out = picked,
            Some(rows) => {
                self.d_out.clear();
                self.d_out.resize(positions * h, 0.0);
                for (&r, p) in rows.iter().zip(picked.chunks_exact(h)) {
                    self.d_out[r * h..(r + 1) * h]
                        .iter_mut()
                        .zip(p)
                        .for_each(|(d, p)| *d += p);
                }
            }
        }
        for l in (0..self.layers.len()).rev() {
            let layer = rnn.layer(l);
            h = layer.hidden;
            let gh = cell.gates() * h;
            let slot = config.layer_slot(l);
            let (below, rest) = self.layers.split_at_mut(l);
            let tape = &mut rest[0];
            self.d_state.clear();
            self.d_state.resize(batch * h, 0.0);
            self.d_cell.clear();
            self.d_cell.resize(batch * h, 0.0);
            for t in (0..steps).rev() {
                let range = t * batch * h..(t + 1) * batch * h;
                self.d_state
                    .iter_mut()
                    .zip(&self.d_out[range])
                    .for_each(|(s, d)| *s += d);
                let at = At {
                    cell,
                    layer,
                    t,
                    batch,
                };
                tape.step_back(at, &mut self.d_state, &mut self.d_cell);
            }
            let d = View::new(&tape.gates, positions, gh);
            let before = View::new(&tape.h, positions, h);
            if cell == Cell::Gru {
                let rz = View::strided(&tape.gates, positions, 2 * h, gh);
                let candidate = View::new(&tape.aux, positions, h);
                let (g_rz, g_n) = gradients.slot_mut(slot + 1).split_at_mut(2 * h * h);
                product(g_rz, h, Store::Add, rz.t(), before);
                product(g_n, h, Store::Add, candidate.t(), before);
                add_rows(gradients.slot_mut(slot + 3), &tape.aux);
            } else {
                product(gradients.slot_mut(slot + 1), h, Store::Add, d.t(), before);
            }
            add_rows(gradients.slot_mut(slot + 2), &tape.gates);
            let width = layer.width;
            let w_ih = View::new(layer.w_ih, gh, width);
            let g_ih = gradients.slot_mut(slot);
            match (below.last(), input) {
                (Some(b), _) => {
                    let x = View::new(&b.h[batch * width..], positions, width);
                    product(g_ih, width, Store::Add, d.t(), x);
                    self.d_below.resize(positions * width, 0.0);
                    product(&mut self.d_below, width, Store::Replace, d, w_ih);
                    std::mem::swap(&mut self.d_out, &mut self.d_below);
                    self.d_out.truncate(positions * width);
                }
                (None, Input::Vectors(x)) => product(
                    g_ih,
                    width,
                    Store::Add,
                    d.t(),
                    View::new(x, positions, width),
                ),
                (None, Input::Symbols(s)) => match config.input {
                    InputKind::Embedding { dim, .. } => {
                        product(
                            g_ih,
                            width,
                            Store::Add,
                            d.t(),
                            View::new(&self.embedded, positions, dim),
                        );
                        self.d_below.resize(positions * dim, 0.0);
                        product(&mut self.d_below, dim, Store::Replace, d, w_ih);
                        let g = gradients.slot_mut(0);
                        for (&s, row) in s.iter().zip(self.d_below.chunks_exact(dim)) {
                            let at = s as usize * dim;
                            g[at..at + dim]
                                .iter_mut()
                                .zip(row)
                                .for_each(|(g, r)| *g += r);
                        }
                    }
                    _ => {
                        self.table.clear();
                        self.table.resize(width * gh, 0.0);
                        for (&s, row) in s.iter().zip(tape.gates.chunks_exact(gh)) {
                            let at = s as usize * gh;
                            self.table[at..at + gh]
                                .iter_mut()
                                .zip(row)
                                .for_each(|(g, r)| *g += r);
                        }
                        for (i, row) in g_ih.chunks_exact_mut(width).enumerate() {
                            row.iter_mut()
                                .enumerate()
                                .for_each(|(s, g)| *g += self.table[s * gh + i]);
                        }
                    }
                },
            }
        }
    }
}

pub(super) fn check_input(rnn: &Rnn, input: Input<'_>, positions: usize) -> Result<()> {
    let kind = rnn.config().input;
    let wrong = |expected: String, found: usize| Error::Shape {
        tensor: "input".into(),
        expected,
        found: vec![found],
    };
    match (input, kind.vocab()) {
        (Input::Symbols(s), Some(vocab)) => {
            if s.len() != positions {
                return Err(wrong(format!("[{positions}]"), s.len()));
            }
            match s.iter().position(|&s| s as usize >= vocab) {
                None => Ok(()),
                Some(at) => Err(Error::Setting {
                    setting: "input",
                    reason: format!("symbol {} at {at}, alphabet of {vocab}", s[at]),
                }),
            }
        }
        (Input::Vectors(x), None) => {
            if x.len() != positions * kind.width() {
                return Err(wrong(format!("[{positions} * {}]", kind.width()), x.len()));
            }
            check_finite("input", x)
        }
        _ => Err(Error::Setting {
            setting: "input",
            reason: format!("the network reads {kind:?}"),
        }),
    }
}

/// `sum += ` the sum of the rows of `data`.
fn add_rows(sum: &mut [f32], data: &[f32]) {
    for row in data.chunks_exact(sum.len()) {
        sum.iter_mut().zip(row).for_each(|(s, v)| *s += v);
    }
}

/// A step of one layer.
#[derive(Clone, Copy)]
struct At<'a> {
    cell: Cell,
    layer: LayerRef<'a>,
    t: usize,
    batch: usize,
}

impl LayerTape {
    fn start(&mut self, h: &[f32], c: Option<&[f32]>, steps: usize) {
        self.h.resize((steps + 1) * h.len(), 0.0);
        self.h[..h.len()].copy_from_slice(h);
        self.aux.resize(steps * h.len(), 0.0);
        if let Some(c) = c {
            self.c.resize((steps + 1) * c.len(), 0.0);
            self.c[..c.len()].copy_from_slice(c);
        }
    }

    fn step(&mut self, at: At<'_>, weights: &PackedLayer, scratch: &mut Vec<f32>) {
        let At {
            cell,
            layer,
            t,
            batch,
        } = at;
        let h = layer.hidden;
        let gh = cell.gates() * h;
        let size = batch * h;
        let gates = &mut self.gates[t * batch * gh..(t + 1) * batch * gh];
        let (before, after) = self.h[t * size..(t + 2) * size].split_at_mut(size);
        let aux = &mut self.aux[t * size..(t + 1) * size];
        if let Some(bias) = layer.candidate_bias {
            aux.chunks_exact_mut(h)
                .for_each(|row| row.copy_from_slice(bias));
        }
        let cells = if cell == Cell::Lstm {
            &mut self.c[t * size..(t + 2) * size]
        } else {
            &mut [][..]
        };
        let mut buffers = StepBuffers {
            gates,
            before,
            after,
            aux,
            cells,
        };
        weights.recurrent(cell, h, &mut buffers, scratch);
        buffers.activate(cell, h);
    }

    /// `d_state` comes in as the gradient of this step's state and leaves as that of the one before.
    fn step_back(&mut self, at: At<'_>, d_state: &mut [f32], d_cell: &mut [f32]) {
        let At {
            cell,
            layer,
            t,
            batch,
        } = at;
        let h = layer.hidden;
        let gh = cell.gates() * h;
        let size = batch * h;
        let gates = &mut self.gates[t * batch * gh..(t + 1) * batch * gh];
        let (before, after) = self.h[t * size..(t + 2) * size].split_at(size);
        let aux = &mut self.aux[t * size..(t + 1) * size];
        let rows = d_state.chunks_exact_mut(h).zip(gates.chunks_exact_mut(gh));
        match cell {
            Cell::Tanh | Cell::Relu => {
                for ((ds, g), a) in rows.zip(after.chunks_exact(h)) {
                    for ((g, d), a) in g.iter_mut().zip(ds).zip(a) {
                        *g = match cell {
                            Cell::Tanh => *d * (1.0 - a * a),
                            _ if *a > 0.0 => *d,
                            _ => 0.0,
                        };
                    }
                }
            }
            Cell::Lstm => {
                let c_before = &self.c[t * size..(t + 1) * size];
                let cells = d_cell
                    .chunks_exact_mut(h)
                    .zip(c_before.chunks_exact(h))
                    .zip(aux.chunks_exact(h));
                for ((ds, g), ((dc, cb), tc)) in rows.zip(cells) {
                    let (i, g) = g.split_at_mut(h);
                    let (f, g) = g.split_at_mut(h);
                    let (g, o) = g.split_at_mut(h);
                    let (ds, dc, cb, tc) = (&ds[..h], &mut dc[..h], &cb[..h], &tc[..h]);
                    for k in 0..h {
                        let (iv, fv, gv, ov) = (i[k], f[k], g[k], o[k]);
                        let d = dc[k] + ds[k] * ov * (1.0 - tc[k] * tc[k]);
                        o[k] = ds[k] * tc[k] * ov * (1.0 - ov);
                        i[k] = d * gv * iv * (1.0 - iv);
                        f[k] = d * cb[k] * fv * (1.0 - fv);
                        g[k] = d * iv * (1.0 - gv * gv);
                        dc[k] = d * fv;
                    }
                }
            }
            Cell::Gru => {
                for ((ds, g), (hb, a)) in
                    rows.zip(before.chunks_exact(h).zip(aux.chunks_exact_mut(h)))
                {
                    let (r, g) = g.split_at_mut(h);
                    let (z, n) = g.split_at_mut(h);
                    for k in 0..h {
                        let (rv, zv, nv, d) = (r[k], z[k], n[k], ds[k]);
                        let dn = d * (1.0 - zv) * (1.0 - nv * nv);
                        z[k] = d * (hb[k] - nv) * zv * (1.0 - zv);
                        r[k] = dn * a[k] * rv * (1.0 - rv);
                        n[k] = dn;
                        a[k] = dn * rv;
                        ds[k] = d * zv;
                    }
                }
            }
        }
        let gates = &self.gates[t * batch * gh..(t + 1) * batch * gh];
        if cell == Cell::Gru {
            let (w_rz, w_n) = layer.w_hh.split_at(2 * h * h);
            let aux = &self.aux[t * size..(t + 1) * size];
            product(
                d_state,
                h,
                Store::Add,
                View::strided(gates, batch, 2 * h, gh),
                View::new(w_rz, 2 * h, h),
            );
            product(
                d_state,
                h,
                Store::Add,
                View::new(aux, batch, h),
                View::new(w_n, h, h),
            );
        } else {
            product(
                d_state,
                h,
                Store::Replace,
                View::new(gates, batch, gh),
                View::new(layer.w_hh, gh, h),
            );
        }
    }
}
