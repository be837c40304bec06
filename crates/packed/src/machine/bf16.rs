//! Sums of products of brain floats, two columns at once.
//!
//! A step adds the product of the odd columns and then that of the even ones, each rounded once to f32, to nearest, with
//! subnormal results as zeros: what AVX512-BF16 computes.

use crate::level::Level;
use crate::tile::TILE_ROWS;

/// Two tiles.
pub(crate) const WIDTH: usize = 2 * TILE_ROWS;

/// The bits of a value rounded to nearest in the upper half of 32; subnormal values are zeros.
#[inline(always)]
fn rounded(value: f32) -> u32 {
    let bits = value.to_bits();
    match bits & 0x7fff_ffff {
        0..0x0080_0000 => bits & 0x8000_0000,
        0x0080_0000..=0x7f80_0000 => bits.wrapping_add(0x7fff + (bits >> 16 & 1)),
        _ => bits | 0x0040_0000,
    }
}

/// Two columns: the even one in the lower half.
#[inline(always)]
pub(crate) fn pair(even: f32, odd: f32) -> u32 {
    rounded(even) >> 16 | rounded(odd) & 0xffff_0000
}

/// The sums of two tiles for some tokens over pairs of columns.
#[inline(always)]
pub(crate) fn products<const T: usize>(
    level: Level,
    panel: &[[u32; WIDTH]],
    x: &[[u32; T]],
) -> [[f32; WIDTH]; T] {
    #[cfg(target_arch = "x86_64")]
    if let (Level::Avx512, Some(machine)) = (level, avx512::Avx512Bf16::detect()) {
        return machine.products(panel, x);
    }
    let _ = level;
    let mut sums = [[0.0; WIDTH]; T];
    for (w, x) in panel.iter().zip(x) {
        for (sums, &x) in sums.iter_mut().zip(x) {
            for (sum, &w) in sums.iter_mut().zip(w) {
                *sum = step(*sum, w, x);
            }
        }
    }
    sums
}

#[inline(always)]
fn step(sum: f32, w: u32, x: u32) -> f32 {
    let odd = |pair: u32| f32::from_bits(pair & 0xffff_0000);
    let even = |pair: u32| f32::from_bits(pair << 16);
    let sum = normal(odd(w).mul_add(odd(x), sum));
    normal(even(w).mul_add(even(x), sum))
}

/// With subnormal values as zeros.
#[inline(always)]
fn normal(value: f32) -> f32 {
    match value.abs() < f32::MIN_POSITIVE {
        true => 0f32.copysign(value),
        false => value,
    }
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use std::arch::x86_64::*;
    use std::mem::transmute;

    use super::WIDTH;
    use crate::tile::TILE_ROWS;

    /// Proof that the processor has the instructions.
    #[derive(Clone, Copy)]
    pub(super) struct Avx512Bf16(());

    impl Avx512Bf16 {
        #[inline(always)]
        pub(super) fn detect() -> Option<Self> {
            let has = is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bf16");
            has.then_some(Self(()))
        }

        #[inline(always)]
        pub(super) fn products<const T: usize>(
            self,
            panel: &[[u32; WIDTH]],
            x: &[[u32; T]],
        ) -> [[f32; WIDTH]; T] {
            // SAFETY: `self` exists only where the processor has the features that the function is compiled for.
            unsafe { compiled(panel, x) }
        }
    }

    #[target_feature(enable = "avx512f,avx512bf16")]
    fn compiled<const T: usize>(panel: &[[u32; WIDTH]], x: &[[u32; T]]) -> [[f32; WIDTH]; T] {
        let mut acc = [[_mm512_setzero_ps(); 2]; T];
        for (w, x) in panel.iter().zip(x) {
            // SAFETY: the loads need no alignment and stay within the 32 values; vectors of equal width have the same bits.
            let w: [__m512bh; 2] = unsafe {
                let at = w.as_ptr();
                [0, TILE_ROWS].map(|i| transmute(_mm512_loadu_si512(at.add(i).cast())))
            };
            for (acc, &x) in acc.iter_mut().zip(x) {
                // SAFETY: vectors of equal width have the same bits.
                let x: __m512bh = unsafe { transmute(_mm512_set1_epi32(x as i32)) };
                for (acc, w) in acc.iter_mut().zip(w) {
                    *acc = _mm512_dpbf16_ps(*acc, w, x);
                }
            }
        }
        let mut sums = [[0.0; WIDTH]; T];
        for (sums, acc) in sums.iter_mut().zip(acc) {
            for (sums, acc) in sums.chunks_exact_mut(TILE_ROWS).zip(acc) {
                // SAFETY: 16 values, without alignment.
                unsafe { _mm512_storeu_ps(sums.as_mut_ptr(), acc) };
            }
        }
        sums
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_is_to_nearest_with_subnormals_as_zeros() {
        let mut bits = 1u32;
        for _ in 0..200_000 {
            bits = bits.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let value = f32::from_bits(bits);
            let expected = half::bf16::from_f32(normal(value));
            assert_eq!(pair(value, 0.0), u32::from(expected.to_bits()), "{value:e}");
        }
        assert_eq!(pair(f32::INFINITY, f32::MAX), 0x7f80_7f80);
    }

    #[test]
    fn instructions_and_portable_steps_give_the_same_bits() {
        let mut state = 7u64;
        // Any exponents, then close ones near the smallest and of moderate size.
        for exponents in [0..256u32, 60..68, 120..136] {
            for _ in 0..2_000 {
                let mut next = || {
                    state = state
                        .wrapping_mul(6_364_136_223_846_793_005)
                        .wrapping_add(1);
                    let bits = (state >> 33) as u32;
                    let exponent = exponents.start + bits % exponents.len() as u32;
                    f32::from_bits(bits << 7 & 0x807f_ffff | exponent << 23)
                };
                let panel: Vec<[u32; WIDTH]> = (0..3)
                    .map(|_| std::array::from_fn(|_| pair(next(), next())))
                    .collect();
                let x: Vec<[u32; 2]> = (0..3)
                    .map(|_| std::array::from_fn(|_| pair(next(), next())))
                    .collect();
                let expected = products(Level::Portable, &panel, &x);
                for level in Level::available() {
                    let found = products(level, &panel, &x);
                    for (found, expected) in found.iter().flatten().zip(expected.iter().flatten()) {
                        let same = found.to_bits() == expected.to_bits()
                            || found.is_nan() && expected.is_nan();
                        assert!(same, "{level}: {found:e} instead of {expected:e}");
                    }
                }
            }
        }
    }
}
