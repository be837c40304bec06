//! Blocks byte by byte: from the layout of each type to its fields and back.
//!
//! In a block of 32 values the low halves of 16 bytes hold the first 16 codes, the high halves the others. Blocks of 256
//! values are divided into 8 sub-blocks of 32 or 16 of 16, each with a small integer scale.

use half::f16;

use crate::block_type::{BlockType, K_BLOCK, SMALL_BLOCK};

/// The levels of [`BlockType::IQ4_NL`].
pub const IQ4_NL_LEVELS: [i8; 16] = [
    -127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113,
];

/// How the minimums of a type's sub-blocks are given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Minimum {
    /// There are none.
    Absent,
    /// One for the block, added.
    Stored,
    /// An integer for each sub-block times one float, subtracted.
    Scaled,
}

/// What the quantised types differ in once their bytes are taken apart.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Form {
    /// Values of a block.
    pub(crate) len: usize,
    /// Values of a sub-block; `len` where there are no sub-blocks.
    pub(crate) sub: usize,
    /// Bits of a code.
    pub(crate) bits: u32,
    /// The code of value 0, before minimums.
    pub(crate) zero: u8,
    /// Minimums.
    pub(crate) minimum: Minimum,
}

impl Form {
    /// Of a quantised type; None for floats.
    pub(crate) fn of(ty: BlockType) -> Option<Self> {
        let (sub, bits, zero, minimum) = match ty {
            BlockType::F32 | BlockType::F16 | BlockType::BF16 => return None,
            BlockType::Q4_0 => (32, 4, 8, Minimum::Absent),
            BlockType::Q4_1 => (32, 4, 0, Minimum::Stored),
            BlockType::Q5_0 => (32, 5, 16, Minimum::Absent),
            BlockType::Q5_1 => (32, 5, 0, Minimum::Stored),
            BlockType::Q8_0 => (32, 8, 128, Minimum::Absent),
            BlockType::IQ4_NL => (32, 4, 0, Minimum::Absent),
            BlockType::Q2_K => (16, 2, 0, Minimum::Scaled),
            BlockType::Q3_K => (16, 3, 4, Minimum::Absent),
            BlockType::Q4_K => (32, 4, 0, Minimum::Scaled),
            BlockType::Q5_K => (32, 5, 0, Minimum::Scaled),
            BlockType::Q6_K => (16, 6, 32, Minimum::Absent),
        };
        Some(Self {
            len: ty.block_len(),
            sub,
            bits,
            zero,
            minimum,
        })
    }

    /// Whether sub-blocks have integer scales.
    pub(crate) fn has_sub_scales(&self) -> bool {
        self.len == K_BLOCK
    }

    /// The largest code.
    pub(crate) fn max_code(&self) -> u8 {
        u8::MAX >> (8 - self.bits)
    }
}

/// A block of a quantised type, taken apart.
///
/// With q a code, b the sub-block of a value and s, n its integer scale and minimum, the value is
///
/// | type | value |
/// |---|---|
/// | `Q4_0`, `Q5_0`, `Q8_0` | `d (q − 8)`, `d (q − 16)`, `d (q − 128)` |
/// | `Q4_1`, `Q5_1` | `d q + m` |
/// | `IQ4_NL` | `d` [`IQ4_NL_LEVELS`]`[q]` |
/// | `Q3_K`, `Q6_K` | `d s (q − 4)`, `d s (q − 32)` |
/// | `Q2_K`, `Q4_K`, `Q5_K` | `d s q − m n` |
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Block {
    /// The scale, or the scale of the scales.
    pub d: f16,
    /// The minimum, or the scale of the minimums.
    pub m: f16,
    /// Integer scales of the K types' sub-blocks.
    pub scales: [i8; 16],
    /// Integer minimums of the K types' sub-blocks.
    pub mins: [u8; 16],
    /// Codes; `q + 128` for `Q8_0`. The small types use the first 32.
    pub codes: [u8; K_BLOCK],
}

impl Default for Block {
    fn default() -> Self {
        Self {
            d: f16::ZERO,
            m: f16::ZERO,
            scales: [0; 16],
            mins: [0; 16],
            codes: [0; K_BLOCK],
        }
    }
}

impl Block {
    /// Takes apart a block of a quantised type.
    ///
    /// # Panics
    /// When `bytes` is not one block of `ty`, or `ty` is a type of floats.
    pub fn decode(ty: BlockType, bytes: &[u8]) -> Self {
        let mut block = Self::default();
        block.read(ty, bytes);
        block
    }

    /// As [`Block::decode`], into a block that exists.
    pub(crate) fn read(&mut self, ty: BlockType, bytes: &[u8]) {
        assert_eq!(bytes.len(), ty.block_bytes(), "one block of {ty}");
        match ty {
            BlockType::F32 | BlockType::F16 | BlockType::BF16 => {
                unreachable!("floats have no blocks")
            }
            BlockType::Q4_0 | BlockType::IQ4_NL => {
                self.d = half_at(bytes, 0);
                self.read_nibbles(&bytes[2..]);
            }
            BlockType::Q4_1 => {
                self.d = half_at(bytes, 0);
                self.m = half_at(bytes, 2);
                self.read_nibbles(&bytes[4..]);
            }
            BlockType::Q5_0 => {
                self.d = half_at(bytes, 0);
                self.read_nibbles(&bytes[6..]);
                self.read_fifth_bits(&bytes[2..6]);
            }
            BlockType::Q5_1 => {
                self.d = half_at(bytes, 0);
                self.m = half_at(bytes, 2);
                self.read_nibbles(&bytes[8..]);
                self.read_fifth_bits(&bytes[4..8]);
            }
            BlockType::Q8_0 => {
                self.d = half_at(bytes, 0);
                for (code, &byte) in self.codes.iter_mut().zip(&bytes[2..]) {
                    *code = byte ^ 0x80;
                }
            }
            BlockType::Q2_K => {
                for (b, &byte) in bytes[..16].iter().enumerate() {
                    self.scales[b] = (byte & 15) as i8;
                    self.mins[b] = byte >> 4;
                }
                self.read_pairs(&bytes[16..80], 0, 0);
                self.d = half_at(bytes, 80);
                self.m = half_at(bytes, 82);
            }
            BlockType::Q3_K => {
                let (high, packed) = (&bytes[..32], &bytes[96..108]);
                self.read_pairs(&bytes[32..96], 0, 0);
                for (i, code) in self.codes.iter_mut().enumerate() {
                    *code |= (high[i % 32] >> (i / 32) & 1) << 2;
                }
                for b in 0..16 {
                    let low = match b < 8 {
                        true => packed[b] & 15,
                        false => packed[b - 8] >> 4,
                    };
                    let high = packed[8 + b % 4] >> (2 * (b / 4)) & 3;
                    self.scales[b] = (low | high << 4) as i8 - 32;
                }
                self.d = half_at(bytes, 108);
            }
            BlockType::Q4_K => {
                self.d = half_at(bytes, 0);
                self.m = half_at(bytes, 2);
                self.read_six_bits(&bytes[4..16]);
                self.read_wide_nibbles(&bytes[16..]);
            }
            BlockType::Q5_K => {
                self.d = half_at(bytes, 0);
                self.m = half_at(bytes, 2);
                self.read_six_bits(&bytes[4..16]);
                self.read_wide_nibbles(&bytes[48..]);
                let high = &bytes[16..48];
                for (i, code) in self.codes.iter_mut().enumerate() {
                    *code |= (high[i % 32] >> (i / 32) & 1) << 4;
                }
            }
            BlockType::Q6_K => {
                let low = &bytes[..128];
                for (i, code) in self.codes.iter_mut().enumerate() {
                    let (h, g, l) = (i / 128, i % 128 / 32, i % 32);
                    *code = low[64 * h + 32 * (g & 1) + l] >> (4 * (g / 2)) & 15;
                }
                self.read_pairs(&bytes[128..192], 4, 0xff);
                for b in 0..16 {
                    self.scales[b] = bytes[192 + b] as i8;
                }
                self.d = half_at(bytes, 208);
            }
        }
    }

    /// Reads scale and minimum, without codes and integer scales.
    pub(crate) fn read_header(&mut self, ty: BlockType, bytes: &[u8]) {
        let (d, m) = match ty {
            BlockType::F32 | BlockType::F16 | BlockType::BF16 => {
                unreachable!("floats have no blocks")
            }
            BlockType::Q4_0 | BlockType::Q5_0 | BlockType::Q8_0 | BlockType::IQ4_NL => (0, None),
            BlockType::Q4_1 | BlockType::Q5_1 | BlockType::Q4_K | BlockType::Q5_K => (0, Some(2)),
            BlockType::Q2_K => (80, Some(82)),
            BlockType::Q3_K => (108, None),
            BlockType::Q6_K => (208, None),
        };
        self.d = half_at(bytes, d);
        if let Some(m) = m {
            self.m = half_at(bytes, m);
        }
    }

    /// Writes the block as one of `ty`. Bits of codes, scales and minimums that the type does not have are lost.
    ///
    /// # Panics
    /// When `bytes` is not of the length of one block of `ty`, or `ty` is a type of floats.
    pub fn encode(&self, ty: BlockType, bytes: &mut [u8]) {
        assert_eq!(bytes.len(), ty.block_bytes(), "one block of {ty}");
        bytes.fill(0);
        match ty {
            BlockType::F32 | BlockType::F16 | BlockType::BF16 => {
                unreachable!("floats have no blocks")
            }
            BlockType::Q4_0 | BlockType::IQ4_NL => {
                put_half(bytes, 0, self.d);
                self.write_nibbles(&mut bytes[2..]);
            }
            BlockType::Q4_1 => {
                put_half(bytes, 0, self.d);
                put_half(bytes, 2, self.m);
                self.write_nibbles(&mut bytes[4..]);
            }
            BlockType::Q5_0 => {
                put_half(bytes, 0, self.d);
                bytes[2..6].copy_from_slice(&self.fifth_bits());
                self.write_nibbles(&mut bytes[6..]);
            }
            BlockType::Q5_1 => {
                put_half(bytes, 0, self.d);
                put_half(bytes, 2, self.m);
                bytes[4..8].copy_from_slice(&self.fifth_bits());
                self.write_nibbles(&mut bytes[8..]);
            }
            BlockType::Q8_0 => {
                put_half(bytes, 0, self.d);
                for (byte, &code) in bytes[2..].iter_mut().zip(&self.codes) {
                    *byte = code ^ 0x80;
                }
            }
            BlockType::Q2_K => {
                for (b, byte) in bytes[..16].iter_mut().enumerate() {
                    *byte = self.scales[b] as u8 & 15 | self.mins[b] << 4;
                }
                self.write_pairs(&mut bytes[16..80], 0);
                put_half(bytes, 80, self.d);
                put_half(bytes, 82, self.m);
            }
            BlockType::Q3_K => {
                for (i, code) in self.codes.iter().enumerate() {
                    bytes[i % 32] |= (code >> 2 & 1) << (i / 32);
                }
                self.write_pairs(&mut bytes[32..96], 0);
                for b in 0..16 {
                    let scale = (self.scales[b] + 32) as u8;
                    bytes[96 + b % 8] |= (scale & 15) << (4 * (b / 8));
                    bytes[104 + b % 4] |= (scale >> 4 & 3) << (2 * (b / 4));
                }
                put_half(bytes, 108, self.d);
            }
            BlockType::Q4_K => {
                put_half(bytes, 0, self.d);
                put_half(bytes, 2, self.m);
                self.write_six_bits(&mut bytes[4..16]);
                self.write_wide_nibbles(&mut bytes[16..]);
            }
            BlockType::Q5_K => {
                put_half(bytes, 0, self.d);
                put_half(bytes, 2, self.m);
                self.write_six_bits(&mut bytes[4..16]);
                self.write_wide_nibbles(&mut bytes[48..]);
                for (i, code) in self.codes.iter().enumerate() {
                    bytes[16 + i % 32] |= (code >> 4 & 1) << (i / 32);
                }
            }
            BlockType::Q6_K => {
                for (i, code) in self.codes.iter().enumerate() {
                    let (h, g, l) = (i / 128, i % 128 / 32, i % 32);
                    bytes[64 * h + 32 * (g & 1) + l] |= (code & 15) << (4 * (g / 2));
                }
                self.write_pairs(&mut bytes[128..192], 4);
                for b in 0..16 {
                    bytes[192 + b] = self.scales[b] as u8;
                }
                put_half(bytes, 208, self.d);
            }
        }
    }

    /// Writes the values of the block, in the arithmetic of ggml: every product is exact, a minimum is one rounding.
    ///
    /// # Panics
    /// When `values` has another length than the block, or `ty` is a type of floats.
    pub fn values(&self, ty: BlockType, values: &mut [f32]) {
        let form = Form::of(ty).expect("a quantised type");
        assert_eq!(values.len(), form.len, "one block of {ty}");
        for (b, values) in values.chunks_mut(form.sub).enumerate() {
            let codes = &self.codes[b * form.sub..][..form.sub];
            let step = self.step(&form, b);
            let zero = i32::from(form.zero);
            let centred = codes.iter().map(|&code| match ty {
                BlockType::IQ4_NL => f32::from(IQ4_NL_LEVELS[usize::from(code & 15)]),
                _ => (i32::from(code) - zero) as f32,
            });
            let values = values.iter_mut().zip(centred);
            match form.minimum {
                Minimum::Absent => values.for_each(|(value, code)| *value = step * code),
                Minimum::Stored | Minimum::Scaled => {
                    let offset = self.offset(&form, b);
                    values.for_each(|(value, code)| *value = step * code + offset);
                }
            }
        }
    }

    /// What a step of the code is worth in sub-block `b`; exact.
    pub(crate) fn step(&self, form: &Form, b: usize) -> f32 {
        match form.has_sub_scales() {
            true => self.d.to_f32() * f32::from(self.scales[b]),
            false => self.d.to_f32(),
        }
    }

    /// What is added to the values of sub-block `b`; exact.
    pub(crate) fn offset(&self, form: &Form, b: usize) -> f32 {
        match form.minimum {
            Minimum::Absent => 0.0,
            Minimum::Stored => self.m.to_f32(),
            Minimum::Scaled => -(self.m.to_f32() * f32::from(self.mins[b])),
        }
    }

    /// Whether scale and minimum are numbers.
    pub(crate) fn is_finite(&self, form: &Form) -> bool {
        self.d.is_finite() && (form.minimum == Minimum::Absent || self.m.is_finite())
    }

    fn read_nibbles(&mut self, packed: &[u8]) {
        for (j, &byte) in packed.iter().enumerate() {
            self.codes[j] = byte & 15;
            self.codes[j + SMALL_BLOCK / 2] = byte >> 4;
        }
    }

    fn write_nibbles(&self, packed: &mut [u8]) {
        for (j, byte) in packed.iter_mut().enumerate() {
            *byte = self.codes[j] & 15 | self.codes[j + SMALL_BLOCK / 2] << 4;
        }
    }

    fn read_fifth_bits(&mut self, packed: &[u8]) {
        for (j, code) in self.codes[..SMALL_BLOCK].iter_mut().enumerate() {
            *code |= (packed[j / 8] >> (j % 8) & 1) << 4;
        }
    }

    fn fifth_bits(&self) -> [u8; 4] {
        let mut packed = [0; 4];
        for (j, code) in self.codes[..SMALL_BLOCK].iter().enumerate() {
            packed[j / 8] |= (code >> 4 & 1) << (j % 8);
        }
        packed
    }

    /// Codes of 64 neighbours in 32 bytes, the first half in the low bits.
    fn read_wide_nibbles(&mut self, packed: &[u8]) {
        for (codes, packed) in self.codes.chunks_mut(64).zip(packed.chunks(32)) {
            for (l, &byte) in packed.iter().enumerate() {
                codes[l] = byte & 15;
                codes[l + 32] = byte >> 4;
            }
        }
    }

    fn write_wide_nibbles(&self, packed: &mut [u8]) {
        for (codes, packed) in self.codes.chunks(64).zip(packed.chunks_mut(32)) {
            for (l, byte) in packed.iter_mut().enumerate() {
                *byte = codes[l] & 15 | codes[l + 32] << 4;
            }
        }
    }

    /// Two bits of each code, from bit `shift` on: four runs of 32 codes in the pairs of bits of 32 bytes. The bits of
    /// `keep` stay as they are.
    fn read_pairs(&mut self, packed: &[u8], shift: u32, keep: u8) {
        for (codes, packed) in self.codes.chunks_mut(128).zip(packed.chunks(32)) {
            for (i, code) in codes.iter_mut().enumerate() {
                let pair = packed[i % 32] >> (2 * (i / 32)) & 3;
                *code = *code & keep | pair << shift;
            }
        }
    }

    fn write_pairs(&self, packed: &mut [u8], shift: u32) {
        for (codes, packed) in self.codes.chunks(128).zip(packed.chunks_mut(32)) {
            for (i, code) in codes.iter().enumerate() {
                packed[i % 32] |= (code >> shift & 3) << (2 * (i / 32));
            }
        }
    }

    /// Scales and minimums of 6 bits: eight of each in 12 bytes.
    fn read_six_bits(&mut self, packed: &[u8]) {
        for b in 0..4 {
            self.scales[b] = (packed[b] & 63) as i8;
            self.mins[b] = packed[b + 4] & 63;
            self.scales[b + 4] = (packed[b + 8] & 15 | packed[b] >> 6 << 4) as i8;
            self.mins[b + 4] = packed[b + 8] >> 4 | packed[b + 4] >> 6 << 4;
        }
    }

    fn write_six_bits(&self, packed: &mut [u8]) {
        for b in 0..4 {
            let (scale, min) = (self.scales[b + 4] as u8, self.mins[b + 4]);
            packed[b] = self.scales[b] as u8 & 63 | scale >> 4 << 6;
            packed[b + 4] = self.mins[b] & 63 | min >> 4 << 6;
            packed[b + 8] = scale & 15 | min << 4;
        }
    }
}

fn half_at(bytes: &[u8], at: usize) -> f16 {
    f16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn put_half(bytes: &mut [u8], at: usize, value: f16) {
    bytes[at..at + 2].copy_from_slice(&value.to_le_bytes());
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn quantised() -> impl Strategy<Value = BlockType> {
        prop::sample::select(
            BlockType::ALL
                .into_iter()
                .filter(|ty| ty.is_quantised())
                .collect::<Vec<_>>(),
        )
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_block_and_come_back(ty in quantised(), seed: [u8; 256]) {
            let bytes = &seed[..ty.block_bytes()];
            let mut back = vec![0xaa; bytes.len()];
            Block::decode(ty, bytes).encode(ty, &mut back);
            prop_assert_eq!(bytes, &back);
        }

        #[test]
        fn codes_scales_and_minimums_come_back(ty in quantised(), codes: [u8; 32], fields: [u8; 32]) {
            let form = Form::of(ty).unwrap();
            let mut block = Block { d: f16::from_f32(0.5), ..Block::default() };
            for (i, code) in block.codes[..form.len].iter_mut().enumerate() {
                *code = codes[i % 32].rotate_left(i as u32 / 32) & form.max_code();
            }
            if form.minimum != Minimum::Absent {
                block.m = f16::from_f32(-0.25);
            }
            if form.has_sub_scales() {
                for b in 0..form.len / form.sub {
                    block.scales[b] = match ty {
                        BlockType::Q2_K => (fields[b] & 15) as i8,
                        BlockType::Q3_K => (fields[b] & 63) as i8 - 32,
                        BlockType::Q6_K => fields[b] as i8,
                        _ => (fields[b] & 63) as i8,
                    };
                    if form.minimum == Minimum::Scaled {
                        block.mins[b] = fields[b + 16] & if ty == BlockType::Q2_K { 15 } else { 63 };
                    }
                }
            }
            let mut bytes = vec![0; ty.block_bytes()];
            block.encode(ty, &mut bytes);
            prop_assert_eq!(Block::decode(ty, &bytes), block);
        }
    }
}
