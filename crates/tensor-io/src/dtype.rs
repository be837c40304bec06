//! Conversion between stored bytes and floating-point elements.
//!
//! Bytes are little endian and need not be aligned. Everything goes in blocks that stay in the first-level cache:
//! bytes or elements are widened (f16, bf16 and f32 to f32; f64 stays), narrowed to the target with one rounding to
//! nearest even, and checked to be finite on the way, so that a tensor is passed over once. Blocks run in parallel;
//! a reported position is the first in row-major order whatever the number of threads.

use candle_core::{DType, WithDType};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use rayon::prelude::*;
use safetensors::Dtype;

/// Elements per block: 1 KiB of f32.
const BLOCK: usize = 256;

/// Elements per parallel task.
const TASK: usize = 128 * BLOCK;

/// A value that must not be in a tensor of weights.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct BadValue {
    /// Position in row-major order.
    pub(crate) element: usize,
    /// The value before conversion: not finite, or finite and too large for the target.
    pub(crate) value: f64,
}

/// A floating-point element, stored in little endian.
pub(crate) trait Float: WithDType {
    const BYTES: usize;
    const ZERO: Self;

    fn from_le(bytes: &[u8]) -> Self;
    fn to_le(self, bytes: &mut [u8]);
    fn finite(self) -> bool;
    fn narrow_f32(from: &[f32], to: &mut [Self]);
    fn narrow_f64(from: &[f64], to: &mut [Self]);

    /// Converts at most [`BLOCK`] elements.
    fn convert<T: Float>(from: &[Self], to: &mut [T]);
}

impl Float for f32 {
    const BYTES: usize = 4;
    const ZERO: Self = 0.0;

    fn from_le(bytes: &[u8]) -> Self {
        Self::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
    }
    fn to_le(self, bytes: &mut [u8]) {
        bytes.copy_from_slice(&self.to_le_bytes());
    }
    fn finite(self) -> bool {
        self.is_finite()
    }
    fn narrow_f32(from: &[f32], to: &mut [Self]) {
        to.copy_from_slice(from);
    }
    fn narrow_f64(from: &[f64], to: &mut [Self]) {
        for (to, &from) in to.iter_mut().zip(from) {
            *to = from as f32;
        }
    }
    fn convert<T: Float>(from: &[Self], to: &mut [T]) {
        T::narrow_f32(from, to);
    }
}

impl Float for f64 {
    const BYTES: usize = 8;
    const ZERO: Self = 0.0;

    fn from_le(bytes: &[u8]) -> Self {
        let mut array = [0; 8];
        array.copy_from_slice(bytes);
        Self::from_le_bytes(array)
    }
    fn to_le(self, bytes: &mut [u8]) {
        bytes.copy_from_slice(&self.to_le_bytes());
    }
    fn finite(self) -> bool {
        self.is_finite()
    }
    fn narrow_f32(from: &[f32], to: &mut [Self]) {
        for (to, &from) in to.iter_mut().zip(from) {
            *to = f64::from(from);
        }
    }
    fn narrow_f64(from: &[f64], to: &mut [Self]) {
        to.copy_from_slice(from);
    }
    fn convert<T: Float>(from: &[Self], to: &mut [T]) {
        T::narrow_f64(from, to);
    }
}

impl Float for f16 {
    const BYTES: usize = 2;
    const ZERO: Self = f16::ZERO;

    fn from_le(bytes: &[u8]) -> Self {
        Self::from_le_bytes([bytes[0], bytes[1]])
    }
    fn to_le(self, bytes: &mut [u8]) {
        bytes.copy_from_slice(&self.to_le_bytes());
    }
    fn finite(self) -> bool {
        self.to_bits() & 0x7C00 != 0x7C00
    }
    fn narrow_f32(from: &[f32], to: &mut [Self]) {
        to.convert_from_f32_slice(from);
    }
    fn narrow_f64(from: &[f64], to: &mut [Self]) {
        for (to, &from) in to.iter_mut().zip(from) {
            *to = f16::from_f32(round_to_odd(from));
        }
    }
    fn convert<T: Float>(from: &[Self], to: &mut [T]) {
        let mut wide = [0f32; BLOCK];
        let wide = &mut wide[..from.len()];
        from.convert_to_f32_slice(wide);
        T::narrow_f32(wide, to);
    }
}

impl Float for bf16 {
    const BYTES: usize = 2;
    const ZERO: Self = bf16::ZERO;

    fn from_le(bytes: &[u8]) -> Self {
        Self::from_le_bytes([bytes[0], bytes[1]])
    }
    fn to_le(self, bytes: &mut [u8]) {
        bytes.copy_from_slice(&self.to_le_bytes());
    }
    fn finite(self) -> bool {
        self.to_bits() & 0x7F80 != 0x7F80
    }
    fn narrow_f32(from: &[f32], to: &mut [Self]) {
        // As half's conversion, but without branches, so that it becomes vector code: adding just under half a unit in
        // the last place, or half where that place is odd, rounds to nearest even. NaN, which would overflow, stays NaN.
        for (to, &from) in to.iter_mut().zip(from) {
            let bits = from.to_bits();
            let rounded = bits.wrapping_add(0x7FFF + (bits >> 16 & 1)) >> 16;
            *to = bf16::from_bits(if from.is_nan() {
                0x7FC0
            } else {
                rounded as u16
            });
        }
    }
    fn narrow_f64(from: &[f64], to: &mut [Self]) {
        for (to, &from) in to.iter_mut().zip(from) {
            *to = bf16::from_f32(round_to_odd(from));
        }
    }
    fn convert<T: Float>(from: &[Self], to: &mut [T]) {
        let mut wide = [0f32; BLOCK];
        let wide = &mut wide[..from.len()];
        // The upper half of an f32; unlike half's conversion without a branch for NaN, which is refused later anyway.
        for (wide, from) in wide.iter_mut().zip(from) {
            *wide = f32::from_bits(u32::from(from.to_bits()) << 16);
        }
        T::narrow_f32(wide, to);
    }
}

/// f64 to f32 such that a second rounding, to 16 bits, is as good as one: a value between two f32 becomes the one with
/// an odd mantissa, which can never look like a tie (Boldo and Melquiond, "Emulation of FMA and correctly rounded sums:
/// proved algorithms using rounding to odd", 2008).
fn round_to_odd(x: f64) -> f32 {
    let nearest = x as f32;
    let back = f64::from(nearest);
    if back == x || x.is_nan() || nearest.to_bits() & 1 == 1 {
        nearest
    } else if back.abs() < x.abs() {
        f32::from_bits(nearest.to_bits() + 1)
    } else {
        f32::from_bits(nearest.to_bits() - 1)
    }
}

/// The candle dtype in which a stored tensor is read, where there is one; booleans are read as bytes.
pub(crate) fn candle_dtype(stored: Dtype) -> Option<DType> {
    match stored {
        Dtype::BOOL => Some(DType::U8),
        Dtype::F4 | Dtype::F6_E2M3 | Dtype::F6_E3M2 | Dtype::F8_E8M0 => None,
        other => DType::try_from(other).ok(),
    }
}

/// True for the dtypes that [`decode`] and [`encode`] know.
pub(crate) fn is_float(dtype: Dtype) -> bool {
    matches!(dtype, Dtype::F16 | Dtype::BF16 | Dtype::F32 | Dtype::F64)
}

/// Reads `bytes` of dtype `stored` as elements of `T`.
///
/// # Errors
/// The first value that is not finite as a `T`.
///
/// # Panics
/// If `stored` is no float or `bytes` are not whole elements: callers have checked both.
pub(crate) fn decode<T: Float>(stored: Dtype, bytes: &[u8]) -> Result<Vec<T>, BadValue> {
    match stored {
        Dtype::F16 => decode_from::<f16, T>(bytes),
        Dtype::BF16 => decode_from::<bf16, T>(bytes),
        Dtype::F32 => decode_from::<f32, T>(bytes),
        Dtype::F64 => decode_from::<f64, T>(bytes),
        other => unreachable!("callers decode floats only, not {other}"),
    }
}

/// The first value of `bytes` of dtype `stored` that is not finite; none of dtypes that are no floats.
pub(crate) fn first_not_finite(stored: Dtype, bytes: &[u8]) -> Option<BadValue> {
    match stored {
        Dtype::F16 => first_not_finite_of::<f16>(bytes),
        Dtype::BF16 => first_not_finite_of::<bf16>(bytes),
        Dtype::F32 => first_not_finite_of::<f32>(bytes),
        Dtype::F64 => first_not_finite_of::<f64>(bytes),
        _ => None,
    }
}

fn first_not_finite_of<S: Float>(bytes: &[u8]) -> Option<BadValue> {
    let of_task = |(task, bytes): (usize, &[u8])| {
        let mut elements = bytes.chunks_exact(S::BYTES).map(S::from_le);
        let bad = elements.position(|element| !element.finite())?;
        Some(task * TASK + bad)
    };
    let tasks = bytes.par_chunks(TASK * S::BYTES).enumerate();
    let element = tasks.filter_map(of_task).min()?;
    let value = S::from_le(&bytes[element * S::BYTES..]).to_f64();
    Some(BadValue { element, value })
}

fn decode_from<S: Float, T: Float>(bytes: &[u8]) -> Result<Vec<T>, BadValue> {
    let mut elements = vec![T::ZERO; bytes.len() / S::BYTES];
    let first_bad = elements
        .par_chunks_mut(TASK)
        .zip(bytes.par_chunks(TASK * S::BYTES))
        .enumerate()
        .filter_map(|(task, (to, from))| {
            let bad = decode_task::<S, T>(from, to)?;
            Some(task * TASK + bad)
        })
        .min();
    match first_bad {
        None => Ok(elements),
        Some(element) => {
            let value = S::from_le(&bytes[element * S::BYTES..][..S::BYTES]).to_f64();
            Err(BadValue { element, value })
        }
    }
}

/// Converts one task's share; the first element that is not finite, if any.
fn decode_task<S: Float, T: Float>(bytes: &[u8], to: &mut [T]) -> Option<usize> {
    let mut block = [S::ZERO; BLOCK];
    let mut finite = true;
    for (to, bytes) in to.chunks_mut(BLOCK).zip(bytes.chunks(BLOCK * S::BYTES)) {
        if S::DTYPE == T::DTYPE {
            read_le(bytes, to);
        } else {
            let block = &mut block[..to.len()];
            read_le(bytes, block);
            S::convert(block, to);
        }
        finite &= all_finite(to);
    }
    if finite { None } else { first_bad(to) }
}

fn read_le<T: Float>(bytes: &[u8], to: &mut [T]) {
    for (element, bytes) in to.iter_mut().zip(bytes.chunks_exact(T::BYTES)) {
        *element = T::from_le(bytes);
    }
}

/// Writes `elements` as bytes of dtype `stored`, appending to `bytes`.
///
/// # Errors
/// The first value that is not finite in the stored dtype.
///
/// # Panics
/// If `stored` is no float: callers have checked it.
pub(crate) fn encode<S: Float>(
    elements: &[S],
    stored: Dtype,
    bytes: &mut Vec<u8>,
) -> Result<(), BadValue> {
    match stored {
        Dtype::F16 => encode_as::<S, f16>(elements, bytes),
        Dtype::BF16 => encode_as::<S, bf16>(elements, bytes),
        Dtype::F32 => encode_as::<S, f32>(elements, bytes),
        Dtype::F64 => encode_as::<S, f64>(elements, bytes),
        other => unreachable!("callers encode floats only, not {other}"),
    }
}

fn encode_as<S: Float, T: Float>(elements: &[S], bytes: &mut Vec<u8>) -> Result<(), BadValue> {
    let start = bytes.len();
    bytes.resize(start + elements.len() * T::BYTES, 0);
    let first_bad = bytes[start..]
        .par_chunks_mut(TASK * T::BYTES)
        .zip(elements.par_chunks(TASK))
        .enumerate()
        .filter_map(|(task, (to, from))| {
            let bad = encode_task::<S, T>(from, to)?;
            Some(task * TASK + bad)
        })
        .min();
    match first_bad {
        None => Ok(()),
        Some(element) => Err(BadValue {
            element,
            value: elements[element].to_f64(),
        }),
    }
}

fn encode_task<S: Float, T: Float>(elements: &[S], bytes: &mut [u8]) -> Option<usize> {
    let mut block = [T::ZERO; BLOCK];
    for (i, (from, bytes)) in elements
        .chunks(BLOCK)
        .zip(bytes.chunks_mut(BLOCK * T::BYTES))
        .enumerate()
    {
        let block = &mut block[..from.len()];
        S::convert(from, block);
        if !all_finite(block) {
            return first_bad(block).map(|bad| i * BLOCK + bad);
        }
        for (element, bytes) in block.iter().zip(bytes.chunks_exact_mut(T::BYTES)) {
            element.to_le(bytes);
        }
    }
    None
}

/// Without an early exit, so that it becomes vector code.
fn all_finite<T: Float>(elements: &[T]) -> bool {
    elements.iter().fold(true, |all, x| all & x.finite())
}

fn first_bad<T: Float>(elements: &[T]) -> Option<usize> {
    elements.iter().position(|x| !x.finite())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes_of<T: Float>(elements: &[T]) -> Vec<u8> {
        let mut bytes = vec![0; elements.len() * T::BYTES];
        for (element, bytes) in elements.iter().zip(bytes.chunks_exact_mut(T::BYTES)) {
            element.to_le(bytes);
        }
        bytes
    }

    /// The neighbour of `x` that is nearest, ties to the even mantissa, found among all 16-bit floats by distance.
    fn nearest<T: Float>(x: f64, from_bits: fn(u16) -> T) -> T {
        let key = |bits: u16| {
            let distance = (from_bits(bits).to_f64() - x).abs();
            (distance, bits & 1)
        };
        let best = (0..=u16::MAX)
            .filter(|&bits| {
                from_bits(bits).finite()
                    && from_bits(bits).to_f64().is_sign_negative() == x.is_sign_negative()
            })
            .min_by(|&a, &b| key(a).partial_cmp(&key(b)).unwrap())
            .unwrap();
        from_bits(best)
    }

    #[test]
    fn all_16_bit_floats_survive_every_wider_dtype() {
        fn check<T: Float>(stored: Dtype, from_bits: fn(u16) -> T) {
            let all: Vec<T> = (0..=u16::MAX)
                .map(from_bits)
                .filter(|x| x.finite())
                .collect();
            let bytes = bytes_of(&all);
            assert_eq!(bytes_of(&decode::<T>(stored, &bytes).unwrap()), bytes);
            for wide in [Dtype::F32, Dtype::F64] {
                let mut widened = Vec::new();
                encode(&all, wide, &mut widened).unwrap();
                assert_eq!(
                    bytes_of(&decode::<T>(wide, &widened).unwrap()),
                    bytes,
                    "{wide}"
                );
            }
            for (x, exact) in decode::<f32>(stored, &bytes).unwrap().iter().zip(&all) {
                assert_eq!(f64::from(*x), exact.to_f64());
            }
        }
        check::<f16>(Dtype::F16, f16::from_bits);
        check::<bf16>(Dtype::BF16, bf16::from_bits);
    }

    #[test]
    fn narrowing_rounds_once_to_nearest_even() {
        // Ties, values just off a tie (in the last bits of an f64, which a rounding by way of f32 loses), subnormals.
        let tie_f16 = 1.0 + 2f64.powi(-11);
        let tie_bf16 = 1.0 + 2f64.powi(-8);
        let mut values = vec![0.0, 1.0, 1.0 / 3.0, 6e-8, 3e-8, 1e-7, 1e-40, 65_504.0, 0.1];
        for tie in [
            tie_f16,
            3.0 * tie_f16 / 2.0,
            1.0 + 3.0 * 2f64.powi(-11),
            tie_bf16,
            1.0 + 3.0 * 2f64.powi(-8),
        ] {
            values.extend([
                tie,
                tie.next_up(),
                tie.next_down(),
                tie + 2f64.powi(-30),
                tie - 2f64.powi(-30),
            ]);
        }
        values.extend(values.clone().iter().map(|x| -x));
        let halves = decode::<f16>(Dtype::F64, &bytes_of(&values)).unwrap();
        let brains = decode::<bf16>(Dtype::F64, &bytes_of(&values)).unwrap();
        for ((&x, half), brain) in values.iter().zip(halves).zip(brains) {
            assert_eq!(
                half.to_bits(),
                nearest(x, f16::from_bits).to_bits(),
                "f16 of {x:e}"
            );
            assert_eq!(
                brain.to_bits(),
                nearest(x, bf16::from_bits).to_bits(),
                "bf16 of {x:e}"
            );
            let single = x as f32;
            let mut encoded = Vec::new();
            encode(&[single], Dtype::BF16, &mut encoded).unwrap();
            assert_eq!(
                bf16::from_le(&encoded),
                nearest(f64::from(single), bf16::from_bits),
                "bf16 of {single:e}"
            );
        }
    }

    #[test]
    fn narrowing_to_bf16_agrees_with_half_for_every_upper_half() {
        for upper in 0..=u16::MAX {
            let lower = [0u32, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF];
            let values = lower.map(|lower| f32::from_bits(u32::from(upper) << 16 | lower));
            let mut narrowed = [bf16::ZERO; 6];
            bf16::narrow_f32(&values, &mut narrowed);
            for (narrowed, value) in narrowed.iter().zip(values) {
                let expected = bf16::from_f32(value);
                let same = narrowed.to_bits() == expected.to_bits();
                assert!(same || narrowed.is_nan() && expected.is_nan(), "{value:e}");
            }
        }
    }

    #[test]
    fn the_first_bad_element_is_found_across_tasks() {
        for first in [0, 1, BLOCK, TASK - 1, TASK, 3 * TASK + 5] {
            let mut values = vec![1f32; 3 * TASK + 7];
            values[first] = f32::INFINITY;
            values[3 * TASK + 6] = f32::NAN;
            let bad = BadValue {
                element: first,
                value: f64::INFINITY,
            };
            assert_eq!(
                decode::<f64>(Dtype::F32, &bytes_of(&values)).unwrap_err(),
                bad
            );
            assert_eq!(
                encode(&values, Dtype::F16, &mut Vec::new()).unwrap_err(),
                bad
            );
        }
    }
}
