//! Rows of bits in one flat buffer: the relations of this crate, n²/8 bytes each.

use std::fmt;

/// A matrix of bits, row-major, each row padded to whole 64-bit words. Padding bits are always zero.
#[derive(Clone, PartialEq, Eq)]
pub struct BitMatrix {
    rows: usize,
    cols: usize,
    stride: usize,
    words: Vec<u64>,
}

impl BitMatrix {
    /// All-zero matrix of `rows` x `cols`.
    pub fn new(rows: usize, cols: usize) -> Self {
        let stride = cols.div_ceil(64);
        Self {
            rows,
            cols,
            stride,
            words: vec![0; rows * stride],
        }
    }

    /// All-one matrix of `rows` x `cols`.
    pub fn ones(rows: usize, cols: usize) -> Self {
        let mut m = Self::new(rows, cols);
        for i in 0..rows {
            fill_ones(m.row_mut(i), cols);
        }
        m
    }

    /// Builds a matrix from a predicate on (row, column).
    pub fn from_fn(rows: usize, cols: usize, mut f: impl FnMut(usize, usize) -> bool) -> Self {
        let mut m = Self::new(rows, cols);
        for i in 0..rows {
            let row = m.row_mut(i);
            for j in 0..cols {
                row[j / 64] |= u64::from(f(i, j)) << (j % 64);
            }
        }
        m
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The words of row `i`.
    pub fn row(&self, i: usize) -> &[u64] {
        &self.words[i * self.stride..(i + 1) * self.stride]
    }

    pub(crate) fn row_mut(&mut self, i: usize) -> &mut [u64] {
        &mut self.words[i * self.stride..(i + 1) * self.stride]
    }

    /// Row `i` to write and row `j` to read, `i != j`.
    pub(crate) fn row_pair(&mut self, i: usize, j: usize) -> (&mut [u64], &[u64]) {
        let s = self.stride;
        if i < j {
            let (lo, hi) = self.words.split_at_mut(j * s);
            (&mut lo[i * s..(i + 1) * s], &hi[..s])
        } else {
            let (lo, hi) = self.words.split_at_mut(i * s);
            (&mut hi[..s], &lo[j * s..(j + 1) * s])
        }
    }

    /// Bit (i, j).
    pub fn get(&self, i: usize, j: usize) -> bool {
        debug_assert!(j < self.cols);
        self.words[i * self.stride + j / 64] >> (j % 64) & 1 == 1
    }

    /// Sets bit (i, j).
    pub fn set(&mut self, i: usize, j: usize, value: bool) {
        assert!(j < self.cols, "column {j} of {}", self.cols);
        let word = &mut self.words[i * self.stride + j / 64];
        let bit = 1u64 << (j % 64);
        if value { *word |= bit } else { *word &= !bit }
    }

    /// Number of ones.
    pub fn count(&self) -> usize {
        count(&self.words)
    }

    /// The columns of the ones of row `i`, ascending.
    pub fn row_ones(&self, i: usize) -> impl Iterator<Item = usize> + '_ {
        ones(self.row(i))
    }

    /// Bytes held by the bits.
    pub fn bytes(&self) -> usize {
        self.words.len() * 8
    }

    /// The transposed matrix, by blocks of 64 x 64 bits.
    pub fn transpose(&self) -> Self {
        let mut out = Self::new(self.cols, self.rows);
        let mut block = [0u64; 64];
        for bi in 0..self.rows.div_ceil(64) {
            let height = (self.rows - bi * 64).min(64);
            for bj in 0..self.stride {
                for (r, word) in block.iter_mut().enumerate() {
                    *word = if r < height {
                        self.words[(bi * 64 + r) * self.stride + bj]
                    } else {
                        0
                    };
                }
                transpose64(&mut block);
                let width = (self.cols - bj * 64).min(64);
                for (r, &word) in block[..width].iter().enumerate() {
                    out.words[(bj * 64 + r) * out.stride + bi] = word;
                }
            }
        }
        out
    }
}

impl fmt::Debug for BitMatrix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "BitMatrix {}x{}", self.rows, self.cols)?;
        for i in 0..self.rows {
            for j in 0..self.cols {
                f.write_str(if self.get(i, j) { "1" } else { "." })?;
            }
            writeln!(f)?;
        }
        Ok(())
    }
}

/// Transposes 64 x 64 bits in place by swapping ever smaller off-diagonal blocks.
fn transpose64(a: &mut [u64; 64]) {
    let mut width = 32;
    let mut mask = 0x0000_0000_ffff_ffff_u64;
    while width != 0 {
        let mut k = 0;
        while k < 64 {
            let swap = ((a[k] >> width) ^ a[k + width]) & mask;
            a[k] ^= swap << width;
            a[k + width] ^= swap;
            k = (k + width + 1) & !width;
        }
        width /= 2;
        mask ^= mask << width;
    }
}

/// Sets the first `n` bits.
pub(crate) fn fill_ones(row: &mut [u64], n: usize) {
    row.fill(0);
    row[..n / 64].fill(u64::MAX);
    if !n.is_multiple_of(64) {
        row[n / 64] = (1 << (n % 64)) - 1;
    }
}

/// Number of ones.
pub(crate) fn count(row: &[u64]) -> usize {
    row.iter().map(|w| w.count_ones() as usize).sum()
}

/// Positions of the ones, ascending.
pub(crate) fn ones(row: &[u64]) -> impl Iterator<Item = usize> + '_ {
    row.iter().enumerate().flat_map(|(k, &word)| {
        std::iter::successors((word != 0).then_some(word), |w| {
            let rest = w & (w - 1);
            (rest != 0).then_some(rest)
        })
        .map(move |w| k * 64 + w.trailing_zeros() as usize)
    })
}

/// Position of the highest one.
pub(crate) fn highest(row: &[u64]) -> Option<usize> {
    row.iter()
        .rposition(|&w| w != 0)
        .map(|k| k * 64 + 63 - row[k].leading_zeros() as usize)
}

/// Position of the lowest one.
pub(crate) fn lowest(row: &[u64]) -> Option<usize> {
    row.iter()
        .position(|&w| w != 0)
        .map(|k| k * 64 + row[k].trailing_zeros() as usize)
}

/// `dst |= src`.
pub(crate) fn or(dst: &mut [u64], src: &[u64]) {
    for (d, s) in dst.iter_mut().zip(src) {
        *d |= s;
    }
}

/// `dst &= !src`.
pub(crate) fn and_not(dst: &mut [u64], src: &[u64]) {
    for (d, s) in dst.iter_mut().zip(src) {
        *d &= !s;
    }
}

/// `dst &= src`; returns the number of ones left.
pub(crate) fn and_count(dst: &mut [u64], src: &[u64]) -> usize {
    let mut n = 0;
    for (d, s) in dst.iter_mut().zip(src) {
        *d &= s;
        n += d.count_ones() as usize;
    }
    n
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn transpose_agrees_with_the_definition_for_odd_sizes() {
        for (rows, cols) in [(1, 1), (63, 65), (64, 64), (130, 70), (5, 200)] {
            let m = BitMatrix::from_fn(rows, cols, |i, j| (i * 31 + j * 17 + i * j) % 7 < 3);
            let t = m.transpose();
            assert_eq!((t.rows(), t.cols()), (cols, rows));
            for i in 0..rows {
                for j in 0..cols {
                    assert_eq!(m.get(i, j), t.get(j, i));
                }
            }
            assert_eq!(t.transpose(), m);
        }
    }

    #[test]
    fn ones_lists_set_bits_ascending_and_padding_stays_zero() {
        let m = BitMatrix::ones(2, 67);
        assert_eq!(m.count(), 134);
        assert_eq!(
            m.row_ones(1).collect::<Vec<_>>(),
            (0..67).collect::<Vec<_>>()
        );
        assert_eq!(highest(m.row(0)), Some(66));
        assert_eq!(lowest(BitMatrix::new(1, 67).row(0)), None);
    }
}
