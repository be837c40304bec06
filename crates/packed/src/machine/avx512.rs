//! AVX-512 with VNNI: a vector is one register.

use std::arch::x86_64::*;

use super::{Kernel, LANES, Machine};
use crate::block::IQ4_NL_LEVELS;

/// Proof that the processor has the instructions.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Avx512(());

impl Avx512 {
    pub(crate) fn detect() -> Option<Self> {
        let has = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512vnni")
            && is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c");
        has.then_some(Self(()))
    }

    /// Runs a kernel compiled for these instructions.
    pub(crate) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
        fn compiled<K: Kernel>(machine: Avx512, kernel: K) -> K::Output {
            kernel.run(machine)
        }
        // SAFETY: `self` exists only where the processor has the features that the function is compiled for.
        unsafe { compiled(self, kernel) }
    }
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

impl Machine for Avx512 {
    type I = __m512i;
    type F = __m512;
    type D = __m512i;
    /// 32 values.
    type Table = [__m512; 2];

    const CENTRED_BYTES: bool = false;
    const WIDE: bool = true;
    const TWO: bool = true;
    const EIGHT: bool = true;
    const STRAIGHT: bool = true;
    const DENSE_ROWS: usize = 4;

    #[inline(always)]
    fn steps(_bits: u32) -> usize {
        usize::MAX
    }
    #[inline(always)]
    fn dot_begin(self, start: __m512i) -> __m512i {
        start
    }
    #[inline(always)]
    fn dot_flush(self, sum: __m512i) -> __m512i {
        sum
    }
    #[inline(always)]
    fn dot_end(self, sum: __m512i) -> __m512i {
        sum
    }

    intrinsics! {
        fn load(self, bytes: &[u8; 64]) -> __m512i {
            _mm512_loadu_si512(bytes.as_ptr().cast())
        }
        fn load_u8(self, bytes: &[u8; LANES]) -> __m512i {
            _mm512_cvtepu8_epi32(_mm_loadu_si128(bytes.as_ptr().cast()))
        }
        fn load_i8(self, bytes: &[u8; LANES]) -> __m512i {
            _mm512_cvtepi8_epi32(_mm_loadu_si128(bytes.as_ptr().cast()))
        }
        fn splat(self, value: i32) -> __m512i {
            _mm512_set1_epi32(value)
        }
        fn and(self, a: __m512i, b: __m512i) -> __m512i {
            _mm512_and_si512(a, b)
        }
        fn or(self, a: __m512i, b: __m512i) -> __m512i {
            _mm512_or_si512(a, b)
        }
        fn shift_right(self, a: __m512i, bits: u32) -> __m512i {
            _mm512_srl_epi32(a, _mm_cvtsi32_si128(bits as i32))
        }
        fn shift_left(self, a: __m512i, bits: u32) -> __m512i {
            _mm512_sll_epi32(a, _mm_cvtsi32_si128(bits as i32))
        }
        fn add_i(self, a: __m512i, b: __m512i) -> __m512i {
            _mm512_add_epi32(a, b)
        }
        fn mul_i(self, a: __m512i, b: __m512i) -> __m512i {
            _mm512_mullo_epi32(a, b)
        }
        fn to_f(self, a: __m512i) -> __m512 {
            _mm512_cvtepi32_ps(a)
        }
        fn levels(self, codes: __m512i) -> __m512i {
            let table = IQ4_NL_LEVELS.map(|level| level as u8 ^ 0x80);
            let table = _mm512_broadcast_i32x4(_mm_loadu_si128(table.as_ptr().cast()));
            _mm512_shuffle_epi8(table, codes)
        }
        fn dot(self, sum: __m512i, codes: __m512i, quad: i32, _bits: u32) -> __m512i {
            _mm512_dpbusd_epi32(sum, codes, _mm512_set1_epi32(quad))
        }
        fn splat_f(self, value: f32) -> __m512 {
            _mm512_set1_ps(value)
        }
        fn load_f(self, values: &[f32; LANES]) -> __m512 {
            _mm512_loadu_ps(values.as_ptr())
        }
        fn load_f_bytes(self, bytes: &[u8; 64]) -> __m512 {
            _mm512_loadu_ps(bytes.as_ptr().cast())
        }
        fn load_f16(self, bytes: &[u8; 32]) -> __m512 {
            _mm512_cvtph_ps(_mm256_loadu_si256(bytes.as_ptr().cast()))
        }
        fn bf16_pairs(self, pairs: __m512i) -> [__m512; 2] {
            let high = _mm512_and_si512(pairs, _mm512_set1_epi32(0xffff_0000_u32 as i32));
            [
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(pairs)),
                _mm512_castsi512_ps(high),
            ]
        }
        fn load_bf16(self, bytes: &[u8; 32]) -> __m512 {
            let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(bytes.as_ptr().cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
        }
        fn store_f(self, value: __m512, to: &mut [f32; LANES]) -> () {
            _mm512_storeu_ps(to.as_mut_ptr(), value)
        }
        fn add_f(self, a: __m512, b: __m512) -> __m512 {
            _mm512_add_ps(a, b)
        }
        fn mul_f(self, a: __m512, b: __m512) -> __m512 {
            _mm512_mul_ps(a, b)
        }
        fn fma(self, a: __m512, b: __m512, c: __m512) -> __m512 {
            _mm512_fmadd_ps(a, b, c)
        }
        fn transpose(self, rows: [__m512; LANES]) -> [__m512; LANES] {
            let mut quads = [_mm512_setzero_ps(); LANES];
            for (quads, rows) in quads.chunks_exact_mut(4).zip(rows.chunks_exact(4)) {
                // Four rows: part j of all four lanes of 128 bits, whose columns are j, 4 + j, 8 + j and 12 + j.
                let [low, low2] = [(0, 1), (2, 3)].map(|(a, b)| _mm512_castps_pd(_mm512_unpacklo_ps(rows[a], rows[b])));
                let [high, high2] = [(0, 1), (2, 3)].map(|(a, b)| _mm512_castps_pd(_mm512_unpackhi_ps(rows[a], rows[b])));
                quads[0] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, low2));
                quads[1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, low2));
                quads[2] = _mm512_castpd_ps(_mm512_unpacklo_pd(high, high2));
                quads[3] = _mm512_castpd_ps(_mm512_unpackhi_pd(high, high2));
            }
            let mut columns = [_mm512_setzero_ps(); LANES];
            for j in 0..4 {
                let [a, b, c, d] = [quads[j], quads[4 + j], quads[8 + j], quads[12 + j]];
                let (ab, cd) = (_mm512_shuffle_f32x4::<0x44>(a, b), _mm512_shuffle_f32x4::<0x44>(c, d));
                columns[j] = _mm512_shuffle_f32x4::<0x88>(ab, cd);
                columns[4 + j] = _mm512_shuffle_f32x4::<0xdd>(ab, cd);
                let (ab, cd) = (_mm512_shuffle_f32x4::<0xee>(a, b), _mm512_shuffle_f32x4::<0xee>(c, d));
                columns[8 + j] = _mm512_shuffle_f32x4::<0x88>(ab, cd);
                columns[12 + j] = _mm512_shuffle_f32x4::<0xdd>(ab, cd);
            }
            columns
        }
        fn reduce(self, a: __m512) -> f32 {
            let high = _mm512_castps512_ps256(_mm512_shuffle_f32x4::<0b11_10_11_10>(a, a));
            let eight = _mm256_add_ps(_mm512_castps512_ps256(a), high);
            let four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps::<1>(two, two)))
        }
        fn table(self, bits: u32, zero: i32) -> [__m512; 2] {
            let mask = if bits >= 5 { 31 } else { (1 << bits) - 1 };
            // Other bits of an index are ignored by repeating the values.
            let low: [f32; 16] = std::array::from_fn(|i| ((i as i32 & mask) - zero) as f32);
            let high: [f32; 16] = std::array::from_fn(|i| (((i as i32 + 16) & mask) - zero) as f32);
            match bits <= 5 {
                true => [_mm512_loadu_ps(low.as_ptr()), _mm512_loadu_ps(high.as_ptr())],
                false => [_mm512_set1_ps(-zero as f32); 2],
            }
        }
        fn value(self, lanes: __m512i, shift: u32, bits: u32, table: [__m512; 2]) -> __m512 {
            let lanes = match shift {
                0 => lanes,
                _ => _mm512_srl_epi32(lanes, _mm_cvtsi32_si128(shift as i32)),
            };
            match bits {
                0..=4 => _mm512_permutexvar_ps(lanes, table[0]),
                5 => _mm512_permutex2var_ps(table[0], lanes, table[1]),
                _ => {
                    let codes = _mm512_and_si512(lanes, _mm512_set1_epi32((1 << bits) - 1));
                    _mm512_add_ps(_mm512_cvtepi32_ps(codes), table[0])
                }
            }
        }
    }
}
