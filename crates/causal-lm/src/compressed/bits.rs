//! Codes of a few bits in 32-bit words, little end first.

/// Writes codes one after the other without gaps, across the borders of words.
pub fn pack(codes: impl IntoIterator<Item = u8>, bits: usize, words: &mut [u32]) {
    words.fill(0);
    for (i, code) in codes.into_iter().enumerate() {
        let (word, shift) = (i * bits / 32, i * bits % 32);
        words[word] |= u32::from(code) << shift;
        if shift + bits > 32 {
            words[word + 1] |= u32::from(code) >> (32 - shift);
        }
    }
}

/// The i-th code of words written by [`pack`]; `word` gives the words.
#[inline]
pub(super) fn dense(word: impl Fn(usize) -> u32, bits: usize, i: usize) -> u8 {
    let (at, shift) = (i * bits / 32, i * bits % 32);
    let mut code = word(at) >> shift;
    if shift + bits > 32 {
        code |= word(at + 1) << (32 - shift);
    }
    (code & mask(bits)) as u8
}

/// The i-th code of words that hold ⌊32 / bits⌋ codes each and waste the rest.
#[inline]
pub(super) fn aligned(word: impl Fn(usize) -> u32, bits: usize, i: usize) -> u8 {
    let per_word = 32 / bits;
    (word(i / per_word) >> (i % per_word * bits) & mask(bits)) as u8
}

fn mask(bits: usize) -> u32 {
    u32::MAX >> (32 - bits)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_come_back_for_every_width_and_length() {
        for bits in [2, 3, 4, 8] {
            for length in 0..100 {
                let codes: Vec<u8> = (0..length)
                    .map(|i| (i * 37 + i / 7) as u8 & mask(bits) as u8)
                    .collect();
                let mut words = vec![u32::MAX; (length * bits).div_ceil(32)];
                pack(codes.iter().copied(), bits, &mut words);
                let back: Vec<u8> = (0..length).map(|i| dense(|k| words[k], bits, i)).collect();
                assert_eq!(back, codes, "{bits} bits");
            }
        }
    }

    #[test]
    fn three_bits_lie_as_gptq_packs_them() {
        let codes: Vec<u8> = (0..32).map(|i| (i * 5 + 3) as u8 % 8).collect();
        let v = |i: usize| u32::from(codes[i]);
        let mut words = [0; 3];
        pack(codes.iter().copied(), 3, &mut words);
        // Ten values and two bits of the eleventh; its last bit, ten values and a bit; two bits and ten values.
        let first = (0..10).map(|i| v(i) << (3 * i)).sum::<u32>() | (v(10) & 3) << 30;
        let second = v(10) >> 2
            | (11..21).map(|i| v(i) << (3 * (i - 11) + 1)).sum::<u32>()
            | (v(21) & 1) << 31;
        let third = v(21) >> 1 | (22..32).map(|i| v(i) << (3 * (i - 22) + 2)).sum::<u32>();
        assert_eq!(words, [first, second, third]);
    }

    #[test]
    fn aligned_words_of_four_bits_are_dense_ones() {
        let words = [0x7654_3210, 0xFEDC_BA98];
        for i in 0..16 {
            assert_eq!(usize::from(aligned(|k| words[k], 4, i)), i);
            assert_eq!(usize::from(dense(|k| words[k], 4, i)), i);
        }
        // Ten codes of three bits in a word.
        assert_eq!(aligned(|k| [0, 5][k], 3, 10), 5);
    }
}
