//! Activations as the kernels read them.

use crate::tile::BLOCK;

/// 32 columns of a token, rounded to bytes: one cache line.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
pub(crate) struct Int8Block {
    /// Integers of magnitude up to 127.
    pub(crate) q: [i8; BLOCK],
    /// What a step is worth.
    pub(crate) d: f32,
    /// Sum of the integers.
    pub(crate) sum: i32,
    /// Of the first and the second 16.
    pub(crate) sums: [i32; 2],
    /// `d` times the sum.
    pub(crate) scaled: f32,
    /// `d` times the sums.
    pub(crate) scaleds: [f32; 2],
}

impl Int8Block {
    /// Rounds 32 values to the nearest multiples of their largest magnitude over 127, halves to even. If one of them is
    /// not finite, `d` is not a number, and nothing that is computed from it is.
    pub(crate) fn round(x: &[f32; BLOCK]) -> Self {
        // The largest magnitude, by the order of the bits, in which infinities and NaN come last.
        let max = x
            .iter()
            .fold(0, |max, x| max.max(x.to_bits() & 0x7fff_ffff));
        let d = f32::from_bits(max) / 127.0;
        let (d, inverse) = match d {
            0.0 => (0.0, 0.0),
            _ if d.is_finite() => (d, 1.0 / d),
            _ => (f32::NAN, 0.0),
        };
        let mut q = [0i8; BLOCK];
        // Where the inverse overflows (d below 2^-128) all codes saturate as the largest does.
        for (q, x) in q.iter_mut().zip(x) {
            // Adding 1.5 · 2^23 rounds to an integer.
            const ROUND: f32 = 12_582_912.0;
            let scaled = (x * inverse).clamp(-127.0, 127.0);
            let rounded = scaled + ROUND;
            *q = (rounded.to_bits() as i32 - ROUND.to_bits() as i32) as i8;
        }
        let sums = [0, 16].map(|at| q[at..at + 16].iter().map(|&q| i32::from(q)).sum::<i32>());
        let sum = sums[0] + sums[1];
        Self {
            q,
            d,
            sum,
            sums,
            scaled: d * sum as f32,
            scaleds: sums.map(|sum| d * sum as f32),
        }
    }

    /// Four neighbouring integers.
    #[inline(always)]
    pub(crate) fn quad(&self, g: usize) -> i32 {
        let q = &self.q[4 * g..4 * g + 4];
        i32::from_le_bytes([q[0] as u8, q[1] as u8, q[2] as u8, q[3] as u8])
    }
}

/// 32 columns of a token.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
pub(crate) struct FloatBlock {
    pub(crate) x: [f32; BLOCK],
    /// Sum of the values.
    pub(crate) sum: f32,
    /// Of the first and the second 16.
    pub(crate) sums: [f32; 2],
}

impl FloatBlock {
    pub(crate) fn new(x: &[f32; BLOCK]) -> Self {
        let sums = [0, 16].map(|at| quarter_sums(&x[at..at + 16]));
        let all = quarter_sums(x);
        Self {
            x: *x,
            sum: all,
            sums,
        }
    }
}

/// Four sums, of every fourth value each, ascending; then (0 + 1) + (2 + 3): the order of the kernels' products.
fn quarter_sums(x: &[f32]) -> f32 {
    let mut sums = [0.0f32; 4];
    for quad in x.chunks_exact(4) {
        for (sum, x) in sums.iter_mut().zip(quad) {
            *sum += x;
        }
    }
    (sums[0] + sums[1]) + (sums[2] + sums[3])
}

/// Calls `f` with the blocks of 32 columns of a token; the last is filled with zeros. With `order`, position i is column
/// `order[i]`.
pub(crate) fn blocks_of(x: &[f32], order: Option<&[u32]>, mut f: impl FnMut(&[f32; BLOCK])) {
    let mut block = [0.0; BLOCK];
    match order {
        None => {
            let (whole, rest) = x.as_chunks::<BLOCK>();
            whole.iter().for_each(&mut f);
            if !rest.is_empty() {
                block[..rest.len()].copy_from_slice(rest);
                f(&block);
            }
        }
        Some(order) => {
            for order in order.chunks(BLOCK) {
                block.fill(0.0);
                for (to, &column) in block.iter_mut().zip(order) {
                    *to = x[column as usize];
                }
                f(&block);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_nearest_multiples_with_halves_to_even() {
        let mut x = [0.0f32; BLOCK];
        x[0] = -127.0;
        for (i, x) in x.iter_mut().enumerate().skip(1) {
            *x = i as f32 - 12.5;
        }
        let block = Int8Block::round(&x);
        assert_eq!(block.d, 1.0);
        assert_eq!(block.q[..5], [-127, -12, -10, -10, -8]);
        let sum: i32 = block.q.iter().map(|&q| i32::from(q)).sum();
        assert_eq!((block.sum, block.sums[0] + block.sums[1]), (sum, sum));
        assert_eq!(
            block.quad(1).to_le_bytes().map(|q| q as i8),
            [-8, -8, -6, -6]
        );
    }

    #[test]
    fn zeros_stay_zeros_and_what_is_not_finite_is_no_number() {
        assert_eq!(Int8Block::round(&[0.0; BLOCK]).d, 0.0);
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut x = [1.0; BLOCK];
            x[9] = bad;
            let block = Int8Block::round(&x);
            assert!(block.d.is_nan() && block.scaled.is_nan() && block.q == [0; BLOCK]);
        }
        // 1/d overflows.
        let mut x = [0.0; BLOCK];
        (x[3], x[4]) = (1e-41, -1e-41);
        let block = Int8Block::round(&x);
        assert_eq!((block.q[3], block.q[4], block.q[5]), (127, -127, 0));
    }

    #[test]
    fn a_permuted_token_is_gathered_and_its_end_filled() {
        let x: Vec<f32> = (0..40).map(|i| i as f32).collect();
        let order: Vec<u32> = (0..40).rev().collect();
        let mut seen = Vec::new();
        blocks_of(&x, Some(&order), |block| seen.extend_from_slice(block));
        assert_eq!(seen[..3], [39.0, 38.0, 37.0]);
        assert_eq!(seen[38..42], [1.0, 0.0, 0.0, 0.0]);
        seen.clear();
        blocks_of(&x, None, |block| seen.extend_from_slice(block));
        assert_eq!((seen.len(), seen[39], seen[40]), (64, 39.0, 0.0));
    }
}
