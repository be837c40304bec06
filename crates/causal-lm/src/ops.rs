//! Element-wise steps between the matrix products, fused and multi-threaded on the CPU.
//!
//! candle runs these single-threaded and one operation at a time; beside its GEMM they would take
//! a third of a block. Every element is computed alone, so results do not depend on threads.

use crate::{Error, Result};
use candle_core::{CpuStorage, DType, Device, Storage, Tensor};
use kv_lazy::attention::exp;
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

/// Elements handed to a thread at once: large enough to hide the hand-over, small enough for L2.
const CHUNK: usize = 16 * 1024;

/// `silu(gate) * up`, the activation of the MLP; both of one shape.
pub(crate) fn silu_mul(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    if !matches!(gate.device(), Device::Cpu) || gate.dtype() != DType::F32 {
        return Ok((gate.silu()? * up)?);
    }
    let mut out = vec![0f32; gate.elem_count()];
    with_f32(gate, |gate| {
        with_f32(up, |up| {
            out.par_chunks_mut(CHUNK)
                .zip(gate.par_chunks(CHUNK).zip(up.par_chunks(CHUNK)))
                .for_each(|(out, (gate, up))| Arch::new().dispatch(SiluMul { gate, up, out }));
        })
    })??;
    Ok(Tensor::from_vec(out, gate.shape(), gate.device())?)
}

/// Cross-entropy `ln Σ exp(logits) - logits[target]` of each row, in nats; `logits` is `[rows, vocab]`, with a target
/// for each row.
///
/// # Errors
/// [`Error::TokenOutOfRange`] for a target that is not in the vocabulary.
pub fn cross_entropy(logits: &Tensor, targets: &[u32]) -> Result<Vec<f64>> {
    let vocab = logits.dim(1)?;
    if let Some(&token) = targets.iter().find(|&&target| target as usize >= vocab) {
        return Err(Error::TokenOutOfRange { token, vocab });
    }
    let logits = logits.to_dtype(DType::F32)?.to_device(&Device::Cpu)?;
    with_f32(&logits, |logits| {
        logits
            .par_chunks(vocab)
            .zip(targets.par_iter())
            .map(|(row, &target)| {
                let (sum, max) = Arch::new().dispatch(SumExp { row });
                sum.ln() + f64::from(max) - f64::from(row[target as usize])
            })
            .collect()
    })
}

/// Index of the first element that is not finite, in row-major order.
///
/// # Errors
/// When the device refuses to hand the tensor over.
pub fn first_non_finite(x: &Tensor) -> Result<Option<usize>> {
    let finite = |chunk: &[f32]| {
        Arch::new().dispatch(|| chunk.iter().fold(0.0f32, |a, &b| a + b * 0.0) == 0.0)
    };
    with_f32(
        &x.to_dtype(DType::F32)?.to_device(&Device::Cpu)?,
        |values| {
            let chunk = values
                .par_chunks(CHUNK)
                .position_first(|chunk| !finite(chunk))?;
            let start = chunk * CHUNK;
            values[start..]
                .iter()
                .position(|v| !v.is_finite())
                .map(|i| start + i)
        },
    )
}

/// Calls `f` with the elements of an f32 CPU tensor, copying only when it is not contiguous.
pub(crate) fn with_f32<R>(x: &Tensor, f: impl FnOnce(&[f32]) -> R) -> Result<R> {
    let x = x.contiguous()?;
    let (storage, layout) = x.storage_and_layout();
    match &*storage {
        Storage::Cpu(CpuStorage::F32(values)) => {
            let start = layout.start_offset();
            Ok(f(&values[start..start + layout.shape().elem_count()]))
        }
        _ => Err(candle_core::Error::Msg("an f32 tensor on the CPU is needed here".into()).into()),
    }
}

struct SiluMul<'a> {
    gate: &'a [f32],
    up: &'a [f32],
    out: &'a mut [f32],
}

impl WithSimd for SiluMul<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let (gates, gate_tail) = S::as_simd_f32s(self.gate);
        let (ups, up_tail) = S::as_simd_f32s(self.up);
        let (outs, out_tail) = S::as_mut_simd_f32s(self.out);
        let (one, most) = (simd.splat_f32s(1.0), simd.splat_f32s(EXP_MOST));
        for ((out, &g), &u) in outs.iter_mut().zip(gates).zip(ups) {
            let e = exp(simd, simd.min_f32s(simd.neg_f32s(g), most));
            *out = simd.mul_f32s(simd.div_f32s(g, simd.add_f32s(one, e)), u);
        }
        for ((out, &g), &u) in out_tail.iter_mut().zip(gate_tail).zip(up_tail) {
            *out = g / (1.0 + (-g).min(EXP_MOST).exp()) * u;
        }
    }
}

/// Largest argument of [`exp`].
const EXP_MOST: f32 = 88.0;

struct SumExp<'a> {
    row: &'a [f32],
}

impl WithSimd for SumExp<'_> {
    /// Σ exp(x − max) and max.
    type Output = (f64, f32);

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> (f64, f32) {
        let max = self.row.iter().fold(f32::NEG_INFINITY, |a, &b| a.max(b));
        let offset = simd.splat_f32s(max);
        let mut sum = 0.0;
        // Partial sums of 64 in f32, then f64: as exact as f64 throughout.
        for part in self.row.chunks(64) {
            let (head, tail) = S::as_simd_f32s(part);
            let mut partial = simd.splat_f32s(0.0);
            for &x in head {
                partial = simd.add_f32s(partial, exp(simd, simd.sub_f32s(x, offset)));
            }
            sum += f64::from(simd.reduce_sum_f32s(partial));
            for x in tail {
                sum += f64::from((x - max).exp());
            }
        }
        (sum, max)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silu_mul_is_exact_to_a_few_units_in_the_last_place() {
        // An odd number of values, so that some fill no vector.
        let gates: Vec<f32> = (0..40_001).map(|i| (i - 20_000) as f32 * 0.005).collect();
        let ups: Vec<f32> = (0..gates.len()).map(|i| (i as f32 * 0.37).sin()).collect();
        let tensor = |values: &[f32]| Tensor::new(values, &Device::Cpu).unwrap();
        let found = silu_mul(&tensor(&gates), &tensor(&ups)).unwrap();
        let found: Vec<f32> = found.to_vec1().unwrap();
        for ((&gate, &up), found) in gates.iter().zip(&ups).zip(found) {
            let (gate, up, found) = (f64::from(gate), f64::from(up), f64::from(found));
            let exact = gate / (1.0 + (-gate).exp()) * up;
            // Below -88 the exponential is held at the largest argument that f32 can take.
            let slack = if gate < -88.0 { 1e-35 } else { 0.0 };
            assert!(
                (found - exact).abs() <= 6e-7 * exact.abs() + slack,
                "{gate} {up}: {found}, exactly {exact}"
            );
        }
    }

    #[test]
    fn cross_entropy_of_equal_logits_is_the_log_of_their_number() {
        let logits = Tensor::full(3f32, (2, 500), &Device::Cpu).unwrap();
        for nll in cross_entropy(&logits, &[0, 499]).unwrap() {
            assert!((nll - 500f64.ln()).abs() < 1e-6);
        }
    }

    #[test]
    fn the_first_non_finite_element_is_found_across_chunks() {
        let mut values = vec![1f32; 3 * CHUNK];
        assert_eq!(
            first_non_finite(&Tensor::new(values.clone(), &Device::Cpu).unwrap()).unwrap(),
            None
        );
        values[2 * CHUNK + 5] = f32::NAN;
        values[2 * CHUNK + 1] = f32::NEG_INFINITY;
        let found = first_non_finite(&Tensor::new(values, &Device::Cpu).unwrap()).unwrap();
        assert_eq!(found, Some(2 * CHUNK + 1));
    }
}
