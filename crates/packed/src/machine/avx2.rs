//! AVX2 with FMA and F16C, and the same with the byte products of AVX-VNNI: a vector is two registers.

use std::arch::x86_64::*;

use super::{Kernel, LANES, Machine};
use crate::block::IQ4_NL_LEVELS;

/// Proof that the processor has the instructions.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Avx2(());

/// Proof that the processor has the instructions, AVX-VNNI among them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AvxVnni(Avx2);

impl Avx2 {
    pub(crate) fn detect() -> Option<Self> {
        let has = is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c");
        has.then_some(Self(()))
    }

    /// Runs a kernel compiled for these instructions.
    pub(crate) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        #[target_feature(enable = "avx2,fma,f16c")]
        fn compiled<K: Kernel>(machine: Avx2, kernel: K) -> K::Output {
            kernel.run(machine)
        }
        // SAFETY: `self` exists only where the processor has the features that the function is compiled for.
        unsafe { compiled(self, kernel) }
    }
}

impl AvxVnni {
    pub(crate) fn detect() -> Option<Self> {
        let avx2 = Avx2::detect()?;
        is_x86_feature_detected!("avxvnni").then_some(Self(avx2))
    }

    /// Without AVX-VNNI.
    pub(crate) fn avx2(self) -> Avx2 {
        self.0
    }

    /// Runs a kernel compiled for these instructions.
    pub(crate) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        #[target_feature(enable = "avx2,fma,f16c,avxvnni")]
        fn compiled<K: Kernel>(machine: AvxVnni, kernel: K) -> K::Output {
            kernel.run(machine)
        }
        // SAFETY: `self` exists only where the processor has the features that the function is compiled for.
        unsafe { compiled(self, kernel) }
    }
}

type Ints = [__m256i; 2];
type Floats = [__m256; 2];

/// Sums of 32 bits, and sums of 16 bits that wait to be added to them.
#[derive(Clone, Copy)]
pub(crate) struct Sums {
    wide: Ints,
    narrow: Ints,
}

/// Methods whose bodies are intrinsics.
macro_rules! intrinsics {
    ($(fn $name:ident($self:ident $(, $arg:ident: $ty:ty)*) -> $out:ty $body:block)*) => { $(
        #[inline(always)]
        fn $name($self $(, $arg: $ty)*) -> $out {
            // SAFETY: `self` exists only where the processor has the instructions (`detect`), and the loads and stores
            // among them go through references to arrays of their width and need no alignment.
            unsafe { $body }
        }
    )* };
}

/// What both machines share.
macro_rules! shared {
    () => {
        type I = Ints;
        type F = Floats;
        /// What is added to a code.
        type Table = __m256;

        const WIDE: bool = false;
        const TWO: bool = true;
        const EIGHT: bool = false;
        const STRAIGHT: bool = true;
        const DENSE_ROWS: usize = 2;

        intrinsics! {
            fn load(self, bytes: &[u8; 64]) -> Ints {
                let at: *const __m256i = bytes.as_ptr().cast();
                [_mm256_loadu_si256(at), _mm256_loadu_si256(at.add(1))]
            }
            fn load_u8(self, bytes: &[u8; LANES]) -> Ints {
                let bytes = _mm_loadu_si128(bytes.as_ptr().cast());
                [_mm256_cvtepu8_epi32(bytes), _mm256_cvtepu8_epi32(_mm_unpackhi_epi64(bytes, bytes))]
            }
            fn load_i8(self, bytes: &[u8; LANES]) -> Ints {
                let bytes = _mm_loadu_si128(bytes.as_ptr().cast());
                [_mm256_cvtepi8_epi32(bytes), _mm256_cvtepi8_epi32(_mm_unpackhi_epi64(bytes, bytes))]
            }
            fn splat(self, value: i32) -> Ints {
                [_mm256_set1_epi32(value); 2]
            }
            fn and(self, a: Ints, b: Ints) -> Ints {
                [_mm256_and_si256(a[0], b[0]), _mm256_and_si256(a[1], b[1])]
            }
            fn or(self, a: Ints, b: Ints) -> Ints {
                [_mm256_or_si256(a[0], b[0]), _mm256_or_si256(a[1], b[1])]
            }
            fn shift_right(self, a: Ints, bits: u32) -> Ints {
                let bits = _mm_cvtsi32_si128(bits as i32);
                [_mm256_srl_epi32(a[0], bits), _mm256_srl_epi32(a[1], bits)]
            }
            fn shift_left(self, a: Ints, bits: u32) -> Ints {
                let bits = _mm_cvtsi32_si128(bits as i32);
                [_mm256_sll_epi32(a[0], bits), _mm256_sll_epi32(a[1], bits)]
            }
            fn add_i(self, a: Ints, b: Ints) -> Ints {
                [_mm256_add_epi32(a[0], b[0]), _mm256_add_epi32(a[1], b[1])]
            }
            fn mul_i(self, a: Ints, b: Ints) -> Ints {
                [_mm256_mullo_epi32(a[0], b[0]), _mm256_mullo_epi32(a[1], b[1])]
            }
            fn to_f(self, a: Ints) -> Floats {
                [_mm256_cvtepi32_ps(a[0]), _mm256_cvtepi32_ps(a[1])]
            }
            fn levels(self, codes: Ints) -> Ints {
                let table = IQ4_NL_LEVELS.map(|level| level as u8 ^ 0x80);
                let table = _mm256_broadcastsi128_si256(_mm_loadu_si128(table.as_ptr().cast()));
                [_mm256_shuffle_epi8(table, codes[0]), _mm256_shuffle_epi8(table, codes[1])]
            }
            fn splat_f(self, value: f32) -> Floats {
                [_mm256_set1_ps(value); 2]
            }
            fn load_f(self, values: &[f32; LANES]) -> Floats {
                [_mm256_loadu_ps(values.as_ptr()), _mm256_loadu_ps(values.as_ptr().add(8))]
            }
            fn load_f_bytes(self, bytes: &[u8; 64]) -> Floats {
                let at: *const f32 = bytes.as_ptr().cast();
                [_mm256_loadu_ps(at), _mm256_loadu_ps(at.add(8))]
            }
            fn load_f16(self, bytes: &[u8; 32]) -> Floats {
                let at: *const __m128i = bytes.as_ptr().cast();
                [_mm256_cvtph_ps(_mm_loadu_si128(at)), _mm256_cvtph_ps(_mm_loadu_si128(at.add(1)))]
            }
            fn bf16_pairs(self, pairs: Ints) -> [Floats; 2] {
                let mask = _mm256_set1_epi32(0xffff_0000_u32 as i32);
                let [a, b] = pairs;
                [
                    [
                        _mm256_castsi256_ps(_mm256_slli_epi32::<16>(a)),
                        _mm256_castsi256_ps(_mm256_slli_epi32::<16>(b)),
                    ],
                    [
                        _mm256_castsi256_ps(_mm256_and_si256(a, mask)),
                        _mm256_castsi256_ps(_mm256_and_si256(b, mask)),
                    ],
                ]
            }
            fn load_bf16(self, bytes: &[u8; 32]) -> Floats {
                let at: *const __m128i = bytes.as_ptr().cast();
                let a = _mm256_cvtepu16_epi32(_mm_loadu_si128(at));
                let b = _mm256_cvtepu16_epi32(_mm_loadu_si128(at.add(1)));
                [
                    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(a)),
                    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(b)),
                ]
            }
            fn store_f(self, value: Floats, to: &mut [f32; LANES]) -> () {
                _mm256_storeu_ps(to.as_mut_ptr(), value[0]);
                _mm256_storeu_ps(to.as_mut_ptr().add(8), value[1]);
            }
            fn add_f(self, a: Floats, b: Floats) -> Floats {
                [_mm256_add_ps(a[0], b[0]), _mm256_add_ps(a[1], b[1])]
            }
            fn mul_f(self, a: Floats, b: Floats) -> Floats {
                [_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])]
            }
            fn fma(self, a: Floats, b: Floats, c: Floats) -> Floats {
                [_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])]
            }
            fn reduce(self, a: Floats) -> f32 {
                let eight = _mm256_add_ps(a[0], a[1]);
                let four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
                let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
                _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps::<1>(two, two)))
            }
            fn table(self, _bits: u32, zero: i32) -> __m256 {
                _mm256_set1_ps(-zero as f32)
            }
            fn value(self, lanes: Ints, shift: u32, bits: u32, minus_zero: __m256) -> Floats {
                let mask = _mm256_set1_epi32((1 << bits) - 1);
                let shift = _mm_cvtsi32_si128(shift as i32);
                let a = _mm256_and_si256(_mm256_srl_epi32(lanes[0], shift), mask);
                let b = _mm256_and_si256(_mm256_srl_epi32(lanes[1], shift), mask);
                [
                    _mm256_add_ps(_mm256_cvtepi32_ps(a), minus_zero),
                    _mm256_add_ps(_mm256_cvtepi32_ps(b), minus_zero),
                ]
            }
        }
    };
}

impl Machine for Avx2 {
    shared!();

    type D = Sums;
    const CENTRED_BYTES: bool = true;

    /// Steps of two products each, of codes up to 2^bits − 1 (8 bits: magnitudes up to 128) and bytes up to 127, that
    /// 16 bits hold.
    #[inline(always)]
    fn steps(bits: u32) -> usize {
        match bits {
            0..=4 => 8,
            5 => 4,
            6 => 2,
            _ => 1,
        }
    }

    intrinsics! {
        fn dot_begin(self, start: Ints) -> Sums {
            Sums { wide: start, narrow: [_mm256_setzero_si256(); 2] }
        }
        fn dot(self, sum: Sums, codes: Ints, quad: i32, bits: u32) -> Sums {
            let quad = _mm256_set1_epi32(quad);
            let [a, b] = codes;
            let (a, b) = match bits {
                0..=7 => (_mm256_maddubs_epi16(a, quad), _mm256_maddubs_epi16(b, quad)),
                // One factor must be unsigned: the magnitude of the code, its sign moved to the other.
                _ => {
                    let middle = _mm256_set1_epi8(-128);
                    let (a, b) = (_mm256_xor_si256(a, middle), _mm256_xor_si256(b, middle));
                    (
                        _mm256_maddubs_epi16(_mm256_abs_epi8(a), _mm256_sign_epi8(quad, a)),
                        _mm256_maddubs_epi16(_mm256_abs_epi8(b), _mm256_sign_epi8(quad, b)),
                    )
                }
            };
            let narrow = [_mm256_add_epi16(sum.narrow[0], a), _mm256_add_epi16(sum.narrow[1], b)];
            Sums { narrow, ..sum }
        }
        fn dot_flush(self, sum: Sums) -> Sums {
            let ones = _mm256_set1_epi16(1);
            let [a, b] = sum.narrow;
            let wide = [
                _mm256_add_epi32(sum.wide[0], _mm256_madd_epi16(a, ones)),
                _mm256_add_epi32(sum.wide[1], _mm256_madd_epi16(b, ones)),
            ];
            Sums { wide, narrow: [_mm256_setzero_si256(); 2] }
        }
    }
    #[inline(always)]
    fn dot_end(self, sum: Sums) -> Ints {
        sum.wide
    }
}

impl Machine for AvxVnni {
    shared!();

    type D = Ints;
    const CENTRED_BYTES: bool = false;

    #[inline(always)]
    fn steps(_bits: u32) -> usize {
        usize::MAX
    }
    #[inline(always)]
    fn dot_begin(self, start: Ints) -> Ints {
        start
    }
    #[inline(always)]
    fn dot_flush(self, sum: Ints) -> Ints {
        sum
    }
    #[inline(always)]
    fn dot_end(self, sum: Ints) -> Ints {
        sum
    }
    intrinsics! {
        fn dot(self, sum: Ints, codes: Ints, quad: i32, _bits: u32) -> Ints {
            let quad = _mm256_set1_epi32(quad);
            [
                _mm256_dpbusd_avx_epi32(sum[0], codes[0], quad),
                _mm256_dpbusd_avx_epi32(sum[1], codes[1], quad),
            ]
        }
    }
}
