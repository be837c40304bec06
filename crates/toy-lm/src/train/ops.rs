//! Operations with gradients of their own, for training on a CPU.
//!
//! Candle's fused operations carry no gradient, and its composed ones pass over memory once per arithmetic operation on one
//! thread. These do what a decoder needs in one parallel pass each way. On other devices [`super::TrainableDecoder`] composes the
//! same functions of candle's own operations, which are also what the tests compare with.

use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Result, Shape, Storage, Tensor, bail};
use rayon::prelude::*;

/// Rows that one task works on.
const ROWS: usize = 64;

/// The values of a contiguous f32 tensor on the CPU.
pub(super) fn slice<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&storage.as_slice::<f32>()?[start..end]),
        None => bail!(
            "expected a contiguous tensor, found strides {:?}",
            layout.stride()
        ),
    }
}

/// Calls `read` with the values of a contiguous f32 tensor on the CPU.
pub(super) fn values<T>(tensor: &Tensor, read: impl FnOnce(&[f32]) -> Result<T>) -> Result<T> {
    let tensor = tensor.contiguous()?;
    let (storage, layout) = tensor.storage_and_layout();
    match &*storage {
        Storage::Cpu(storage) => read(slice(storage, layout)?),
        _ => bail!("expected a tensor on the CPU"),
    }
}

pub(super) fn like(tensor: &Tensor, values: Vec<f32>) -> Result<Tensor> {
    Tensor::from_vec(values, tensor.shape(), tensor.device())
}

/// `x / sqrt(mean(x²) + eps) * weight` over rows: x is `[rows, width]`, weight `[width]`.
pub(super) struct RmsNorm {
    pub(super) eps: f32,
}

impl RmsNorm {
    fn inverse(&self, row: &[f32]) -> f32 {
        let square: f32 = row.iter().map(|x| x * x).sum();
        1.0 / (square / row.len() as f32 + self.eps).sqrt()
    }
}

impl CustomOp2 for RmsNorm {
    fn name(&self) -> &'static str {
        "rms-norm-with-gradient"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (x, weight) = (slice(x, x_layout)?, slice(weight, weight_layout)?);
        let width = weight.len();
        let mut y = vec![0f32; x.len()];
        let rows = y.par_chunks_mut(width).zip(x.par_chunks(width));
        rows.with_min_len(ROWS).for_each(|(y, x)| {
            let inverse = self.inverse(x);
            for ((y, x), w) in y.iter_mut().zip(x).zip(weight) {
                *y = x * inverse * w;
            }
        });
        Ok((CpuStorage::F32(y), x_layout.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        _: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let width = weight.elem_count();
        let (dx, dw) = values(x, |xs| {
            values(weight, |weight| {
                values(gradient, |dy| {
                    let mut dx = vec![0f32; xs.len()];
                    // Sums over rows are made per chunk of fixed size and added in order, whatever the number of threads.
                    let sums: Vec<Vec<f32>> = dx
                        .par_chunks_mut(ROWS * width)
                        .zip(xs.par_chunks(ROWS * width).zip(dy.par_chunks(ROWS * width)))
                        .map(|(dx, (x, dy))| {
                            let mut dw = vec![0f32; width];
                            let rows = x.chunks(width).zip(dy.chunks(width));
                            for (dx, (x, dy)) in dx.chunks_mut(width).zip(rows) {
                                let inverse = self.inverse(x);
                                let mut dot = 0f32;
                                for (((x, dy), w), dw) in x.iter().zip(dy).zip(weight).zip(&mut dw)
                                {
                                    dot += x * dy * w;
                                    *dw += dy * x * inverse;
                                }
                                let shrink = dot * inverse * inverse * inverse / width as f32;
                                for (((dx, x), dy), w) in dx.iter_mut().zip(x).zip(dy).zip(weight) {
                                    *dx = dy * w * inverse - x * shrink;
                                }
                            }
                            dw
                        })
                        .collect();
                    let mut dw = vec![0f32; width];
                    for sum in sums {
                        dw.iter_mut().zip(sum).for_each(|(dw, part)| *dw += part);
                    }
                    Ok((dx, dw))
                })
            })
        })?;
        Ok((Some(like(x, dx)?), Some(like(weight, dw)?)))
    }
}

/// `silu(gate) * up`.
pub(super) struct SwiGlu;

impl CustomOp2 for SwiGlu {
    fn name(&self) -> &'static str {
        "swiglu-with-gradient"
    }

    fn cpu_fwd(
        &self,
        gate: &CpuStorage,
        layout: &Layout,
        up: &CpuStorage,
        up_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (gate, up) = (slice(gate, layout)?, slice(up, up_layout)?);
        let y = gate.par_iter().zip(up).with_min_len(4096);
        let y = y.map(|(g, u)| g * sigmoid(*g) * u).collect();
        Ok((CpuStorage::F32(y), layout.shape().clone()))
    }

    fn bwd(
        &self,
        gate: &Tensor,
        up: &Tensor,
        _: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (d_gate, d_up): (Vec<f32>, Vec<f32>) = values(gate, |gate| {
            values(up, |up| {
                values(gradient, |dy| {
                    let all = gate.par_iter().zip(up).zip(dy).with_min_len(4096);
                    Ok(all
                        .map(|((g, u), dy)| {
                            let s = sigmoid(*g);
                            (dy * u * s * (1.0 + g * (1.0 - s)), dy * g * s)
                        })
                        .unzip())
                })
            })
        })?;
        Ok((Some(like(gate, d_gate)?), Some(like(up, d_up)?)))
    }
}

fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

/// Largest logit of a row and the logarithm of the sum of exponentials above it.
fn log_sum(row: &[f32]) -> (f32, f32) {
    let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f32 = row.iter().map(|x| (x - max).exp()).sum();
    (max, sum.ln())
}

/// Cross-entropy of every row of logits `[rows, vocabulary]` with its target: `[rows]`, in nats.
pub(super) struct CrossEntropy {
    pub(super) targets: Vec<u32>,
}

impl CustomOp1 for CrossEntropy {
    fn name(&self) -> &'static str {
        "cross-entropy-with-gradient"
    }

    fn cpu_fwd(&self, logits: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let logits = slice(logits, layout)?;
        let rows = logits.par_chunks(logits.len() / self.targets.len());
        let loss: Vec<f32> = rows
            .zip(&self.targets)
            .map(|(row, &target)| {
                let (max, log) = log_sum(row);
                max + log - row[target as usize]
            })
            .collect();
        Ok((CpuStorage::F32(loss), Shape::from(self.targets.len())))
    }

    fn bwd(&self, logits: &Tensor, _: &Tensor, gradient: &Tensor) -> Result<Option<Tensor>> {
        let width = logits.elem_count() / self.targets.len();
        let d = values(logits, |all| {
            values(gradient, |dy| {
                let mut d = vec![0f32; all.len()];
                let rows = d.par_chunks_mut(width).zip(all.par_chunks(width));
                rows.zip(&self.targets)
                    .zip(dy)
                    .for_each(|(((d, row), &target), dy)| {
                        let (max, log) = log_sum(row);
                        for (d, x) in d.iter_mut().zip(row) {
                            *d = dy * (x - max - log).exp();
                        }
                        d[target as usize] -= dy;
                    });
                Ok(d)
            })
        })?;
        Ok(Some(like(logits, d)?))
    }
}
