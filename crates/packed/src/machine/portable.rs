//! The operations without special instructions: the reference, and what other processors run. They are calls, for small
//! code that compiles fast.

use super::{Kernel, LANES, Machine};
use crate::block::IQ4_NL_LEVELS;
use half::{bf16, f16};

/// Needs nothing.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Portable;

impl Portable {
    pub(crate) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        kernel.run(self)
    }
}

fn map<A: Copy, B: Copy + Default>(a: [A; LANES], f: impl Fn(A) -> B) -> [B; LANES] {
    let mut out = [B::default(); LANES];
    for (out, a) in out.iter_mut().zip(a) {
        *out = f(a);
    }
    out
}

fn zip<A: Copy, B: Copy + Default>(
    a: [A; LANES],
    b: [A; LANES],
    f: impl Fn(A, A) -> B,
) -> [B; LANES] {
    let mut out = [B::default(); LANES];
    for (out, (a, b)) in out.iter_mut().zip(a.into_iter().zip(b)) {
        *out = f(a, b);
    }
    out
}

fn lanes<const N: usize, B: Copy + Default>(bytes: &[u8], f: impl Fn([u8; N]) -> B) -> [B; LANES] {
    let mut out = [B::default(); LANES];
    for (out, bytes) in out.iter_mut().zip(bytes.chunks_exact(N)) {
        *out = f(bytes.try_into().expect("N bytes"));
    }
    out
}

impl Machine for Portable {
    type I = [i32; LANES];
    type F = [f32; LANES];
    type D = [i32; LANES];
    type Table = i32;

    const CENTRED_BYTES: bool = false;
    const WIDE: bool = false;
    const TWO: bool = false;
    const EIGHT: bool = false;
    const STRAIGHT: bool = false;
    const DENSE_ROWS: usize = 1;

    #[inline(never)]
    fn load(self, bytes: &[u8; 64]) -> Self::I {
        lanes(bytes, i32::from_le_bytes)
    }
    fn load_u8(self, bytes: &[u8; LANES]) -> Self::I {
        map(*bytes, i32::from)
    }
    fn load_i8(self, bytes: &[u8; LANES]) -> Self::I {
        map(*bytes, |byte| i32::from(byte as i8))
    }
    fn splat(self, value: i32) -> Self::I {
        [value; LANES]
    }
    #[inline(never)]
    fn and(self, a: Self::I, b: Self::I) -> Self::I {
        zip(a, b, |a, b| a & b)
    }
    #[inline(never)]
    fn or(self, a: Self::I, b: Self::I) -> Self::I {
        zip(a, b, |a, b| a | b)
    }
    #[inline(never)]
    fn shift_right(self, a: Self::I, bits: u32) -> Self::I {
        map(a, |a| (a as u32 >> bits) as i32)
    }
    #[inline(never)]
    fn shift_left(self, a: Self::I, bits: u32) -> Self::I {
        map(a, |a| a << bits)
    }
    fn add_i(self, a: Self::I, b: Self::I) -> Self::I {
        zip(a, b, i32::wrapping_add)
    }
    #[inline(never)]
    fn mul_i(self, a: Self::I, b: Self::I) -> Self::I {
        zip(a, b, i32::wrapping_mul)
    }
    #[inline(never)]
    fn to_f(self, a: Self::I) -> Self::F {
        map(a, |a| a as f32)
    }
    #[inline(never)]
    fn levels(self, codes: Self::I) -> Self::I {
        map(codes, |lane| {
            let level = |code: u8| (i16::from(IQ4_NL_LEVELS[usize::from(code & 15)]) + 128) as u8;
            i32::from_le_bytes(lane.to_le_bytes().map(level))
        })
    }

    fn steps(_bits: u32) -> usize {
        usize::MAX
    }
    fn dot_begin(self, start: Self::I) -> Self::D {
        start
    }
    #[inline(never)]
    fn dot(self, sum: Self::D, codes: Self::I, quad: i32, _bits: u32) -> Self::D {
        let quad = quad.to_le_bytes();
        zip(sum, codes, |sum, lane| {
            let products = lane.to_le_bytes().into_iter().zip(quad);
            products.fold(sum, |sum, (code, a)| {
                sum + i32::from(code) * i32::from(a as i8)
            })
        })
    }
    fn dot_flush(self, sum: Self::D) -> Self::D {
        sum
    }
    fn dot_end(self, sum: Self::D) -> Self::I {
        sum
    }

    fn splat_f(self, value: f32) -> Self::F {
        [value; LANES]
    }
    fn load_f(self, values: &[f32; LANES]) -> Self::F {
        *values
    }
    #[inline(never)]
    fn load_f_bytes(self, bytes: &[u8; 64]) -> Self::F {
        lanes(bytes, f32::from_le_bytes)
    }
    #[inline(never)]
    fn load_f16(self, bytes: &[u8; 32]) -> Self::F {
        lanes(bytes, |half| f16::from_le_bytes(half).to_f32())
    }
    #[inline(never)]
    fn bf16_pairs(self, pairs: Self::I) -> [Self::F; 2] {
        [
            map(pairs, |pair| f32::from_bits((pair as u32) << 16)),
            map(pairs, |pair| f32::from_bits(pair as u32 & 0xffff_0000)),
        ]
    }
    #[inline(never)]
    fn load_bf16(self, bytes: &[u8; 32]) -> Self::F {
        lanes(bytes, |half| bf16::from_le_bytes(half).to_f32())
    }
    fn store_f(self, value: Self::F, to: &mut [f32; LANES]) {
        *to = value;
    }
    #[inline(never)]
    fn add_f(self, a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |a, b| a + b)
    }
    #[inline(never)]
    fn mul_f(self, a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |a, b| a * b)
    }
    #[inline(never)]
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        let mut out = c;
        for (out, (a, b)) in out.iter_mut().zip(a.into_iter().zip(b)) {
            *out = a.mul_add(b, *out);
        }
        out
    }
    #[inline(never)]
    fn reduce(self, a: Self::F) -> f32 {
        let mut sums = a;
        for half in [8, 4, 2, 1] {
            for i in 0..half {
                sums[i] += sums[i + half];
            }
        }
        sums[0]
    }

    fn table(self, _bits: u32, zero: i32) -> Self::Table {
        zero
    }
    #[inline(never)]
    fn value(self, lanes: Self::I, shift: u32, bits: u32, zero: Self::Table) -> Self::F {
        let mask = (1 << bits) - 1;
        map(lanes, |lane| {
            ((lane as u32 >> shift & mask) as i32 - zero) as f32
        })
    }
}
