//! Weights laid out for the forward pass.
//!
//! Products with few rows are fastest when the weight matrix stands transposed, `[sources, gates * H]`: at 32 rows two to
//! four times as fast as with the `[gates * H, sources]` of checkpoints, and for a single row it becomes a sum of rows.

use super::{
    input::InputKind,
    model::{LayerRef, Rnn},
    product::{Store, View, product},
    step::StepBuffers,
};
use crate::cell::Cell;
use std::ops::Range;

/// Part of `W_hh` that is not zero: sources `0..sources`, targets in `targets`, the same for all gates.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Extent {
    pub(super) sources: usize,
    pub(super) targets: Range<usize>,
}

/// The matrices of one layer, transposed.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct PackedLayer {
    /// `[width, gates * H]`; with the bias added to each row when the input is one-hot.
    input: Vec<f32>,
    one_hot: bool,
    /// `[sources, gates * targets]`
    recurrent: Vec<f32>,
    extent: Extent,
}

/// All matrices of a network, transposed.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Packed {
    pub(super) layers: Vec<PackedLayer>,
    /// `[H, outputs]`
    pub(super) read_out: Vec<f32>,
}

/// `dst += x w` for `x` of `rows` rows that start `x_stride` apart.
fn add_product(
    dst: &mut [f32],
    stride: usize,
    x: &[f32],
    x_stride: usize,
    rows: usize,
    w: View<'_>,
) {
    if rows == 1 {
        let n = w.cols();
        let dst = &mut dst[..n];
        for (j, &v) in x[..w.rows()].iter().enumerate() {
            dst.iter_mut().zip(w.row(j)).for_each(|(d, w)| *d += v * w);
        }
        return;
    }
    product(
        dst,
        stride,
        Store::Add,
        View::strided(x, rows, w.rows(), x_stride),
        w,
    );
}

/// Rows of a `rows` x `cols` matrix become columns.
fn transpose(from: &[f32], rows: usize, cols: usize, to: &mut Vec<f32>) {
    to.resize(rows * cols, 0.0);
    for (j, column) in to.chunks_exact_mut(rows).enumerate() {
        column
            .iter_mut()
            .zip(from[j..].iter().step_by(cols))
            .for_each(|(t, f)| *t = *f);
    }
}

impl Packed {
    /// Lays out the weights of a network; `extents` limits the recurrent matrices.
    pub(super) fn fill(&mut self, rnn: &Rnn, extents: Option<&[Extent]>) {
        let config = rnn.config();
        self.layers
            .resize_with(config.hidden.len(), PackedLayer::default);
        for (l, packed) in self.layers.iter_mut().enumerate() {
            let layer = rnn.layer(l);
            let one_hot = l == 0 && matches!(config.input, InputKind::OneHot { .. });
            packed.extent = match extents {
                Some(e) => e[l].clone(),
                None => Extent {
                    sources: layer.hidden,
                    targets: 0..layer.hidden,
                },
            };
            packed.fill(layer, one_hot);
        }
        let top = config.hidden[config.hidden.len() - 1];
        transpose(
            rnn.params().slot(config.output_slot()),
            config.outputs,
            top,
            &mut self.read_out,
        );
    }

    /// Logits of `count` rows of top states.
    pub(super) fn read_out(&self, rnn: &Rnn, x: &[f32], count: usize, logits: &mut Vec<f32>) {
        let outputs = rnn.config().outputs;
        fill_rows(
            logits,
            rnn.params().slot(rnn.config().output_slot() + 1),
            count,
        );
        let h = self.read_out.len() / outputs;
        add_product(
            logits,
            outputs,
            x,
            h,
            count,
            View::new(&self.read_out, h, outputs),
        );
    }
}

/// `count` copies of `row`.
fn fill_rows(dst: &mut Vec<f32>, row: &[f32], count: usize) {
    dst.clear();
    (0..count).for_each(|_| dst.extend_from_slice(row));
}

impl PackedLayer {
    fn fill(&mut self, layer: LayerRef<'_>, one_hot: bool) {
        let gh = layer.bias.len();
        transpose(layer.w_ih, gh, layer.width, &mut self.input);
        self.one_hot = one_hot;
        if one_hot {
            for row in self.input.chunks_exact_mut(gh) {
                row.iter_mut().zip(layer.bias).for_each(|(w, b)| *w += b);
            }
        }
        let (h, Extent { sources, targets }) = (layer.hidden, &self.extent);
        if *sources == h && targets.len() == h {
            transpose(layer.w_hh, gh, h, &mut self.recurrent);
            return;
        }
        let rows = (0..gh / h).flat_map(|g| targets.clone().map(move |i| g * h + i));
        self.recurrent.clear();
        self.recurrent
            .extend((0..*sources).flat_map(|j| rows.clone().map(move |r| layer.w_hh[r * h + j])));
    }

    /// Multiplications of a step's recurrent product.
    pub(super) fn products(&self) -> usize {
        self.recurrent.len()
    }

    /// Pre-activations of all steps from vectors.
    pub(super) fn dense_input(
        &self,
        layer: LayerRef<'_>,
        x: &[f32],
        positions: usize,
        gates: &mut Vec<f32>,
    ) {
        let gh = layer.bias.len();
        fill_rows(gates, layer.bias, positions);
        add_product(
            gates,
            gh,
            x,
            layer.width,
            positions,
            View::new(&self.input, layer.width, gh),
        );
    }

    /// Pre-activations of all steps from symbols.
    pub(super) fn one_hot_input(&self, layer: LayerRef<'_>, symbols: &[u32], gates: &mut Vec<f32>) {
        debug_assert!(self.one_hot);
        let gh = layer.bias.len();
        gates.clear();
        symbols.iter().for_each(|&s| {
            gates.extend_from_slice(&self.input[s as usize * gh..(s as usize + 1) * gh])
        });
    }

    /// Adds the recurrent product of one step to the pre-activations (a GRU's candidate part to `aux`).
    pub(super) fn recurrent(
        &self,
        cell: Cell,
        h: usize,
        buffers: &mut StepBuffers<'_>,
        scratch: &mut Vec<f32>,
    ) {
        let StepBuffers {
            before, gates, aux, ..
        } = buffers;
        let Extent { sources, targets } = &self.extent;
        let (batch, gh) = (before.len() / h, cell.gates() * h);
        let (width, columns) = (targets.len(), cell.gates() * targets.len());
        if width == 0 || *sources == 0 {
            return;
        }
        let w = View::new(&self.recurrent, *sources, columns);
        if width == h && cell != Cell::Gru {
            add_product(gates, gh, before, h, batch, w);
            return;
        }
        scratch.clear();
        scratch.resize(batch * columns, 0.0);
        add_product(scratch, columns, before, h, batch, w);
        for (b, product) in scratch.chunks_exact(columns).enumerate() {
            for (g, part) in product.chunks_exact(width).enumerate() {
                let to = match (cell, g) {
                    (Cell::Gru, 2) => &mut aux[b * h..],
                    _ => &mut gates[b * gh + g * h..],
                };
                to[targets.clone()]
                    .iter_mut()
                    .zip(part)
                    .for_each(|(t, p)| *t += p);
            }
        }
    }
}
