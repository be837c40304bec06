//! Causal attention with rotary embedding and its gradient, on a CPU.
//!
//! Queries are `[batch * length, heads * dim]`, keys and values `[batch * length, kv_heads * dim]`, the outputs of their
//! linears. One task computes one key/value head of one sequence with the query heads that read it, in blocks of rows and
//! only up to the diagonal. The backward pass computes the weights again, so that nothing of size length² is stored.

use std::ops::Range;

use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor};
use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use rayon::prelude::*;

use super::ops::{like, slice, values};

/// Query rows of a block.
const ROWS: usize = 64;

/// Shapes and angles of one attention.
#[derive(Clone)]
pub(super) struct Attention {
    pub(super) length: usize,
    pub(super) heads: usize,
    pub(super) kv_heads: usize,
    pub(super) dim: usize,
    /// Cosines and sines, `[length, dim / 2]` each.
    pub(super) cos: Vec<f32>,
    pub(super) sin: Vec<f32>,
}

/// Rotation of a head by the angles of its positions.
#[derive(Clone, Copy)]
enum Rotation {
    None,
    Forward,
    Inverse,
}

/// One matrix for each query head of a key/value head of a sequence.
type Heads = Vec<Vec<f32>>;

impl Attention {
    fn scale(&self) -> f32 {
        1.0 / (self.dim as f32).sqrt()
    }

    /// Rotates rows by the angles of their positions.
    fn rotate(&self, head: &mut [f32], rotation: Rotation) {
        let half = self.dim / 2;
        let sign = match rotation {
            Rotation::None => return,
            Rotation::Forward => 1.0,
            Rotation::Inverse => -1.0,
        };
        for (t, row) in head.chunks_exact_mut(self.dim).enumerate() {
            let (low, high) = row.split_at_mut(half);
            let angles = self.cos[t * half..].iter().zip(&self.sin[t * half..]);
            for ((low, high), (cos, sin)) in low.iter_mut().zip(high).zip(angles) {
                let sin = sign * sin;
                (*low, *high) = (*low * cos - *high * sin, *high * cos + *low * sin);
            }
        }
    }

    /// One head of one sequence out of rows of `heads` heads, `[length, dim]`.
    fn head(
        &self,
        from: &[f32],
        sequence: usize,
        (head, heads): (usize, usize),
        rotation: Rotation,
    ) -> Vec<f32> {
        let rows = from[sequence * self.length * heads * self.dim..].chunks_exact(heads * self.dim);
        let mut part = Vec::with_capacity(self.length * self.dim);
        for row in rows.take(self.length) {
            part.extend_from_slice(&row[head * self.dim..][..self.dim]);
        }
        self.rotate(&mut part, rotation);
        part
    }

    /// Blocks of rows.
    fn blocks(&self) -> impl Iterator<Item = Range<usize>> {
        let length = self.length;
        (0..length)
            .step_by(ROWS)
            .map(move |start| start..(start + ROWS).min(length))
    }

    /// Rows of a head as a matrix.
    fn part<'a>(&self, head: &'a [f32], rows: Range<usize>) -> MatRef<'a, f32> {
        let values = &head[rows.start * self.dim..rows.end * self.dim];
        MatRef::from_row_major_slice(values, rows.len(), self.dim)
    }

    /// Rows of a head as a matrix to write to.
    fn part_mut<'a>(&self, head: &'a mut [f32], rows: Range<usize>) -> MatMut<'a, f32> {
        let values = &mut head[rows.start * self.dim..rows.end * self.dim];
        MatMut::from_row_major_slice_mut(values, rows.len(), self.dim)
    }

    /// Attention weights of some rows of rotated queries on all keys up to the last of them, row-major; zero above the diagonal.
    fn weights(&self, q: &[f32], k: &[f32], rows: Range<usize>) -> Vec<f32> {
        let keys = self.part(k, 0..rows.end);
        let mut weights = product(self.part(q, rows.clone()), keys.transpose());
        let scale = self.scale();
        for (t, row) in rows.clone().zip(weights.chunks_exact_mut(rows.end)) {
            let (seen, hidden) = row.split_at_mut(t + 1);
            let max = seen.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            seen.iter_mut()
                .for_each(|w| *w = ((*w - max) * scale).exp());
            let sum: f32 = seen.iter().sum();
            seen.iter_mut().for_each(|w| *w /= sum);
            hidden.fill(0.0);
        }
        weights
    }

    /// Runs `task` for every key/value head of every sequence.
    fn each<T: Send>(&self, keys: usize, task: impl Fn(usize, usize) -> T + Sync) -> Vec<T> {
        let sequences = keys / (self.length * self.kv_heads * self.dim);
        (0..sequences * self.kv_heads)
            .into_par_iter()
            .map(|i| task(i / self.kv_heads, i % self.kv_heads))
            .collect()
    }

    fn readers(&self, kv: usize) -> Range<usize> {
        let group = self.heads / self.kv_heads;
        kv * group..(kv + 1) * group
    }

    /// Rows of `heads` heads from the heads of all sequences in order.
    fn rows<'a>(&self, heads: usize, parts: impl Iterator<Item = &'a Vec<f32>>) -> Vec<f32> {
        let parts: Vec<_> = parts.collect();
        let mut rows = vec![0f32; parts.len() * self.length * self.dim];
        let sequences = rows.par_chunks_exact_mut(self.length * heads * self.dim);
        sequences
            .zip(parts.par_chunks_exact(heads))
            .for_each(|(rows, parts)| {
                for (t, row) in rows.chunks_exact_mut(heads * self.dim).enumerate() {
                    for (to, part) in row.chunks_exact_mut(self.dim).zip(parts) {
                        to.copy_from_slice(&part[t * self.dim..][..self.dim]);
                    }
                }
            });
        rows
    }

    fn forward(&self, q: &[f32], k: &[f32], v: &[f32]) -> Vec<f32> {
        let outputs: Vec<Heads> = self.each(k.len(), |sequence, kv| {
            let k = self.head(k, sequence, (kv, self.kv_heads), Rotation::Forward);
            let v = self.head(v, sequence, (kv, self.kv_heads), Rotation::None);
            let output = |head| {
                let q = self.head(q, sequence, (head, self.heads), Rotation::Forward);
                let mut y = vec![0f32; q.len()];
                for rows in self.blocks() {
                    let weights = self.weights(&q, &k, rows.clone());
                    let (seen, y) = (self.part(&v, 0..rows.end), self.part_mut(&mut y, rows));
                    let weights = MatRef::from_row_major_slice(&weights, y.nrows(), seen.nrows());
                    matmul(y, Accum::Replace, weights, seen, 1.0, Par::Seq);
                }
                y
            };
            self.readers(kv).map(output).collect()
        });
        self.rows(self.heads, outputs.iter().flatten())
    }

    /// Gradients of queries, keys and values.
    fn backward(&self, q: &[f32], k: &[f32], v: &[f32], dy: &[f32]) -> [Vec<f32>; 3] {
        let gradients: Vec<(Heads, Vec<f32>, Vec<f32>)> = self.each(k.len(), |sequence, kv| {
            let k = self.head(k, sequence, (kv, self.kv_heads), Rotation::Forward);
            let v = self.head(v, sequence, (kv, self.kv_heads), Rotation::None);
            let (mut dk, mut dv) = (vec![0f32; k.len()], vec![0f32; v.len()]);
            let mut dqs = Vec::new();
            for head in self.readers(kv) {
                let q = self.head(q, sequence, (head, self.heads), Rotation::Forward);
                let dy = self.head(dy, sequence, (head, self.heads), Rotation::None);
                let mut dq = vec![0f32; q.len()];
                for rows in self.blocks() {
                    let seen = 0..rows.end;
                    let square =
                        |values| MatRef::from_row_major_slice(values, rows.len(), seen.len());
                    let weights = self.weights(&q, &k, rows.clone());
                    let dy = self.part(&dy, rows.clone());
                    let into = self.part_mut(&mut dv, seen.clone());
                    matmul(
                        into,
                        Accum::Add,
                        square(&weights).transpose(),
                        dy,
                        1.0,
                        Par::Seq,
                    );
                    let mut scores = product(dy, self.part(&v, seen.clone()).transpose());
                    let each = scores.chunks_exact_mut(seen.len());
                    for (d, w) in each.zip(weights.chunks_exact(seen.len())) {
                        let mean: f32 = d.iter().zip(w).map(|(d, w)| d * w).sum();
                        for (d, w) in d.iter_mut().zip(w) {
                            *d = w * (*d - mean) * self.scale();
                        }
                    }
                    let scores = square(&scores);
                    let into = self.part_mut(&mut dk, seen.clone());
                    matmul(
                        into,
                        Accum::Add,
                        scores.transpose(),
                        self.part(&q, rows.clone()),
                        1.0,
                        Par::Seq,
                    );
                    let into = self.part_mut(&mut dq, rows.clone());
                    matmul(
                        into,
                        Accum::Replace,
                        scores,
                        self.part(&k, seen.clone()),
                        1.0,
                        Par::Seq,
                    );
                }
                self.rotate(&mut dq, Rotation::Inverse);
                dqs.push(dq);
            }
            self.rotate(&mut dk, Rotation::Inverse);
            (dqs, dk, dv)
        });
        [
            self.rows(self.heads, gradients.iter().flat_map(|(dq, _, _)| dq)),
            self.rows(self.kv_heads, gradients.iter().map(|(_, dk, _)| dk)),
            self.rows(self.kv_heads, gradients.iter().map(|(_, _, dv)| dv)),
        ]
    }
}

/// `left * right`, row-major.
fn product(left: MatRef<'_, f32>, right: MatRef<'_, f32>) -> Vec<f32> {
    let (rows, columns) = (left.nrows(), right.ncols());
    let mut product = vec![0f32; rows * columns];
    let into = MatMut::from_row_major_slice_mut(&mut product, rows, columns);
    matmul(into, Accum::Replace, left, right, 1.0, Par::Seq);
    product
}

impl CustomOp3 for Attention {
    fn name(&self) -> &'static str {
        "attention-with-gradient"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        q_layout: &Layout,
        k: &CpuStorage,
        k_layout: &Layout,
        v: &CpuStorage,
        v_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let y = self.forward(
            slice(q, q_layout)?,
            slice(k, k_layout)?,
            slice(v, v_layout)?,
        );
        Ok((CpuStorage::F32(y), q_layout.shape().clone()))
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        _: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let [dq, dk, dv] = values(q, |q| {
            values(k, |k| {
                values(v, |v| values(gradient, |dy| Ok(self.backward(q, k, v, dy))))
            })
        })?;
        Ok((Some(like(q, dq)?), Some(like(k, dk)?), Some(like(v, dv)?)))
    }
}
