//! Element-wise steps between the matrix products, fused and multi-threaded on the CPU.
//!
//! candle runs these single-threaded and one operation at a time; beside its GEMM they would take
//! a third of a block. Every element is computed alone, so results do not depend on threads.

use crate::config::Activation;
use crate::{Error, Result};
use candle_core::cpu::erf::erf_f32;
use candle_core::{CpuStorage, DType, Device, Storage, Tensor};
use kv_lazy::attention::{exp, softcap_in_place};
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

/// Elements handed to a thread at once: large enough to hide the hand-over, small enough for L2.
const CHUNK: usize = 16 * 1024;

/// `act(x) * factor`, the activation of an MLP, or `act(x)` alone; both of one shape.
pub(crate) fn activate(
    activation: Activation,
    x: &Tensor,
    factor: Option<&Tensor>,
) -> Result<Tensor> {
    if !matches!(x.device(), Device::Cpu) || x.dtype() != DType::F32 {
        let y = match activation {
            Activation::Silu => x.silu()?,
            Activation::GeluTanh => x.gelu()?,
            Activation::GeluErf => x.gelu_erf()?,
        };
        return Ok(match factor {
            Some(factor) => (y * factor)?,
            None => y,
        });
    }
    let mut out = vec![0f32; x.elem_count()];
    with_f32(x, |x| {
        let compute = |out: &mut [f32], x: &[f32]| match activation {
            Activation::Silu => Arch::new().dispatch(Gate {
                x,
                out,
                gelu: false,
            }),
            Activation::GeluTanh => Arch::new().dispatch(Gate { x, out, gelu: true }),
            Activation::GeluErf => {
                for (out, &x) in out.iter_mut().zip(x) {
                    *out = 0.5 * x * (1.0 + erf_f32(x * std::f32::consts::FRAC_1_SQRT_2));
                }
            }
        };
        let chunks = out.par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK));
        match factor {
            None => {
                chunks.for_each(|(out, x)| compute(out, x));
                Ok(())
            }
            Some(factor) => with_f32(factor, |factor| {
                chunks
                    .zip(factor.par_chunks(CHUNK))
                    .for_each(|((out, x), factor)| {
                        compute(out, x);
                        out.iter_mut().zip(factor).for_each(|(y, u)| *y *= u);
                    });
            }),
        }
    })??;
    Ok(Tensor::from_vec(out, x.shape(), x.device())?)
}

/// SiLU of each element of `x`.
pub(crate) fn silu(x: &[f32], out: &mut [f32]) {
    let chunks = out.par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK));
    chunks.for_each(|(out, x)| {
        Arch::new().dispatch(Gate {
            x,
            out,
            gelu: false,
        });
    });
}

/// `x` squeezed into ± `cap`: `cap · tanh(x / cap)`.
pub(crate) fn softcap(x: &Tensor, cap: f64) -> Result<Tensor> {
    if !matches!(x.device(), Device::Cpu) || x.dtype() != DType::F32 {
        return Ok(((x / cap)?.tanh()? * cap)?);
    }
    let cap = cap as f32;
    let mut out = vec![0f32; x.elem_count()];
    with_f32(x, |x| {
        out.par_chunks_mut(CHUNK)
            .zip(x.par_chunks(CHUNK))
            .for_each(|(out, x)| {
                out.copy_from_slice(x);
                Arch::new().dispatch(Cap { out, cap });
            });
    })?;
    Ok(Tensor::from_vec(out, x.shape(), x.device())?)
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
                let max = row.iter().fold(f32::NEG_INFINITY, |a, &b| a.max(b));
                sum_exp(row, max).ln() + f64::from(max) - f64::from(row[target as usize])
            })
            .collect()
    })
}

/// Σ exp(x − max) of values that are at most `max`; those of −∞ count nothing, a NaN makes the sum NaN.
pub fn sum_exp(values: &[f32], max: f32) -> f64 {
    Arch::new().dispatch(SumExp { values, max })
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

/// `x σ(z)` with z = x, or for GELU in its tanh form z = 2 √(2/π) (x + 0.044715 x³).
struct Gate<'a> {
    x: &'a [f32],
    out: &'a mut [f32],
    gelu: bool,
}

/// 2 √(2/π).
const GELU: f32 = 1.595_769;
/// Weight of the cube in it.
const CUBE: f32 = 0.044_715;

impl WithSimd for Gate<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let (xs, x_tail) = S::as_simd_f32s(self.x);
        let (outs, out_tail) = S::as_mut_simd_f32s(self.out);
        let (one, most) = (simd.splat_f32s(1.0), simd.splat_f32s(EXP_MOST));
        let (gelu, cube) = (simd.splat_f32s(GELU), simd.splat_f32s(CUBE));
        for (out, &x) in outs.iter_mut().zip(xs) {
            let z = if self.gelu {
                let inner = simd.mul_add_f32s(simd.mul_f32s(cube, simd.mul_f32s(x, x)), x, x);
                simd.mul_f32s(gelu, inner)
            } else {
                x
            };
            let e = exp(simd, simd.min_f32s(simd.neg_f32s(z), most));
            *out = simd.div_f32s(x, simd.add_f32s(one, e));
        }
        for (out, &x) in out_tail.iter_mut().zip(x_tail) {
            let z = if self.gelu {
                GELU * (x + CUBE * x * x * x)
            } else {
                x
            };
            *out = x / (1.0 + (-z).min(EXP_MOST).exp());
        }
    }
}

/// Squeezes values into ± a cap.
struct Cap<'a> {
    out: &'a mut [f32],
    cap: f32,
}

impl WithSimd for Cap<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        softcap_in_place(simd, self.out, self.cap);
    }
}

/// Largest argument of [`exp`].
const EXP_MOST: f32 = 88.0;

struct SumExp<'a> {
    values: &'a [f32],
    max: f32,
}

impl WithSimd for SumExp<'_> {
    type Output = f64;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> f64 {
        let offset = simd.splat_f32s(self.max);
        let mut sum = 0.0;
        // Partial sums of 64 in f32, then f64: as exact as f64 throughout.
        for part in self.values.chunks(64) {
            let (head, tail) = S::as_simd_f32s(part);
            let mut partial = simd.splat_f32s(0.0);
            for &x in head {
                partial = simd.add_f32s(partial, exp(simd, simd.sub_f32s(x, offset)));
            }
            sum += f64::from(simd.reduce_sum_f32s(partial));
            for x in tail {
                sum += f64::from((x - self.max).exp());
            }
        }
        sum
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Values of both signs and every size, the same in every run.
    fn values(count: usize, spread: f32) -> Tensor {
        let value = |i: usize| ((i * 7919 % 10_007) as f32 / 5003.5 - 1.0) * spread;
        Tensor::from_iter((0..count).map(value), &Device::Cpu).unwrap()
    }

    fn gap(a: &Tensor, b: &Tensor) -> f32 {
        let gap = (a - b).unwrap().abs().unwrap();
        gap.max_all().unwrap().to_scalar().unwrap()
    }

    #[test]
    fn activations_are_exact_to_a_few_units_in_the_last_place() {
        // An odd number of values, so that some fill no vector.
        let xs: Vec<f32> = (0..40_001).map(|i| (i - 20_000) as f32 * 0.005).collect();
        let factors: Vec<f32> = (0..xs.len()).map(|i| (i as f32 * 0.37).sin()).collect();
        let tensor = |values: &[f32]| Tensor::new(values, &Device::Cpu).unwrap();
        let silu = |x: f64| x / (1.0 + (-x).exp());
        let gelu_tanh = |x: f64| {
            let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x * x * x);
            x / (1.0 + (-2.0 * inner).exp())
        };
        let exact: [(Activation, &dyn Fn(f64) -> f64); 2] = [
            (Activation::Silu, &silu),
            (Activation::GeluTanh, &gelu_tanh),
        ];
        for (activation, exact) in exact {
            let found = activate(activation, &tensor(&xs), Some(&tensor(&factors))).unwrap();
            let found: Vec<f32> = found.to_vec1().unwrap();
            for ((&x, &factor), found) in xs.iter().zip(&factors).zip(found) {
                let (x, factor, found) = (f64::from(x), f64::from(factor), f64::from(found));
                let exact = exact(x) * factor;
                // A relative error of the exponent counts as often as the exponent is large; below -88 it is held at
                // the largest argument that f32 can take.
                let exponent = if activation == Activation::Silu {
                    1.0
                } else {
                    1.0 + x.abs().powi(3)
                };
                let slack = if activation == Activation::Silu && x >= -88.0 {
                    0.0
                } else {
                    1e-35
                };
                assert!(
                    (found - exact).abs() <= 6e-7 * exponent * exact.abs() + slack,
                    "{activation:?} {x} {factor}: {found}, exactly {exact}"
                );
            }
        }
    }

    #[test]
    fn activations_are_those_of_candle_with_and_without_a_factor() {
        let count = 2 * CHUNK + 37;
        let (x, factor) = (values(count, 12.0), values(count, 2.0).neg().unwrap());
        for (activation, reference) in [
            (Activation::Silu, x.silu().unwrap()),
            (Activation::GeluTanh, x.gelu().unwrap()),
            (Activation::GeluErf, x.gelu_erf().unwrap()),
        ] {
            let alone = activate(activation, &x, None).unwrap();
            assert!(gap(&alone, &reference) < 5e-6, "{activation:?}");
            let both = activate(activation, &x, Some(&factor)).unwrap();
            let expected = (reference * &factor).unwrap();
            assert!(gap(&both, &expected) < 1e-5, "{activation:?}");
        }
    }

    #[test]
    fn a_cap_is_a_scaled_tanh() {
        let x = values(CHUNK + 37, 200.0);
        let expected = ((&x / 30.0).unwrap().tanh().unwrap() * 30.0).unwrap();
        assert!(gap(&softcap(&x, 30.0).unwrap(), &expected) < 1e-5);
    }

    #[test]
    fn cross_entropy_of_equal_logits_is_the_log_of_their_number() {
        let logits = Tensor::full(3f32, (2, 500), &Device::Cpu).unwrap();
        for nll in cross_entropy(&logits, &[0, 499]).unwrap() {
            assert!((nll - 500f64.ln()).abs() < 1e-6);
        }
    }

    #[test]
    fn a_sum_of_exponentials_leaves_out_what_is_minus_infinity_and_keeps_nan() {
        let mut values: Vec<f32> = (0..200).map(|i| -0.1 * i as f32).collect();
        let exact: f64 = values.iter().map(|&x| f64::from(x).exp()).sum();
        assert!((sum_exp(&values, 0.0) - exact).abs() < 1e-6 * exact);
        values[0] = f32::NEG_INFINITY;
        assert!((sum_exp(&values, 0.0) - (exact - 1.0)).abs() < 1e-6 * exact);
        values[7] = f32::NAN;
        assert!(sum_exp(&values, 0.0).is_nan());
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
