//! Instructions that portable vectors lack: prefetching, widening f16, and summing the lanes of many vectors at once.
//!
//! They change speed alone: without them, on other machines, the caller computes the same. The only unsafe code of the crate is here.

use pulp::Simd;

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

/// The lane sums of eight vectors, each in the order of `reduce_sum_f32s`, which would take twice as many instructions; none without
/// AVX2 or AVX-512.
#[inline(always)]
pub(super) fn sum_eight<S: Simd>(simd: S, vectors: &[S::f32s; 8]) -> Option<[f32; 8]> {
    #[cfg(target_arch = "x86_64")]
    {
        let simd: &dyn std::any::Any = &simd;
        if let Some(simd) = simd.downcast_ref::<pulp::x86::V3>() {
            return Some(x86::sum_eight(*simd, pulp::bytemuck::cast(*vectors)));
        }
        if let Some(simd) = simd.downcast_ref::<pulp::x86::V4>() {
            return Some(x86::sum_eight_wide(*simd, pulp::bytemuck::cast(*vectors)));
        }
    }
    let _ = (simd, vectors);
    None
}

#[cfg(target_arch = "x86_64")]
pub(crate) use x86::{F16c, WideF16};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::super::element::{Element, Kernel, Widen};
    use half::f16;
    use pulp::bytemuck;
    use pulp::x86::{V3, V4};
    use pulp::{Simd, WithSimd};
    use std::arch::x86_64::{__m128i, __m256, __m256i, __m512, __m512d, _mm256_cvtph_ps};

    #[inline(always)]
    pub(super) fn sum_eight_wide(simd: V4, v: [__m512; 8]) -> [f32; 8] {
        let avx512 = simd.avx512f;
        // Halves of vectors 0 and 4, 1 and 5, 2 and 6, 3 and 7.
        let mut halves = [v[0]; 4];
        for i in 0..4 {
            let (x, y): (__m512d, __m512d) = (bytemuck::cast(v[i]), bytemuck::cast(v[i + 4]));
            let low = avx512._mm512_shuffle_f64x2::<0b01_00_01_00>(x, y);
            let high = avx512._mm512_shuffle_f64x2::<0b11_10_11_10>(x, y);
            halves[i] = avx512._mm512_add_ps(bytemuck::cast(low), bytemuck::cast(high));
        }
        // Quarters of 0, 4, 2, 6 and of 1, 5, 3, 7.
        let mut quarters = [v[0]; 2];
        for i in 0..2 {
            let (x, y) = (halves[i], halves[i + 2]);
            let low = avx512._mm512_shuffle_f32x4::<0b10_00_10_00>(x, y);
            let high = avx512._mm512_shuffle_f32x4::<0b11_01_11_01>(x, y);
            quarters[i] = avx512._mm512_add_ps(low, high);
        }
        let [x, y] = quarters;
        let low = avx512._mm512_shuffle_ps::<0b01_00_01_00>(x, y);
        let high = avx512._mm512_shuffle_ps::<0b11_10_11_10>(x, y);
        let pairs = avx512._mm512_add_ps(low, high);
        let swapped = avx512._mm512_permute_ps::<0b10_11_00_01>(pairs);
        let sums = avx512._mm512_add_ps(pairs, swapped);
        let order = [0u32, 2, 8, 10, 4, 6, 12, 14, 0, 0, 0, 0, 0, 0, 0, 0];
        let sums = avx512._mm512_permutexvar_ps(bytemuck::cast(order), sums);
        let [sums, _]: [[f32; 8]; 2] = bytemuck::cast(sums);
        sums
    }

    #[inline(always)]
    pub(super) fn sum_eight(simd: V3, v: [__m256; 8]) -> [f32; 8] {
        let avx = simd.avx;
        // Lanes 0..4 come from the first four vectors, the others from the last.
        let mut halves = [v[0]; 4];
        for i in 0..4 {
            let low = avx._mm256_permute2f128_ps::<0x20>(v[i], v[i + 4]);
            let high = avx._mm256_permute2f128_ps::<0x31>(v[i], v[i + 4]);
            halves[i] = avx._mm256_add_ps(low, high);
        }
        let mut quarters = [v[0]; 2];
        for i in 0..2 {
            let (x, y) = (halves[2 * i], halves[2 * i + 1]);
            let low = avx._mm256_shuffle_ps::<0b01_00_01_00>(x, y);
            let high = avx._mm256_shuffle_ps::<0b11_10_11_10>(x, y);
            quarters[i] = avx._mm256_add_ps(low, high);
        }
        let [x, y] = quarters;
        let even = avx._mm256_shuffle_ps::<0b10_00_10_00>(x, y);
        let odd = avx._mm256_shuffle_ps::<0b11_01_11_01>(x, y);
        bytemuck::cast(avx._mm256_add_ps(even, odd))
    }

    /// A kernel over f16 on a machine with AVX-512.
    pub(crate) struct WideF16<K>(pub(crate) K, pub(crate) V4);

    impl<K: Kernel<f16>> WithSimd for WideF16<K> {
        type Output = ();

        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) {
            self.0.run(simd, self.1);
        }
    }

    impl Widen<f16> for V4 {
        const INTERLEAVED: bool = false;

        #[inline(always)]
        fn widen<S: Simd>(self, _: S, pack: &<f16 as Element>::Pack<S>) -> [S::f32s; 2] {
            let [low, high]: [__m256i; 2] = bytemuck::cast(*pack);
            let wide = [low, high].map(|half| self.avx512f._mm512_cvtph_ps(half));
            bytemuck::cast(wide)
        }
    }

    /// Proof that the machine has AVX2 and the instruction that widens f16.
    #[derive(Clone, Copy)]
    pub(crate) struct F16c(V3);

    impl F16c {
        pub(crate) fn detect() -> Option<Self> {
            let simd = V3::try_new()?;
            std::is_x86_feature_detected!("f16c").then_some(Self(simd))
        }

        /// Runs `kernel` compiled for this machine.
        pub(crate) fn run(self, kernel: impl Kernel<f16>) {
            #[target_feature(enable = "avx2,fma,bmi1,bmi2,lzcnt,popcnt,f16c")]
            fn compiled(machine: F16c, kernel: impl Kernel<f16>) {
                kernel.run(machine.0, machine);
            }
            // SAFETY: `self` proves that the machine has the features that the function is compiled for.
            unsafe { compiled(self, kernel) }
        }
    }

    impl Widen<f16> for F16c {
        const INTERLEAVED: bool = false;

        #[inline(always)]
        fn widen<S: Simd>(self, _: S, pack: &<f16 as Element>::Pack<S>) -> [S::f32s; 2] {
            let [low, high]: [__m128i; 2] = bytemuck::cast(*pack);
            // SAFETY: `self` proves that the machine has the instruction.
            let (low, high) = unsafe { (_mm256_cvtph_ps(low), _mm256_cvtph_ps(high)) };
            [bytemuck::cast(low), bytemuck::cast(high)]
        }
    }
}
