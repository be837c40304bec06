//! One step of a layer: its buffers and its pointwise part.

use super::activation::{sigmoid, tanh, tanh_into, tanh_of};
use crate::cell::Cell;

/// What a step reads and writes.
pub(super) struct StepBuffers<'a> {
    /// Pre-activations, which become activations.
    pub(super) gates: &'a mut [f32],
    /// States before the step.
    pub(super) before: &'a [f32],
    /// States after it.
    pub(super) after: &'a mut [f32],
    /// For a GRU the recurrent part of the candidate; for an LSTM it receives the tanh of the cell states.
    pub(super) aux: &'a mut [f32],
    /// Cell states before and after the step (LSTM).
    pub(super) cells: &'a mut [f32],
}

impl StepBuffers<'_> {
    /// The pointwise part of a step of a layer of `h` neurons.
    pub(super) fn activate(self, cell: Cell, h: usize) {
        let Self {
            gates,
            before,
            after,
            aux,
            cells: c,
        } = self;
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
}
