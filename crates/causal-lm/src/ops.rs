//! Element-wise steps between the matrix products, fused and multi-threaded on the CPU.
//!
//! candle runs these single-threaded and one operation at a time; beside its GEMM they would take
//! a third of a block. Every element is computed alone, so results do not depend on threads.

use crate::{Error, Result};
use candle_core::{CpuStorage, DType, Device, Storage, Tensor};
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
                .for_each(|(out, (gate, up))| {
                    pulp::Arch::new().dispatch(|| {
                        for ((out, &g), &u) in out.iter_mut().zip(gate).zip(up) {
                            *out = g / (1.0 + exp(-g)) * u;
                        }
                    });
                });
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
                pulp::Arch::new().dispatch(|| {
                    let max = row.iter().fold(f32::NEG_INFINITY, |a, &b| a.max(b));
                    // Partial sums of 64 in f32, then f64: as exact as f64 throughout and vectorised.
                    let sum: f64 = row
                        .chunks(64)
                        .map(|c| c.iter().map(|&x| exp(x - max)).sum::<f32>() as f64)
                        .sum();
                    sum.ln() + f64::from(max) - f64::from(row[target as usize])
                })
            })
            .collect()
    })
}

/// Index of the first element that is not finite, if any.
pub(crate) fn first_non_finite(x: &Tensor) -> Result<Option<usize>> {
    let finite = |chunk: &[f32]| {
        pulp::Arch::new().dispatch(|| chunk.iter().fold(0.0f32, |a, &b| a + b * 0.0) == 0.0)
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

/// e^x within 2 ulp for x ≤ 88; smaller than the least normal number becomes 0 or nearly so.
///
/// Branch-free, so that loops over it vectorise: x = k ln 2 + r with |r| ≤ ln 2 / 2, and e^r by its
/// Taylor series to the sixth power (remainder below 1.2e-7 · 2^-1 relative).
#[inline(always)]
fn exp(x: f32) -> f32 {
    /// Adding this moves the integer part of a small f32 into its low mantissa bits.
    const SHIFT: f32 = 12_582_912.0; // 1.5 * 2^23
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let x = x.clamp(-87.0, 88.0);
    let shifted = x * std::f32::consts::LOG2_E + SHIFT;
    let k = shifted - SHIFT;
    let r = x - k * LN2_HIGH - k * LN2_LOW;
    let series = 1.0
        + r * (1.0
            + r * (0.5
                + r * (1.0 / 6.0 + r * (1.0 / 24.0 + r * (1.0 / 120.0 + r * (1.0 / 720.0))))));
    let exponent = (shifted.to_bits() as i32)
        .wrapping_sub(SHIFT.to_bits() as i32)
        .wrapping_add(127);
    series * f32::from_bits((exponent << 23) as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_agrees_with_the_standard_library_over_its_range() {
        for i in -87_000..=88_000 {
            let x = i as f32 / 1000.0;
            let (ours, reference) = (exp(x), f64::from(x).exp());
            assert!(
                (f64::from(ours) / reference - 1.0).abs() < 3e-7,
                "exp({x}) = {ours}, not {reference}"
            );
        }
    }

    #[test]
    fn silu_mul_agrees_with_candle() {
        let device = Device::Cpu;
        let gate = Tensor::randn(0f32, 4.0, (37, 1000), &device).unwrap();
        let up = Tensor::randn(0f32, 1.0, (37, 1000), &device).unwrap();
        let ours = silu_mul(&gate, &up).unwrap();
        let reference = (gate.silu().unwrap() * up).unwrap();
        let gap = (ours - reference)
            .unwrap()
            .abs()
            .unwrap()
            .max_all()
            .unwrap()
            .to_scalar::<f32>()
            .unwrap();
        assert!(gap < 1e-5, "{gap}");
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
