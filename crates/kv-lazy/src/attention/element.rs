//! The element types a cache can store, all computed with in f32.

use super::machine::widen_f16;
use half::{bf16, f16};

/// A storage element: widened blockwise to f32 before arithmetic.
pub(crate) trait Element: candle_core::WithDType + Default + std::fmt::Debug {
    /// The values of `source` as f32, in `scratch` unless they are f32 already.
    /// `scratch` is at least as long as `source`.
    fn widen<'a>(source: &'a [Self], scratch: &'a mut [f32]) -> &'a [f32];
    /// f32 values needed as scratch to widen `len` elements.
    fn scratch(len: usize) -> usize;
}

impl Element for f32 {
    #[inline(always)]
    fn widen<'a>(source: &'a [Self], _: &'a mut [f32]) -> &'a [f32] {
        source
    }
    fn scratch(_: usize) -> usize {
        0
    }
}

impl Element for f16 {
    #[inline(always)]
    fn widen<'a>(source: &'a [Self], scratch: &'a mut [f32]) -> &'a [f32] {
        let scratch = &mut scratch[..source.len()];
        if !widen_f16(source, scratch) {
            widen_bits(source, scratch);
        }
        scratch
    }
    fn scratch(len: usize) -> usize {
        len
    }
}

/// Widening without an instruction for it: moving the bits into place and scaling by the difference of the exponent biases is exact for
/// normal and subnormal numbers; what has all exponent bits set keeps them set. This form compiles to vector code.
#[inline(always)]
fn widen_bits(source: &[f16], wide: &mut [f32]) {
    const REBIAS: f32 = f32::from_bits((127 + 127 - 15) << 23);
    for (wide, narrow) in wide.iter_mut().zip(source) {
        let bits = u32::from(narrow.to_bits());
        let magnitude = (bits & 0x7fff) << 13;
        let scaled = (f32::from_bits(magnitude) * REBIAS).to_bits();
        let special = if bits & 0x7c00 == 0x7c00 {
            0x7f80_0000
        } else {
            0
        };
        *wide = f32::from_bits(scaled | special | (bits & 0x8000) << 16);
    }
}

impl Element for bf16 {
    // Shifting the bits up is the whole conversion; this form compiles to vector code.
    #[inline(always)]
    fn widen<'a>(source: &'a [Self], scratch: &'a mut [f32]) -> &'a [f32] {
        let scratch = &mut scratch[..source.len()];
        for (wide, narrow) in scratch.iter_mut().zip(source) {
            *wide = f32::from_bits(u32::from(narrow.to_bits()) << 16);
        }
        scratch
    }
    fn scratch(len: usize) -> usize {
        len
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn same(narrow: f32, wide: f32) -> bool {
        narrow == wide || (narrow.is_nan() && wide.is_nan())
    }

    #[test]
    fn every_half_precision_number_widens_to_itself_with_and_without_an_instruction() {
        let all: Vec<u16> = (0..=u16::MAX).collect();
        let mut wide = vec![0.0; all.len()];
        let halves: Vec<f16> = all.iter().map(|&bits| f16::from_bits(bits)).collect();
        for (narrow, wide) in halves.iter().zip(f16::widen(&halves, &mut wide)) {
            assert!(same(narrow.to_f32(), *wide), "{narrow:?} {wide}");
        }
        widen_bits(&halves, &mut wide);
        for (narrow, wide) in halves.iter().zip(&wide) {
            assert!(same(narrow.to_f32(), *wide), "{narrow:?} {wide}");
        }
        let halves: Vec<bf16> = all.iter().map(|&bits| bf16::from_bits(bits)).collect();
        for (narrow, wide) in halves.iter().zip(bf16::widen(&halves, &mut wide)) {
            assert!(same(narrow.to_f32(), *wide), "{narrow:?} {wide}");
        }
    }
}
