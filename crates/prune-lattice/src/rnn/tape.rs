//! The network on flat buffers: forward with a tape, explicit backward pass through time.
//!
//! Time-major buffers `[steps, batch, width]`. Input products of all steps are one matrix product; a step costs one product
//! with `W_hh` forward and one backward; weight gradients are one product over all steps.

use super::{
    activation::{sigmoid, tanh, tanh_into, tanh_of},
    compact::Block,
    gemm::{Store, View, gemm},
    model::{InputKind, LayerRef, Rnn},
};
use crate::{
    cell::Cell,
    error::{Error, Result, check_finite},
    params::ParamSet,
};

/// Input of all steps, time-major.
#[derive(Debug, Clone, Copy)]
pub enum Input<'a> {
    /// `[steps * batch]`
    Symbols(&'a [u32]),
    /// `[steps * batch * dim]`
    Vectors(&'a [f32]),
}

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
    /// `W_ih` transposed plus bias, for one-hot inputs; its gradient in the backward pass.
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
        self.forward_blocks(rnn, None, input, steps, state)
    }

    /// The same with the recurrent product of each layer done on a block of `W_hh` where blocks are given.
    pub(super) fn forward_blocks(
        &mut self,
        rnn: &Rnn,
        blocks: Option<&[Block]>,
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
            let gh = rnn.config().cell.gates() * layer.hidden;
            tape.gates.resize(steps * batch * gh, 0.0);
            match (below.last(), input, rnn.config().input) {
                (Some(b), ..) => dense_input(layer, &b.h[batch * layer.width..], &mut tape.gates),
                (None, Input::Vectors(x), _) => dense_input(layer, x, &mut tape.gates),
                (None, Input::Symbols(s), InputKind::Embedding { dim, .. }) => {
                    let table = rnn.params().slot(0);
                    self.embedded.clear();
                    self.embedded.extend(
                        s.iter()
                            .flat_map(|&s| &table[s as usize * dim..(s as usize + 1) * dim]),
                    );
                    dense_input(layer, &self.embedded, &mut tape.gates);
                }
                (None, Input::Symbols(s), _) => {
                    one_hot_input(layer, s, &mut self.table, &mut tape.gates)
                }
            }
            tape.start(&state.h[l], state.c.get(l).map(Vec::as_slice), steps);
            let block = blocks.map(|b| &b[l]);
            for t in 0..steps {
                tape.step(rnn.config().cell, layer, block, t, batch, &mut self.scratch);
            }
            let (size, end) = (batch * layer.hidden, steps * batch * layer.hidden);
            state.h[l].copy_from_slice(&tape.h[end..end + size]);
            if let Some(c) = state.c.get_mut(l) {
                c.copy_from_slice(&tape.c[end..end + size]);
            }
        }
        Ok(())
    }

    /// Read-out of rows of top states: `rows` are indices `step * batch + sequence`; `None` takes all. `[rows, outputs]`.
    pub fn read_out(&self, rnn: &Rnn, rows: Option<&[usize]>, logits: &mut Vec<f32>) {
        let top = self.top();
        let h = rnn.config().hidden[rnn.config().hidden.len() - 1];
        let gathered: Vec<f32>;
        let (x, count) = match rows {
            None => (top, self.steps * self.batch),
            Some(rows) => {
                gathered = rows
                    .iter()
                    .flat_map(|&r| &top[r * h..(r + 1) * h])
                    .copied()
                    .collect();
                (gathered.as_slice(), rows.len())
            }
        };
        read_out(rnn, x, count, logits);
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
        let gathered: Vec<f32> = match rows {
            None => Vec::new(),
            Some(rows) => rows
                .iter()
                .flat_map(|&r| &self.top()[r * h..(r + 1) * h])
                .copied()
                .collect(),
        };
        let top = if rows.is_some() {
            gathered.as_slice()
        } else {
            self.top()
        };
        let d = View::new(d_logits, count, config.outputs);
        gemm(
            gradients.slot_mut(out),
            h,
            Store::Add,
            d.t(),
            View::new(top, count, h),
        );
        add_rows(gradients.slot_mut(out + 1), d_logits);
        let w_out = View::new(rnn.params().slot(out), config.outputs, h);
        self.d_out.clear();
        self.d_out.resize(positions * h, 0.0);
        match rows {
            None => gemm(&mut self.d_out, h, Store::Replace, d, w_out),
            Some(rows) => {
                let mut picked = vec![0.0; count * h];
                gemm(&mut picked, h, Store::Replace, d, w_out);
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
                tape.step_back(cell, layer, t, batch, &mut self.d_state, &mut self.d_cell);
            }
            let d = View::new(&tape.gates, positions, gh);
            let before = View::new(&tape.h, positions, h);
            if cell == Cell::Gru {
                let rz = View::strided(&tape.gates, positions, 2 * h, gh);
                let candidate = View::new(&tape.aux, positions, h);
                let (g_rz, g_n) = gradients.slot_mut(slot + 1).split_at_mut(2 * h * h);
                gemm(g_rz, h, Store::Add, rz.t(), before);
                gemm(g_n, h, Store::Add, candidate.t(), before);
                add_rows(gradients.slot_mut(slot + 3), &tape.aux);
            } else {
                gemm(gradients.slot_mut(slot + 1), h, Store::Add, d.t(), before);
            }
            add_rows(gradients.slot_mut(slot + 2), &tape.gates);
            let width = layer.width;
            let w_ih = View::new(layer.w_ih, gh, width);
            let g_ih = gradients.slot_mut(slot);
            match (below.last(), input) {
                (Some(b), _) => {
                    let x = View::new(&b.h[batch * width..], positions, width);
                    gemm(g_ih, width, Store::Add, d.t(), x);
                    self.d_below.resize(positions * width, 0.0);
                    gemm(&mut self.d_below, width, Store::Replace, d, w_ih);
                    std::mem::swap(&mut self.d_out, &mut self.d_below);
                    self.d_out.truncate(positions * width);
                }
                (None, Input::Vectors(x)) => gemm(
                    g_ih,
                    width,
                    Store::Add,
                    d.t(),
                    View::new(x, positions, width),
                ),
                (None, Input::Symbols(s)) => match config.input {
                    InputKind::Embedding { dim, .. } => {
                        gemm(
                            g_ih,
                            width,
                            Store::Add,
                            d.t(),
                            View::new(&self.embedded, positions, dim),
                        );
                        self.d_below.resize(positions * dim, 0.0);
                        gemm(&mut self.d_below, dim, Store::Replace, d, w_ih);
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

/// `x W_out^T + b`, `[count, outputs]`.
pub(super) fn read_out(rnn: &Rnn, x: &[f32], count: usize, logits: &mut Vec<f32>) {
    let config = rnn.config();
    let h = config.hidden[config.hidden.len() - 1];
    let slot = config.output_slot();
    fill_rows(logits, rnn.params().slot(slot + 1), count);
    let w = View::new(rnn.params().slot(slot), config.outputs, h);
    gemm(
        logits,
        config.outputs,
        Store::Add,
        View::new(x, count, h),
        w.t(),
    );
}

fn check_input(rnn: &Rnn, input: Input<'_>, positions: usize) -> Result<()> {
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

/// `count` copies of `row`.
fn fill_rows(dst: &mut Vec<f32>, row: &[f32], count: usize) {
    dst.clear();
    (0..count).for_each(|_| dst.extend_from_slice(row));
}

/// `sum += ` the sum of the rows of `data`.
fn add_rows(sum: &mut [f32], data: &[f32]) {
    for row in data.chunks_exact(sum.len()) {
        sum.iter_mut().zip(row).for_each(|(s, v)| *s += v);
    }
}

pub(super) fn dense_input(layer: LayerRef<'_>, x: &[f32], gates: &mut Vec<f32>) {
    let gh = layer.bias.len();
    let positions = gates.len() / gh;
    fill_rows(gates, layer.bias, positions);
    gemm(
        gates,
        gh,
        Store::Add,
        View::new(x, positions, layer.width),
        View::new(layer.w_ih, gh, layer.width).t(),
    );
}

pub(super) fn one_hot_input(
    layer: LayerRef<'_>,
    symbols: &[u32],
    table: &mut Vec<f32>,
    gates: &mut [f32],
) {
    let gh = layer.bias.len();
    if symbols.len() < layer.width {
        // Few steps: reading columns costs less than transposing the matrix.
        for (&s, row) in symbols.iter().zip(gates.chunks_exact_mut(gh)) {
            let column = layer.w_ih[s as usize..].iter().step_by(layer.width);
            row.iter_mut()
                .zip(column)
                .zip(layer.bias)
                .for_each(|((g, w), b)| *g = w + b);
        }
        return;
    }
    table.resize(layer.width * gh, 0.0);
    for (i, row) in layer.w_ih.chunks_exact(layer.width).enumerate() {
        row.iter()
            .enumerate()
            .for_each(|(s, w)| table[s * gh + i] = w + layer.bias[i]);
    }
    for (&s, row) in symbols.iter().zip(gates.chunks_exact_mut(gh)) {
        row.copy_from_slice(&table[s as usize * gh..(s as usize + 1) * gh]);
    }
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

    fn step(
        &mut self,
        cell: Cell,
        layer: LayerRef<'_>,
        block: Option<&Block>,
        t: usize,
        batch: usize,
        scratch: &mut Vec<f32>,
    ) {
        let h = layer.hidden;
        let gh = cell.gates() * h;
        let size = batch * h;
        let gates = &mut self.gates[t * batch * gh..(t + 1) * batch * gh];
        let (before, after) = self.h[t * size..(t + 2) * size].split_at_mut(size);
        let aux = &mut self.aux[t * size..(t + 1) * size];
        let state = View::new(before, batch, h);
        if let Some(bias) = layer.candidate_bias {
            aux.chunks_exact_mut(h)
                .for_each(|row| row.copy_from_slice(bias));
        }
        if let Some(block) = block {
            block.product(cell, h, before, gates, aux, scratch);
        } else if cell == Cell::Gru {
            let (w_rz, w_n) = layer.w_hh.split_at(2 * h * h);
            gemm(gates, gh, Store::Add, state, View::new(w_rz, 2 * h, h).t());
            gemm(aux, h, Store::Add, state, View::new(w_n, h, h).t());
        } else {
            gemm(
                gates,
                gh,
                Store::Add,
                state,
                View::new(layer.w_hh, gh, h).t(),
            );
        }
        let c = if cell == Cell::Lstm {
            &mut self.c[t * size..(t + 2) * size]
        } else {
            &mut [][..]
        };
        activate(cell, h, gates, before, after, aux, c);
    }

    /// `d_state` comes in as the gradient of this step's state and leaves as that of the one before.
    fn step_back(
        &mut self,
        cell: Cell,
        layer: LayerRef<'_>,
        t: usize,
        batch: usize,
        d_state: &mut [f32],
        d_cell: &mut [f32],
    ) {
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
            gemm(
                d_state,
                h,
                Store::Add,
                View::strided(gates, batch, 2 * h, gh),
                View::new(w_rz, 2 * h, h),
            );
            gemm(
                d_state,
                h,
                Store::Add,
                View::new(aux, batch, h),
                View::new(w_n, h, h),
            );
        } else {
            gemm(
                d_state,
                h,
                Store::Replace,
                View::new(gates, batch, gh),
                View::new(layer.w_hh, gh, h),
            );
        }
    }
}

/// The pointwise part of a step: pre-activations in `gates` become activations, `after` the new state. For an LSTM `c` holds
/// the cell state before and after and `aux` receives its tanh; for a GRU `aux` holds the recurrent part of the candidate.
pub(super) fn activate(
    cell: Cell,
    h: usize,
    gates: &mut [f32],
    before: &[f32],
    after: &mut [f32],
    aux: &mut [f32],
    c: &mut [f32],
) {
    let rows = gates.chunks_exact_mut(cell.gates() * h);
    match cell {
        Cell::Tanh => tanh_into(after, gates),
        Cell::Relu => after
            .iter_mut()
            .zip(gates)
            .for_each(|(a, g)| *a = g.max(0.0)),
        Cell::Lstm => {
            let (c_before, c_after) = c.split_at_mut(before.len());
            let cells = c_before.chunks_exact(h).zip(c_after.chunks_exact_mut(h));
            let states = after.chunks_exact_mut(h).zip(aux.chunks_exact_mut(h));
            for ((g, (cb, ca)), (a, tc)) in rows.zip(cells).zip(states) {
                let (ifg, o) = g.split_at_mut(3 * h);
                let (i_f, g) = ifg.split_at_mut(2 * h);
                sigmoid(i_f);
                tanh(g);
                sigmoid(o);
                let (i, f) = i_f.split_at(h);
                let (g, cb, ca) = (&g[..h], &cb[..h], &mut ca[..h]);
                for k in 0..h {
                    ca[k] = f[k] * cb[k] + i[k] * g[k];
                }
                tanh_into(tc, ca);
                a.iter_mut()
                    .zip(o.iter())
                    .zip(tc.iter())
                    .for_each(|((a, o), t)| *a = o * t);
            }
        }
        Cell::Gru => {
            let states = before
                .chunks_exact(h)
                .zip(after.chunks_exact_mut(h))
                .zip(aux.chunks_exact(h));
            for (g, ((b, a), u)) in rows.zip(states) {
                let (rz, n) = g.split_at_mut(2 * h);
                sigmoid(rz);
                let (r, z) = rz.split_at(h);
                for k in 0..h {
                    n[k] = tanh_of(n[k] + r[k] * u[k]);
                    a[k] = (1.0 - z[k]) * n[k] + z[k] * b[k];
                }
            }
        }
    }
}
