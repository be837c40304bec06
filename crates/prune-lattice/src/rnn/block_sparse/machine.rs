//! The vector operations that the kernels are written in: AVX2 with FMA where the processor has them, arrays elsewhere.

/// Vectors of eight floats and of eight 32-bit integers. A value of the type is the proof that the processor has the
/// instructions.
pub(super) trait Machine: Copy {
    /// Eight floats.
    type F: Copy;
    /// Eight integers.
    type I: Copy;

    /// The same float in all lanes.
    fn splat(self, value: f32) -> Self::F;
    /// One float in the lower four lanes, another in the upper four.
    fn halves(self, low: f32, high: f32) -> Self::F;
    /// Eight floats from memory.
    fn load(self, values: &[f32; 8]) -> Self::F;
    /// `a * b + c`
    fn mul_add(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// `a + b`
    fn add(self, a: Self::F, b: Self::F) -> Self::F;
    /// The lanes.
    fn floats(self, value: Self::F) -> [f32; 8];

    /// The same integer in all lanes.
    fn splat_i(self, value: i32) -> Self::I;
    /// One integer in the lower four lanes, another in the upper four.
    fn halves_i(self, low: i32, high: i32) -> Self::I;
    /// Adds to each lane `l` the products of the codes `2 l` and `2 l + 1` with the two halves (16 bits each) of lane `l` of
    /// `inputs`.
    fn add_pairs(self, sums: Self::I, codes: &[i8; 16], inputs: Self::I) -> Self::I;
    /// `a + b`
    fn add_i(self, a: Self::I, b: Self::I) -> Self::I;
    /// The lanes.
    fn integers(self, value: Self::I) -> [i32; 8];
}

/// Something to be compiled for each machine. `run` must be `#[inline(always)]`.
pub(super) trait Kernel {
    fn run<M: Machine>(self, machine: M);
}

/// Runs a kernel on the best machine there is.
pub(super) fn dispatch(kernel: impl Kernel) {
    #[cfg(target_arch = "x86_64")]
    if let Some(simd) = pulp::x86::V3::try_new() {
        x86::run(simd, kernel);
        return;
    }
    kernel.run(Portable);
}

/// Without special instructions.
#[derive(Clone, Copy)]
pub(super) struct Portable;

impl Machine for Portable {
    type F = [f32; 8];
    type I = [i32; 8];

    #[inline(always)]
    fn splat(self, value: f32) -> [f32; 8] {
        [value; 8]
    }
    #[inline(always)]
    fn halves(self, low: f32, high: f32) -> [f32; 8] {
        std::array::from_fn(|l| if l < 4 { low } else { high })
    }
    #[inline(always)]
    fn load(self, values: &[f32; 8]) -> [f32; 8] {
        *values
    }
    #[inline(always)]
    fn mul_add(self, a: [f32; 8], b: [f32; 8], c: [f32; 8]) -> [f32; 8] {
        std::array::from_fn(|l| a[l] * b[l] + c[l])
    }
    #[inline(always)]
    fn add(self, a: [f32; 8], b: [f32; 8]) -> [f32; 8] {
        std::array::from_fn(|l| a[l] + b[l])
    }
    #[inline(always)]
    fn floats(self, value: [f32; 8]) -> [f32; 8] {
        value
    }
    #[inline(always)]
    fn splat_i(self, value: i32) -> [i32; 8] {
        [value; 8]
    }
    #[inline(always)]
    fn halves_i(self, low: i32, high: i32) -> [i32; 8] {
        std::array::from_fn(|l| if l < 4 { low } else { high })
    }
    #[inline(always)]
    fn add_pairs(self, sums: [i32; 8], codes: &[i8; 16], inputs: [i32; 8]) -> [i32; 8] {
        std::array::from_fn(|l| {
            let (first, second) = (inputs[l] as i16, (inputs[l] >> 16) as i16);
            sums[l]
                + i32::from(codes[2 * l]) * i32::from(first)
                + i32::from(codes[2 * l + 1]) * i32::from(second)
        })
    }
    #[inline(always)]
    fn add_i(self, a: [i32; 8], b: [i32; 8]) -> [i32; 8] {
        std::array::from_fn(|l| a[l] + b[l])
    }
    #[inline(always)]
    fn integers(self, value: [i32; 8]) -> [i32; 8] {
        value
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{Kernel, Machine};
    use pulp::{Simd, WithSimd, cast, x86::V3};
    use std::arch::x86_64::{__m128i, __m256, __m256i};

    struct Run<K> {
        kernel: K,
        machine: V3,
    }

    impl<K: Kernel> WithSimd for Run<K> {
        type Output = ();
        #[inline(always)]
        fn with_simd<S: Simd>(self, _: S) {
            self.kernel.run(self.machine);
        }
    }

    /// Runs a kernel compiled for AVX2.
    pub(super) fn run(machine: V3, kernel: impl Kernel) {
        Simd::vectorize(machine, Run { kernel, machine });
    }

    impl Machine for V3 {
        type F = __m256;
        type I = __m256i;

        #[inline(always)]
        fn splat(self, value: f32) -> __m256 {
            self.avx._mm256_set1_ps(value)
        }
        #[inline(always)]
        fn halves(self, low: f32, high: f32) -> __m256 {
            let (low, high) = (self.splat(low), self.splat(high));
            self.avx._mm256_blend_ps::<0b1111_0000>(low, high)
        }
        #[inline(always)]
        fn load(self, values: &[f32; 8]) -> __m256 {
            cast(*values)
        }
        #[inline(always)]
        fn mul_add(self, a: __m256, b: __m256, c: __m256) -> __m256 {
            self.fma._mm256_fmadd_ps(a, b, c)
        }
        #[inline(always)]
        fn add(self, a: __m256, b: __m256) -> __m256 {
            self.avx._mm256_add_ps(a, b)
        }
        #[inline(always)]
        fn floats(self, value: __m256) -> [f32; 8] {
            cast(value)
        }
        #[inline(always)]
        fn splat_i(self, value: i32) -> __m256i {
            self.avx._mm256_set1_epi32(value)
        }
        #[inline(always)]
        fn halves_i(self, low: i32, high: i32) -> __m256i {
            let (low, high) = (self.splat_i(low), self.splat_i(high));
            self.avx2._mm256_blend_epi32::<0b1111_0000>(low, high)
        }
        #[inline(always)]
        fn add_pairs(self, sums: __m256i, codes: &[i8; 16], inputs: __m256i) -> __m256i {
            let codes = self.avx2._mm256_cvtepi8_epi16(cast::<_, __m128i>(*codes));
            let products = self.avx2._mm256_madd_epi16(codes, inputs);
            self.avx2._mm256_add_epi32(sums, products)
        }
        #[inline(always)]
        fn add_i(self, a: __m256i, b: __m256i) -> __m256i {
            self.avx2._mm256_add_epi32(a, b)
        }
        #[inline(always)]
        fn integers(self, value: __m256i) -> [i32; 8] {
            cast(value)
        }
    }
}
