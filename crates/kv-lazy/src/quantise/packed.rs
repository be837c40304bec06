//! Rows of quantised tokens: codes in 32-bit words, scales and lows in f16. Each token is quantised once.

use super::config::BLOCK;
use super::format::{Format, round};
use super::hadamard;
use crate::store::Relocation;
use half::f16;
use half::slice::HalfFloatSliceExt;
use pulp::{Arch, Simd, WithSimd};
use std::num::NonZeroUsize;

/// Quantised tokens.
#[derive(Debug, Clone)]
pub(crate) struct Packed {
    format: Format,
    words: Vec<u32>,
    scales: Vec<f16>,
    /// Empty where the format is symmetric.
    lows: Vec<f16>,
    len: usize,
}

impl Packed {
    pub(crate) fn new(format: Format) -> Self {
        Self {
            format,
            words: Vec::new(),
            scales: Vec::new(),
            lows: Vec::new(),
            len: 0,
        }
    }

    /// Quantises and appends tokens `[n, d]`; along channels, whole groups of them. False where a scale is beyond f16.
    pub(crate) fn push(&mut self, rows: &[f32]) -> bool {
        struct Push<'a>(&'a mut Packed, &'a [f32]);

        impl WithSimd for Push<'_> {
            type Output = bool;

            #[inline(always)]
            fn with_simd<S: Simd>(self, _: S) -> bool {
                let Self(packed, rows) = self;
                let tokens = match packed.format.channel {
                    0 => BLOCK,
                    channel => channel,
                };
                let mut good = true;
                for block in rows.chunks(tokens * packed.format.head_dim) {
                    good &= packed.push_block(block);
                }
                good
            }
        }

        Arch::new().dispatch(Push(self, rows))
    }

    /// The same for as many tokens as a channel's group has, or some.
    #[inline(always)]
    fn push_block(&mut self, rows: &[f32]) -> bool {
        let format = self.format;
        let d = format.head_dim;
        let mut wide: Vec<f64> = rows.iter().map(|&x| x.into()).collect();
        for row in wide.chunks_exact_mut(d) {
            hadamard::rotate_f64(row, format.rotation);
        }
        let mut codes = vec![0u32; wide.len()];
        let mut good = true;
        if format.channel > 0 {
            let tokens = wide.len() / d;
            let (mut column, mut of_column) = (vec![0.0; tokens], vec![0; tokens]);
            for c in 0..d {
                for (x, row) in column.iter_mut().zip(wide.chunks_exact(d)) {
                    *x = row[c];
                }
                good &= self.keep(round(format, &column, &mut of_column));
                for (row, code) in codes.chunks_exact_mut(d).zip(&of_column) {
                    row[c] = *code;
                }
            }
        } else {
            let groups = wide.chunks_exact(format.group);
            for (x, codes) in groups.zip(codes.chunks_exact_mut(format.group)) {
                good &= self.keep(round(format, x, codes));
            }
        }
        let bits = format.bits;
        let word = |codes: &[u32]| {
            let shifted = codes.iter().enumerate().map(|(i, code)| code << (bits * i));
            shifted.fold(0, |word, code| word | code)
        };
        match bits {
            4 => self
                .words
                .extend(codes.as_chunks::<8>().0.iter().map(|codes| word(codes))),
            _ => self
                .words
                .extend(codes.as_chunks::<4>().0.iter().map(|codes| word(codes))),
        }
        self.len += rows.len() / d;
        good
    }

    /// Appends a group's scale and low; whether they fit f16.
    #[inline(always)]
    fn keep(&mut self, (scale, low, fits): (f16, f16, bool)) -> bool {
        self.scales.push(scale);
        if !self.format.symmetric {
            self.lows.push(low);
        }
        fits
    }

    /// Moves tokens; not for groups along channels, which share scales.
    pub(crate) fn apply(&mut self, moves: &Relocation) {
        debug_assert_eq!(self.format.channel, 0);
        moves.apply(&mut self.words, self.format.words());
        moves.apply(&mut self.scales, self.format.groups());
        if !self.format.symmetric {
            moves.apply(&mut self.lows, self.format.groups());
        }
        self.len = moves.len;
    }

    /// Makes room for `tokens` more.
    pub(crate) fn reserve(&mut self, tokens: usize) {
        let scales = self.format.scales(tokens);
        self.words.reserve_exact(tokens * self.format.words());
        self.scales.reserve_exact(scales);
        if !self.format.symmetric {
            self.lows.reserve_exact(scales);
        }
    }

    /// Tokens that there is room for.
    pub(crate) fn capacity(&self) -> usize {
        self.words.capacity() / self.format.words()
    }

    /// Gives back room beyond `tokens`.
    pub(crate) fn shrink_to(&mut self, tokens: usize) {
        let scales = self.format.scales(tokens);
        self.words
            .shrink_to(tokens.saturating_mul(self.format.words()));
        self.scales.shrink_to(scales);
        self.lows.shrink_to(scales);
    }

    /// Bytes occupied, filled or not.
    pub(crate) fn bytes(&self) -> usize {
        self.words.capacity() * 4 + (self.scales.capacity() + self.lows.capacity()) * 2
    }

    pub(crate) fn view(&self) -> PackedView<'_> {
        PackedView {
            format: self.format,
            words: &self.words,
            scales: &self.scales,
            lows: &self.lows,
            skip: 0,
        }
    }
}

/// Consecutive quantised tokens.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PackedView<'a> {
    pub(crate) format: Format,
    pub(crate) words: &'a [u32],
    pub(crate) scales: &'a [f16],
    /// Empty where the format is symmetric.
    pub(crate) lows: &'a [f16],
    /// Along channels: tokens of the first group that stand before the first one here.
    pub(crate) skip: usize,
}

impl<'a> PackedView<'a> {
    pub(crate) fn tokens(self) -> usize {
        self.words.len() / self.format.words()
    }

    pub(crate) fn slice(self, from: usize, to: usize) -> Self {
        let words = self.format.words();
        let channel = self.format.channel;
        let (first, last, skip) = if channel > 0 {
            let (from, to) = (self.skip + from, self.skip + to);
            let d = self.format.head_dim;
            let last = to.div_ceil(channel).max(from / channel);
            (from / channel * d, last * d, from % channel)
        } else {
            (from * self.format.groups(), to * self.format.groups(), 0)
        };
        Self {
            format: self.format,
            words: &self.words[from * words..to * words],
            scales: &self.scales[first..last],
            lows: if self.format.symmetric {
                self.lows
            } else {
                &self.lows[first..last]
            },
            skip,
        }
    }

    /// The code of an element of a token.
    #[inline]
    fn code(self, token: usize, element: usize) -> u32 {
        let (bits, per_word) = (self.format.bits, self.format.per_word());
        let word = self.words[token * self.format.words() + element / per_word];
        word >> (bits * (element % per_word)) & ((1 << bits) - 1)
    }

    /// Appends all tokens as f32, rotated back, with the machine's widest vectors.
    pub(crate) fn widen_into(self, out: &mut Vec<f32>) {
        struct Widen<'a>(PackedView<'a>, &'a mut Vec<f32>);

        impl WithSimd for Widen<'_> {
            type Output = ();

            #[inline(always)]
            fn with_simd<S: Simd>(self, _: S) {
                self.0.widen_here(self.1);
            }
        }

        Arch::new().dispatch(Widen(self, out));
    }

    #[inline(always)]
    fn widen_here(self, out: &mut Vec<f32>) {
        let Format {
            head_dim: d,
            rotation,
            channel,
            group,
            ..
        } = self.format;
        let scales = self.scales.to_f32_vec();
        let lows = self.lows.to_f32_vec();
        let line = |at: usize| {
            let low = lows.get(at).copied().unwrap_or(0.0);
            self.format.line(scales[at], low)
        };
        let first = out.len();
        if let Some(channel) = NonZeroUsize::new(channel) {
            for token in 0..self.tokens() {
                let group = (self.skip + token) / channel;
                for element in 0..d {
                    let (factor, offset) = line(group * d + element);
                    out.push(factor * self.code(token, element) as f32 + offset);
                }
            }
        } else {
            out.resize(first + self.tokens() * d, 0.0);
            let words = self.words.chunks_exact(group / self.format.per_word());
            let groups = out[first..].chunks_exact_mut(group).zip(words);
            for (at, (wide, words)) in groups.enumerate() {
                match self.format.bits {
                    4 => widen_group::<8>(words, line(at), wide),
                    _ => widen_group::<4>(words, line(at), wide),
                }
            }
        }
        for row in out[first..].chunks_exact_mut(d) {
            hadamard::rotate(row, rotation);
        }
    }
}

/// The elements of a group of tokens' words with `N` codes each.
#[inline(always)]
fn widen_group<const N: usize>(words: &[u32], (factor, offset): (f32, f32), wide: &mut [f32]) {
    let bits = 32 / N;
    for (word, wide) in words.iter().zip(wide.as_chunks_mut::<N>().0) {
        for (k, x) in wide.iter_mut().enumerate() {
            let code = word >> (bits * k) & ((1 << bits) - 1);
            *x = factor * code as f32 + offset;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::golden::{self, D, TOKENS, close};

    fn format(bits: usize, group: usize, rotate: bool) -> Format {
        Format {
            head_dim: D,
            bits,
            symmetric: bits == 8,
            group,
            rotation: if rotate { hadamard::block(D) } else { 1 },
            channel: 0,
        }
    }

    fn packed(format: Format, rows: &[f32]) -> Packed {
        let mut packed = Packed::new(format);
        assert!(packed.push(rows));
        packed
    }

    fn codes(packed: &Packed) -> Vec<i64> {
        let zero = if packed.format.symmetric { 128 } else { 0 };
        let code = |i| i64::from(packed.view().code(0, i)) - zero;
        (0..D).map(code).collect()
    }

    fn floats(x: &[f16]) -> Vec<f32> {
        x.to_f32_vec()
    }

    #[test]
    fn codes_scales_and_lows_equal_golden_values() {
        close(
            &golden::keys(0)[..2],
            &[0.538_453_937, -0.609_505_355],
            1e-7,
        );
        close(
            &golden::all_values()[7 * D..7 * D + 2],
            &[-3.206_646_68, 1.766_010_64],
            1e-7,
        );

        let int8 = packed(format(8, 32, false), &golden::keys(0));
        #[rustfmt::skip]
        assert_eq!(codes(&int8), [
            16, -18, -25, -26, 9, -127, -11, 23, 1, 28, -5, -10, -23, -10, -3, 2, -24, -15, -16, -10, 2, 5, -13, 5, 7, 17,
            10, 3, 14, 13, -25, 23, -58, -47, 56, 41, -30, 127, 42, -3, -6, -32, -54, -52, 0, 59, -9, -60, 61, 11, 65, -1,
            -45, -8, 26, 46, -16, -62, 5, -27, 35, -27, -7, 64,
        ]);
        close(&floats(&int8.scales), &[0.034_576_416, 0.015_296_936], 1e-7);

        let int4 = packed(format(4, 32, false), &golden::keys(0));
        #[rustfmt::skip]
        assert_eq!(codes(&int4), [
            14, 11, 10, 10, 13, 0, 11, 15, 12, 15, 12, 11, 10, 11, 12, 13, 10, 11, 11, 11, 13, 13, 11, 13, 13, 14, 13, 13,
            14, 14, 10, 15, 0, 1, 9, 8, 3, 15, 8, 5, 4, 2, 1, 1, 5, 10, 4, 0, 10, 6, 10, 5, 1, 4, 7, 9, 4, 0, 5, 3, 8, 3, 4,
            10,
        ]);
        close(&floats(&int4.scales), &[0.356_933_594, 0.192_749_023], 1e-7);
        close(&floats(&int4.lows), &[-4.390_625, -0.948_730_469], 1e-7);
        let bytes: Vec<u8> = int4.words.iter().flat_map(|w| w.to_le_bytes()).collect();
        assert_eq!(bytes[..8], [190, 170, 13, 251, 252, 188, 186, 220]);

        let rotated = packed(format(4, 64, true), &golden::keys(0));
        #[rustfmt::skip]
        assert_eq!(codes(&rotated), [
            5, 8, 6, 9, 6, 10, 9, 5, 6, 9, 3, 8, 8, 7, 8, 7, 4, 9, 7, 6, 8, 5, 9, 9, 8, 9, 4, 12, 7, 7, 7, 4, 4, 7, 8, 12, 10,
            4, 12, 2, 0, 11, 8, 13, 4, 5, 9, 5, 6, 12, 4, 12, 11, 6, 15, 3, 6, 11, 9, 11, 11, 7, 11, 5,
        ]);
        close(&floats(&rotated.scales), &[0.280_517_578], 1e-7);
        close(&floats(&rotated.lows), &[-2.050_781_25], 1e-7);
        let mut restored = Vec::new();
        rotated.view().widen_into(&mut restored);
        #[rustfmt::skip]
        close(&restored[..8], &[
            0.529_998_779, -0.596_099_854, -0.736_358_643, -1.016_876_22, 0.385_711_67, -4.383_087_16, -0.455_841_064,
            0.806_488_037,
        ], 1e-6);
    }

    /// Errors of logits, rows of weights, outputs, keys and values.
    fn errors(keys: Format, values: Format) -> Vec<f32> {
        let (k, v, q) = (golden::all_keys(), golden::all_values(), golden::queries());
        let widened = |format, rows: &[f32]| {
            let mut wide = Vec::new();
            packed(format, rows).view().widen_into(&mut wide);
            wide
        };
        let (k2, v2) = (widened(keys, &k), widened(values, &v));
        let relative = |a: &[f32], b: &[f32]| {
            let square = |x: f64| x * x;
            let gap: f64 = a.iter().zip(b).map(|(a, b)| square(f64::from(a - b))).sum();
            let size: f64 = a.iter().map(|&a| square(a.into())).sum();
            (gap / size).sqrt()
        };
        let (mut most, mut squares, mut divergence) = (0.0f64, 0.0, 0.0);
        let (mut gaps, mut sizes) = (0.0, 0.0);
        for q in q.chunks(D) {
            let logits = |k: &[f32]| -> Vec<f64> {
                let product = |(k, q): (&f32, &f32)| f64::from(*k) * f64::from(*q);
                k.chunks(D)
                    .map(|k| k.iter().zip(q).map(product).sum::<f64>() / 8.0)
                    .collect()
            };
            let weights = |logits: &[f64]| -> Vec<f64> {
                let max = logits.iter().copied().fold(f64::MIN, f64::max);
                let sum: f64 = logits.iter().map(|x| (x - max).exp()).sum();
                logits.iter().map(|x| (x - max).exp() / sum).collect()
            };
            let (a, b) = (logits(&k), logits(&k2));
            for (a, b) in a.iter().zip(&b) {
                most = most.max((a - b).abs());
                squares += (a - b) * (a - b);
            }
            let (p, p2) = (weights(&a), weights(&b));
            divergence += p
                .iter()
                .zip(&p2)
                .map(|(p, q)| p * (p / q).ln())
                .sum::<f64>();
            for c in 0..D {
                let mix = |p: &[f64], v: &[f32]| -> f64 {
                    p.iter()
                        .enumerate()
                        .map(|(j, p)| p * f64::from(v[j * D + c]))
                        .sum()
                };
                let (o, o2) = (mix(&p, &v), mix(&p2, &v2));
                gaps += (o - o2) * (o - o2);
                sizes += o * o;
            }
        }
        [
            most,
            (squares / (16 * TOKENS) as f64).sqrt(),
            divergence / 16.0,
            (gaps / sizes).sqrt(),
            relative(&k, &k2),
            relative(&v, &v2),
        ]
        .map(|x| x as f32)
        .to_vec()
    }

    #[test]
    fn errors_of_attention_equal_golden_values() {
        let channels = Format {
            symmetric: false,
            channel: 16,
            ..format(4, 64, false)
        };
        #[rustfmt::skip]
        let cases = [
            (format(8, 32, false), format(8, 32, false), [0.048_763_020_1, 0.010_769_794_7, 5.949_249_01e-5, 0.011_522_852_5, 0.009_888_650_65, 0.003_627_724]),
            (format(8, 64, false), format(8, 64, false), [0.051_286_129, 0.013_582_56, 1.092_137_18e-4, 0.015_185_935_6, 0.012_482_887_7, 0.003_897_487_21]),
            (format(4, 32, false), format(4, 32, false), [0.352_846_367, 0.101_555_389, 0.005_146_115_13, 0.107_932_597, 0.099_749_987, 0.061_784_565_1]),
            (format(4, 64, false), format(4, 64, false), [0.669_508_519, 0.154_089_193, 0.012_147_721_2, 0.157_479_637, 0.144_550_964, 0.063_474_932_5]),
            (format(4, 64, true), format(4, 64, true), [0.459_915_627, 0.088_666_263_8, 0.004_504_383_44, 0.122_454_998, 0.082_545_886_2, 0.086_570_504_9]),
            (channels, format(4, 32, false), [0.185_019_005, 0.060_026_114_5, 0.001_622_313_43, 0.073_160_527_5, 0.051_180_520_9, 0.061_784_565_1]),
            (format(8, 64, true), format(4, 64, true), [0.019_994_461_4, 0.005_905_092_14, 1.591_190_53e-5, 0.081_380_572_8, 0.005_494_905_76, 0.086_570_504_9]),
        ];
        for (keys, values, want) in cases {
            close(&errors(keys, values), &want, 2e-5);
        }
    }

    #[test]
    fn degenerate_groups_are_restored_as_well_as_f16_allows_and_overflow_is_noticed() {
        for format in [format(8, 32, false), format(4, 32, false)] {
            for value in [0.0f32, 1.5, -3.0, 1e-9] {
                let mut wide = Vec::new();
                packed(format, &[value; D]).view().widen_into(&mut wide);
                assert!(
                    wide.iter()
                        .all(|x| (x - value).abs() <= 4e-3 * value.abs() + 1e-7),
                    "{value}"
                );
            }
            assert!(!Packed::new(format).push(&[f32::INFINITY; D]));
        }
        assert!(!Packed::new(format(4, 64, true)).push(&[-60_000.0; D]));
    }

    #[test]
    fn slices_of_groups_along_channels_widen_to_the_same_numbers() {
        let channels = Format {
            symmetric: false,
            channel: 16,
            ..format(4, 64, false)
        };
        let packed = packed(channels, &golden::all_keys());
        let mut whole = Vec::new();
        packed.view().widen_into(&mut whole);
        for (from, to) in [(0, 48), (5, 11), (15, 33), (16, 32), (47, 48), (20, 20)] {
            let mut part = Vec::new();
            let view = packed.view().slice(from, to);
            view.widen_into(&mut part);
            assert_eq!(part, whole[from * D..to * D]);
            if to - from > 3 {
                let mut inner = Vec::new();
                view.slice(2, 4).widen_into(&mut inner);
                assert_eq!(inner, whole[(from + 2) * D..(from + 4) * D]);
            }
        }
    }
}
