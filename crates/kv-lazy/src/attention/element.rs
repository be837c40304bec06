//! The element types a cache can store, all computed with in f32.

#[cfg(target_arch = "x86_64")]
use super::machine::{F16c, WideF16};
use super::rows::Elements;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use pulp::bytemuck::{self, Pod};
use pulp::{Arch, Simd, WithSimd};
use std::marker::PhantomData;

/// A storage element. Arithmetic reads *packs* of it, each as many elements as two vectors of f32 hold, and widens them in
/// registers.
pub(crate) trait Element: candle_core::WithDType + Default + std::fmt::Debug {
    /// The elements of two vectors, as they lie in memory.
    type Pack<S: Simd>: Pod;
    /// Whether [`widen`](Self::widen) puts a pack's even elements into its first vector and the odd ones into the second; they stay in order
    /// otherwise.
    const INTERLEAVED: bool;
    /// The whole packs at the beginning of `row`; none where vectors are no wider than a number.
    fn packs<S: Simd>(row: &[Self]) -> &[Self::Pack<S>];
    /// A pack as f32, by operations that every machine has.
    fn widen<S: Simd>(simd: S, pack: &Self::Pack<S>) -> [S::f32s; 2];
    /// One element as f32.
    fn single(self) -> f32;
    /// Appends all of `source` as f32.
    fn widen_into(source: &[Self], out: &mut Vec<f32>);
    /// `row` with its type as a value.
    fn elements(row: &[Self]) -> Elements<'_>;
    /// `row` as bytes.
    fn bytes(row: &[Self]) -> &[u8];
    /// Runs `kernel` with the widest vectors and the best way of widening that the machine has.
    fn dispatch(kernel: impl Kernel<Self>) {
        Arch::new().dispatch(Everywhere(kernel, PhantomData));
    }
}

/// A computation over elements of type `T`.
pub(crate) trait Kernel<T: Element> {
    /// Elements of a row, of which whole packs are the fast part.
    fn row(&self) -> usize;
    fn run<S: Simd, W: Widen<T>>(self, simd: S, widen: W);
}

/// A way of widening packs; see [`Element`].
pub(crate) trait Widen<T: Element>: Copy {
    const INTERLEAVED: bool;
    fn widen<S: Simd>(self, simd: S, pack: &T::Pack<S>) -> [S::f32s; 2];
}

/// The element's own way.
#[derive(Clone, Copy)]
struct Portable;

impl<T: Element> Widen<T> for Portable {
    const INTERLEAVED: bool = T::INTERLEAVED;
    #[inline(always)]
    fn widen<S: Simd>(self, simd: S, pack: &T::Pack<S>) -> [S::f32s; 2] {
        T::widen(simd, pack)
    }
}

struct Everywhere<T, K>(K, PhantomData<T>);

impl<T: Element, K: Kernel<T>> WithSimd for Everywhere<T, K> {
    type Output = ();
    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        self.0.run(simd, Portable);
    }
}

impl Element for f32 {
    type Pack<S: Simd> = [S::f32s; 2];
    const INTERLEAVED: bool = false;
    #[inline(always)]
    fn packs<S: Simd>(row: &[Self]) -> &[Self::Pack<S>] {
        S::as_simd_f32s(row).0.as_chunks().0
    }
    #[inline(always)]
    fn widen<S: Simd>(_: S, pack: &Self::Pack<S>) -> [S::f32s; 2] {
        *pack
    }
    #[inline(always)]
    fn single(self) -> f32 {
        self
    }
    fn widen_into(source: &[Self], out: &mut Vec<f32>) {
        out.extend_from_slice(source);
    }
    fn elements(row: &[Self]) -> Elements<'_> {
        Elements::F32(row)
    }
    fn bytes(row: &[Self]) -> &[u8] {
        bytemuck::cast_slice(row)
    }
}

/// Where the even element of a pair is the low half of 32 bits.
const LITTLE_ENDIAN: bool = cfg!(target_endian = "little");

/// Packs of 16-bit elements: pairs in the 32-bit lanes of a vector, the even element of each in the low half.
#[inline(always)]
fn pairs<S: Simd>(row: &[u16]) -> &[S::u16s] {
    if S::U16_LANES == 2 * S::F32_LANES && LITTLE_ENDIAN {
        S::as_simd_u16s(row).0
    } else {
        &[]
    }
}

impl Element for bf16 {
    type Pack<S: Simd> = S::u16s;
    const INTERLEAVED: bool = LITTLE_ENDIAN;
    #[inline(always)]
    fn packs<S: Simd>(row: &[Self]) -> &[Self::Pack<S>] {
        pairs::<S>(row.reinterpret_cast())
    }
    // The bits of a bf16 are the upper half of the f32.
    #[inline(always)]
    fn widen<S: Simd>(simd: S, pack: &Self::Pack<S>) -> [S::f32s; 2] {
        let pair: S::u32s = bytemuck::cast(*pack);
        let even = simd.wrapping_dyn_shl_u32s(pair, simd.splat_u32s(16));
        let odd = simd.and_u32s(pair, simd.splat_u32s(0xffff_0000));
        [
            simd.transmute_f32s_u32s(even),
            simd.transmute_f32s_u32s(odd),
        ]
    }
    #[inline(always)]
    fn single(self) -> f32 {
        self.to_f32()
    }
    fn widen_into(source: &[Self], out: &mut Vec<f32>) {
        let first = out.len();
        out.resize(first + source.len(), 0.0);
        source.convert_to_f32_slice(&mut out[first..]);
    }
    fn elements(row: &[Self]) -> Elements<'_> {
        Elements::BF16(row)
    }
    fn bytes(row: &[Self]) -> &[u8] {
        let bits: &[u16] = row.reinterpret_cast();
        bytemuck::cast_slice(bits)
    }
}

impl Element for f16 {
    type Pack<S: Simd> = S::u16s;
    const INTERLEAVED: bool = LITTLE_ENDIAN;
    #[inline(always)]
    fn packs<S: Simd>(row: &[Self]) -> &[Self::Pack<S>] {
        pairs::<S>(row.reinterpret_cast())
    }
    #[inline(always)]
    fn widen<S: Simd>(simd: S, pack: &Self::Pack<S>) -> [S::f32s; 2] {
        let pair: S::u32s = bytemuck::cast(*pack);
        let even = simd.wrapping_dyn_shl_u32s(pair, simd.splat_u32s(16));
        [upper_half(simd, even), upper_half(simd, pair)]
    }
    #[inline(always)]
    fn single(self) -> f32 {
        self.to_f32()
    }
    fn widen_into(source: &[Self], out: &mut Vec<f32>) {
        let first = out.len();
        out.resize(first + source.len(), 0.0);
        let wide = &mut out[first..];
        Self::dispatch(Widened { source, wide });
    }
    fn elements(row: &[Self]) -> Elements<'_> {
        Elements::F16(row)
    }
    fn bytes(row: &[Self]) -> &[u8] {
        let bits: &[u16] = row.reinterpret_cast();
        bytemuck::cast_slice(bits)
    }
    fn dispatch(kernel: impl Kernel<Self>) {
        #[cfg(target_arch = "x86_64")]
        {
            // Packs of 32 elements, unless narrower ones leave less of a row over.
            if kernel.row() % 32 < 16
                && let Some(machine) = pulp::x86::V4::try_new()
            {
                return pulp::Simd::vectorize(machine, WideF16(kernel, machine));
            }
            if let Some(machine) = F16c::detect() {
                return machine.run(kernel);
            }
        }
        Arch::new().dispatch(Everywhere(kernel, PhantomData));
    }
}

/// Widens all of `source`.
struct Widened<'a> {
    source: &'a [f16],
    wide: &'a mut [f32],
}

impl Kernel<f16> for Widened<'_> {
    fn row(&self) -> usize {
        self.source.len()
    }

    #[inline(always)]
    fn run<S: Simd, W: Widen<f16>>(self, simd: S, widen: W) {
        // Packs that come apart into even and odd elements would have to be put in order again.
        let packs = match W::INTERLEAVED {
            true => &[],
            false => f16::packs::<S>(self.source),
        };
        let wide = S::as_mut_simd_f32s(self.wide).0.as_chunks_mut().0;
        for (pack, wide) in packs.iter().zip(wide) {
            *wide = widen.widen(simd, pack);
        }
        let done = packs.len() * 2 * S::F32_LANES;
        self.source[done..].convert_to_f32_slice(&mut self.wide[done..]);
    }
}

/// The f16 in the upper half of each lane. Moving the bits into place and scaling by the difference of the exponent biases is exact for normal
/// and subnormal numbers; what has all exponent bits set keeps them set.
#[inline(always)]
fn upper_half<S: Simd>(simd: S, bits: S::u32s) -> S::f32s {
    const REBIAS: f32 = f32::from_bits((127 + 127 - 15) << 23);
    let sign = simd.and_u32s(bits, simd.splat_u32s(0x8000_0000));
    let magnitude = simd.and_u32s(bits, simd.splat_u32s(0x7fff_0000));
    let special = simd.greater_than_or_equal_u32s(magnitude, simd.splat_u32s(0x7c00_0000));
    let moved = simd.wrapping_dyn_shr_u32s(magnitude, simd.splat_u32s(3));
    let scaled = simd.mul_f32s(simd.transmute_f32s_u32s(moved), simd.splat_f32s(REBIAS));
    let exponent = simd.select_u32s(special, simd.splat_u32s(0x7f80_0000), simd.splat_u32s(0));
    let bits = simd.or_u32s(simd.transmute_u32s_f32s(scaled), exponent);
    simd.transmute_f32s_u32s(simd.or_u32s(bits, sign))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every bit pattern, and room for what they widen to.
    struct All<'a, T> {
        narrow: &'a [T],
        wide: &'a mut [f32],
    }

    impl<T: Element> Kernel<T> for All<'_, T> {
        fn row(&self) -> usize {
            self.narrow.len()
        }

        #[inline(always)]
        fn run<S: Simd, W: Widen<T>>(self, simd: S, widen: W) {
            let packs = T::packs::<S>(self.narrow);
            assert!(packs.len() * 2 * S::F32_LANES == self.narrow.len() || packs.is_empty());
            for (pack, wide) in packs
                .iter()
                .zip(self.wide.chunks_exact_mut(2 * S::F32_LANES))
            {
                let vectors = widen.widen(simd, pack);
                let lanes: &[f32] = bytemuck::cast_slice(&vectors);
                for (i, wide) in wide.iter_mut().enumerate() {
                    *wide = lanes[if W::INTERLEAVED {
                        i / 2 + i % 2 * S::F32_LANES
                    } else {
                        i
                    }];
                }
            }
        }
    }

    fn check<T: Element>(all: &[T], run: impl Fn(All<'_, T>)) {
        let mut wide: Vec<f32> = all.iter().map(|x| x.single()).collect();
        run(All {
            narrow: all,
            wide: &mut wide,
        });
        let mut slice = Vec::new();
        T::widen_into(all, &mut slice);
        for ((narrow, wide), from_slice) in all.iter().zip(&wide).zip(slice.iter()) {
            let want = narrow.to_f64() as f32;
            for got in [*wide, *from_slice] {
                assert!(
                    want == got || (want.is_nan() && got.is_nan()),
                    "{narrow:?} {got}"
                );
            }
        }
    }

    #[test]
    fn every_half_precision_number_widens_to_itself_with_and_without_an_instruction() {
        let all: Vec<u16> = (0..=u16::MAX).collect();
        let f16s: Vec<f16> = all.iter().map(|&bits| f16::from_bits(bits)).collect();
        check(&f16s, |all| f16::dispatch(all));
        for (from, to) in [(0, 0), (1, 6), (3, 40), (5, 138)] {
            let rows = &f16s[from..to];
            let mut wide = vec![7.0f32];
            f16::widen_into(rows, &mut wide);
            assert_eq!(wide[0], 7.0);
            assert!(
                rows.iter()
                    .zip(&wide[1..])
                    .all(|(x, wide)| x.to_f32() == *wide)
            );
            assert_eq!(wide.len(), 1 + rows.len());
        }
        #[cfg(target_arch = "x86_64")]
        check(&f16s, |all| match F16c::detect() {
            Some(machine) => machine.run(all),
            None => f16::dispatch(all),
        });
        check(&f16s, |all| {
            Arch::new().dispatch(Everywhere(all, PhantomData))
        });
        let bf16s: Vec<bf16> = all.iter().map(|&bits| bf16::from_bits(bits)).collect();
        check(&bf16s, |all| bf16::dispatch(all));
    }
}
