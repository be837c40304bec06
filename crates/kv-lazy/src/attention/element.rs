//! The element types a cache can store, all computed with in f32.

use half::slice::HalfFloatSliceExt;
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
        source.convert_to_f32_slice(scratch);
        scratch
    }
    fn scratch(len: usize) -> usize {
        len
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
