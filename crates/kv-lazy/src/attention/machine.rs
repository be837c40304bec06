//! Two instructions that safe code cannot name: prefetching, and widening f16. The only unsafe code of the crate.
//!
//! Both change speed alone: without them, on other machines, the caller computes the same.

use half::f16;

/// Asks for the cache line of `at`, which will be read soon.
#[inline(always)]
pub(super) fn prefetch<T>(at: &T) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: the instruction is part of every x86-64, reads nothing the program can see and never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(std::ptr::from_ref(at).cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

/// Widens `source` into `wide`, equally long, with the machine's own instruction; false, and nothing done, where it has none.
pub(super) fn widen_f16(source: &[f16], wide: &mut [f32]) -> bool {
    #[cfg(target_arch = "x86_64")]
    if std::is_x86_feature_detected!("avx") && std::is_x86_feature_detected!("f16c") {
        // SAFETY: the machine has the two features that the function is compiled for.
        unsafe { widen_f16c(source, wide) };
        return true;
    }
    let _ = (source, wide);
    false
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx,f16c")]
fn widen_f16c(source: &[f16], wide: &mut [f32]) {
    use std::arch::x86_64::{_mm_loadu_si128, _mm256_cvtph_ps, _mm256_storeu_ps};
    let (eights, rest) = source.as_chunks::<8>();
    let (wide_eights, wide_rest) = wide.as_chunks_mut::<8>();
    for (narrow, wide) in eights.iter().zip(wide_eights) {
        // SAFETY: eight f16 are the 16 bytes read, eight f32 the 32 bytes written; neither need be aligned.
        unsafe {
            let narrow = _mm_loadu_si128(narrow.as_ptr().cast());
            _mm256_storeu_ps(wide.as_mut_ptr(), _mm256_cvtph_ps(narrow));
        }
    }
    for (narrow, wide) in rest.iter().zip(wide_rest) {
        *wide = narrow.to_f32();
    }
}
