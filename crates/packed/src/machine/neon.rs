//! NEON, and the same with the byte products of Armv8.2: a vector is four registers.

use std::arch::aarch64::*;
use std::arch::asm;

use super::{Kernel, LANES, Machine};
use crate::block::IQ4_NL_LEVELS;

/// Proof that the processor has the instructions.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Neon(());

/// Proof that the processor has the instructions, the dot products among them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct NeonDot(Neon);

impl Neon {
    pub(crate) fn detect() -> Option<Self> {
        std::arch::is_aarch64_feature_detected!("neon").then_some(Self(()))
    }

    /// Runs a kernel compiled for these instructions.
    pub(crate) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        #[target_feature(enable = "neon")]
        fn compiled<K: Kernel>(machine: Neon, kernel: K) -> K::Output {
            kernel.run(machine)
        }
        // SAFETY: `self` exists only where the processor has the features that the function is compiled for.
        unsafe { compiled(self, kernel) }
    }
}

impl NeonDot {
    pub(crate) fn detect() -> Option<Self> {
        let neon = Neon::detect()?;
        std::arch::is_aarch64_feature_detected!("dotprod").then_some(Self(neon))
    }

    /// Without the dot products.
    pub(crate) fn neon(self) -> Neon {
        self.0
    }

    /// Runs a kernel compiled for these instructions.
    pub(crate) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        #[target_feature(enable = "neon,dotprod")]
        fn compiled<K: Kernel>(machine: NeonDot, kernel: K) -> K::Output {
            kernel.run(machine)
        }
        // SAFETY: `self` exists only where the processor has the features that the function is compiled for.
        unsafe { compiled(self, kernel) }
    }
}

type Ints = [int32x4_t; 4];
type Floats = [float32x4_t; 4];

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

/// Four halves widened. Part of every NEON; its intrinsic is not stable.
///
/// # Safety
/// The processor must have NEON.
#[inline(always)]
unsafe fn widen_f16(halves: uint16x4_t) -> float32x4_t {
    let wide: float32x4_t;
    // SAFETY: the instruction reads and writes the named registers only, and the caller has NEON.
    unsafe {
        asm!(
            "fcvtl {wide:v}.4s, {halves:v}.4h",
            wide = lateout(vreg) wide,
            halves = in(vreg) halves,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    wide
}

/// What both machines share.
macro_rules! shared {
    () => {
        type I = Ints;
        type F = Floats;
        type D = Ints;
        /// What is added to a code.
        type Table = float32x4_t;

        const CENTRED_BYTES: bool = true;
        const WIDE: bool = false;
        const TWO: bool = true;
        const EIGHT: bool = false;
        const STRAIGHT: bool = true;
        const DENSE_ROWS: usize = 2;

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
            fn load(self, bytes: &[u8; 64]) -> Ints {
                let at = bytes.as_ptr();
                [
                    vreinterpretq_s32_u8(vld1q_u8(at)),
                    vreinterpretq_s32_u8(vld1q_u8(at.add(16))),
                    vreinterpretq_s32_u8(vld1q_u8(at.add(32))),
                    vreinterpretq_s32_u8(vld1q_u8(at.add(48))),
                ]
            }
            fn load_u8(self, bytes: &[u8; LANES]) -> Ints {
                let bytes = vld1q_u8(bytes.as_ptr());
                let (low, high) = (vmovl_u8(vget_low_u8(bytes)), vmovl_u8(vget_high_u8(bytes)));
                [
                    vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(low))),
                    vreinterpretq_s32_u32(vmovl_u16(vget_high_u16(low))),
                    vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(high))),
                    vreinterpretq_s32_u32(vmovl_u16(vget_high_u16(high))),
                ]
            }
            fn load_i8(self, bytes: &[u8; LANES]) -> Ints {
                let bytes = vreinterpretq_s8_u8(vld1q_u8(bytes.as_ptr()));
                let (low, high) = (vmovl_s8(vget_low_s8(bytes)), vmovl_s8(vget_high_s8(bytes)));
                [
                    vmovl_s16(vget_low_s16(low)),
                    vmovl_s16(vget_high_s16(low)),
                    vmovl_s16(vget_low_s16(high)),
                    vmovl_s16(vget_high_s16(high)),
                ]
            }
            fn splat(self, value: i32) -> Ints {
                [vdupq_n_s32(value); 4]
            }
            fn and(self, a: Ints, b: Ints) -> Ints {
                [
                    vandq_s32(a[0], b[0]),
                    vandq_s32(a[1], b[1]),
                    vandq_s32(a[2], b[2]),
                    vandq_s32(a[3], b[3]),
                ]
            }
            fn or(self, a: Ints, b: Ints) -> Ints {
                [
                    vorrq_s32(a[0], b[0]),
                    vorrq_s32(a[1], b[1]),
                    vorrq_s32(a[2], b[2]),
                    vorrq_s32(a[3], b[3]),
                ]
            }
            fn shift_right(self, a: Ints, bits: u32) -> Ints {
                let bits = vdupq_n_s32(-(bits as i32));
                let shift = |a| vreinterpretq_s32_u32(vshlq_u32(vreinterpretq_u32_s32(a), bits));
                [shift(a[0]), shift(a[1]), shift(a[2]), shift(a[3])]
            }
            fn shift_left(self, a: Ints, bits: u32) -> Ints {
                let bits = vdupq_n_s32(bits as i32);
                [
                    vshlq_s32(a[0], bits),
                    vshlq_s32(a[1], bits),
                    vshlq_s32(a[2], bits),
                    vshlq_s32(a[3], bits),
                ]
            }
            fn add_i(self, a: Ints, b: Ints) -> Ints {
                [
                    vaddq_s32(a[0], b[0]),
                    vaddq_s32(a[1], b[1]),
                    vaddq_s32(a[2], b[2]),
                    vaddq_s32(a[3], b[3]),
                ]
            }
            fn mul_i(self, a: Ints, b: Ints) -> Ints {
                [
                    vmulq_s32(a[0], b[0]),
                    vmulq_s32(a[1], b[1]),
                    vmulq_s32(a[2], b[2]),
                    vmulq_s32(a[3], b[3]),
                ]
            }
            fn to_f(self, a: Ints) -> Floats {
                [
                    vcvtq_f32_s32(a[0]),
                    vcvtq_f32_s32(a[1]),
                    vcvtq_f32_s32(a[2]),
                    vcvtq_f32_s32(a[3]),
                ]
            }
            fn levels(self, codes: Ints) -> Ints {
                let table = IQ4_NL_LEVELS.map(|level| level as u8 ^ 0x80);
                let table = vld1q_u8(table.as_ptr());
                let level = |a| vreinterpretq_s32_u8(vqtbl1q_u8(table, vreinterpretq_u8_s32(a)));
                [level(codes[0]), level(codes[1]), level(codes[2]), level(codes[3])]
            }
            fn splat_f(self, value: f32) -> Floats {
                [vdupq_n_f32(value); 4]
            }
            fn load_f(self, values: &[f32; LANES]) -> Floats {
                let at = values.as_ptr();
                [
                    vld1q_f32(at),
                    vld1q_f32(at.add(4)),
                    vld1q_f32(at.add(8)),
                    vld1q_f32(at.add(12)),
                ]
            }
            fn load_f_bytes(self, bytes: &[u8; 64]) -> Floats {
                let at = bytes.as_ptr();
                [
                    vreinterpretq_f32_u8(vld1q_u8(at)),
                    vreinterpretq_f32_u8(vld1q_u8(at.add(16))),
                    vreinterpretq_f32_u8(vld1q_u8(at.add(32))),
                    vreinterpretq_f32_u8(vld1q_u8(at.add(48))),
                ]
            }
            fn load_f16(self, bytes: &[u8; 32]) -> Floats {
                let at = bytes.as_ptr();
                let low = vreinterpretq_u16_u8(vld1q_u8(at));
                let high = vreinterpretq_u16_u8(vld1q_u8(at.add(16)));
                [
                    widen_f16(vget_low_u16(low)),
                    widen_f16(vget_high_u16(low)),
                    widen_f16(vget_low_u16(high)),
                    widen_f16(vget_high_u16(high)),
                ]
            }
            fn bf16_pairs(self, pairs: Ints) -> [Floats; 2] {
                let mask = vdupq_n_s32(0xffff_0000_u32 as i32);
                let low = |a| vreinterpretq_f32_s32(vshlq_n_s32::<16>(a));
                let high = |a| vreinterpretq_f32_s32(vandq_s32(a, mask));
                let [a, b, c, d] = pairs;
                [
                    [low(a), low(b), low(c), low(d)],
                    [high(a), high(b), high(c), high(d)],
                ]
            }
            fn load_bf16(self, bytes: &[u8; 32]) -> Floats {
                let at = bytes.as_ptr();
                let low = vreinterpretq_u16_u8(vld1q_u8(at));
                let high = vreinterpretq_u16_u8(vld1q_u8(at.add(16)));
                let widen = |halves| vreinterpretq_f32_u32(vshll_n_u16::<16>(halves));
                [
                    widen(vget_low_u16(low)),
                    widen(vget_high_u16(low)),
                    widen(vget_low_u16(high)),
                    widen(vget_high_u16(high)),
                ]
            }
            fn store_f(self, value: Floats, to: &mut [f32; LANES]) -> () {
                let at = to.as_mut_ptr();
                vst1q_f32(at, value[0]);
                vst1q_f32(at.add(4), value[1]);
                vst1q_f32(at.add(8), value[2]);
                vst1q_f32(at.add(12), value[3]);
            }
            fn add_f(self, a: Floats, b: Floats) -> Floats {
                [
                    vaddq_f32(a[0], b[0]),
                    vaddq_f32(a[1], b[1]),
                    vaddq_f32(a[2], b[2]),
                    vaddq_f32(a[3], b[3]),
                ]
            }
            fn mul_f(self, a: Floats, b: Floats) -> Floats {
                [
                    vmulq_f32(a[0], b[0]),
                    vmulq_f32(a[1], b[1]),
                    vmulq_f32(a[2], b[2]),
                    vmulq_f32(a[3], b[3]),
                ]
            }
            fn fma(self, a: Floats, b: Floats, c: Floats) -> Floats {
                [
                    vfmaq_f32(c[0], a[0], b[0]),
                    vfmaq_f32(c[1], a[1], b[1]),
                    vfmaq_f32(c[2], a[2], b[2]),
                    vfmaq_f32(c[3], a[3], b[3]),
                ]
            }
            fn reduce(self, a: Floats) -> f32 {
                let four = vaddq_f32(vaddq_f32(a[0], a[2]), vaddq_f32(a[1], a[3]));
                let two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
                vget_lane_f32::<0>(two) + vget_lane_f32::<1>(two)
            }
            fn table(self, _bits: u32, zero: i32) -> float32x4_t {
                vdupq_n_f32(-zero as f32)
            }
            fn value(self, lanes: Ints, shift: u32, bits: u32, minus_zero: float32x4_t) -> Floats {
                let mask = vdupq_n_s32((1 << bits) - 1);
                let shift = vdupq_n_s32(-(shift as i32));
                let value = |a| {
                    let code = vreinterpretq_s32_u32(vshlq_u32(vreinterpretq_u32_s32(a), shift));
                    vaddq_f32(vcvtq_f32_s32(vandq_s32(code, mask)), minus_zero)
                };
                [value(lanes[0]), value(lanes[1]), value(lanes[2]), value(lanes[3])]
            }
        }
    };
}

/// Codes as signed bytes: those of 8 bits less 128.
///
/// # Safety
/// The processor must have NEON.
#[inline(always)]
unsafe fn signed(codes: int32x4_t, bits: u32) -> int8x16_t {
    // SAFETY: the caller has NEON.
    unsafe {
        match bits {
            0..=7 => vreinterpretq_s8_s32(codes),
            _ => veorq_s8(vreinterpretq_s8_s32(codes), vdupq_n_s8(-128)),
        }
    }
}

impl Machine for Neon {
    shared!();

    intrinsics! {
        fn dot(self, sum: Ints, codes: Ints, quad: i32, bits: u32) -> Ints {
            let quad = vreinterpretq_s8_s32(vdupq_n_s32(quad));
            let mut out = sum;
            for (out, codes) in out.iter_mut().zip(codes) {
                let codes = signed(codes, bits);
                let low = vmull_s8(vget_low_s8(codes), vget_low_s8(quad));
                let high = vmull_high_s8(codes, quad);
                // Two products of magnitudes up to 128 and 127 fit 16 bits.
                *out = vpadalq_s16(*out, vpaddq_s16(low, high));
            }
            out
        }
    }
}

impl Machine for NeonDot {
    shared!();

    intrinsics! {
        fn dot(self, sum: Ints, codes: Ints, quad: i32, bits: u32) -> Ints {
            let quad = vreinterpretq_s8_s32(vdupq_n_s32(quad));
            let mut out = sum;
            for (out, codes) in out.iter_mut().zip(codes) {
                // The instruction is there (`detect`); it reads and writes the named registers only.
                asm!(
                    ".arch_extension dotprod",
                    "sdot {sum:v}.4s, {codes:v}.16b, {quad:v}.16b",
                    sum = inout(vreg) *out,
                    codes = in(vreg) signed(codes, bits),
                    quad = in(vreg) quad,
                    options(pure, nomem, nostack, preserves_flags),
                );
            }
            out
        }
    }
}
