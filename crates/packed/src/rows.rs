//! Matrices as files store them: row after row of blocks.

use std::borrow::Cow;
use std::ops::Range;

use half::{bf16, f16};
use rayon::prelude::*;

use crate::block::{Block, Form};
use crate::error::check_length;
use crate::{BlockType, Error, Result};

/// A matrix `[rows, cols]` of one type, row-major, with the bytes of a GGUF file. Bytes are borrowed from the file or owned.
///
/// Blocks lie within rows, so rows can be cut out and reordered without a change to any of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QuantRows<'a> {
    ty: BlockType,
    rows: usize,
    cols: usize,
    row_bytes: usize,
    bytes: Cow<'a, [u8]>,
}

impl<'a> QuantRows<'a> {
    /// A matrix from its bytes.
    ///
    /// # Errors
    /// [`Error::Columns`], and [`Error::Length`] when there are more or fewer bytes than the shape has. Scales are not
    /// looked at; [`QuantRows::check`] does that.
    pub fn new(
        ty: BlockType,
        rows: usize,
        cols: usize,
        bytes: impl Into<Cow<'a, [u8]>>,
    ) -> Result<Self> {
        let bytes = bytes.into();
        let row_bytes = ty.row_bytes(cols)?;
        let expected = rows
            .checked_mul(row_bytes)
            .ok_or(Error::Columns { ty, cols })?;
        check_length("bytes of the matrix", bytes.len(), expected)?;
        Ok(Self {
            ty,
            rows,
            cols,
            row_bytes,
            bytes,
        })
    }

    /// The type.
    pub fn block_type(&self) -> BlockType {
        self.ty
    }

    /// Rows (outputs of a linear layer).
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns (inputs of a linear layer).
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// All bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// All bytes, copied if they are borrowed.
    pub fn into_bytes(self) -> Vec<u8> {
        self.bytes.into_owned()
    }

    /// Bytes of a row.
    pub fn row_bytes(&self) -> usize {
        self.row_bytes
    }

    /// The bytes of row `row`.
    ///
    /// # Panics
    /// When there is no such row.
    pub fn row(&self, row: usize) -> &[u8] {
        &self.bytes[row * self.row_bytes..][..self.row_bytes]
    }

    /// The matrix with bytes of its own.
    pub fn into_owned(self) -> QuantRows<'static> {
        QuantRows {
            ty: self.ty,
            rows: self.rows,
            cols: self.cols,
            row_bytes: self.row_bytes,
            bytes: Cow::Owned(self.bytes.into_owned()),
        }
    }

    /// Neighbouring rows, without copying them.
    ///
    /// # Errors
    /// [`Error::Row`] when the range ends beyond the matrix.
    pub fn slice(&self, rows: Range<usize>) -> Result<QuantRows<'_>> {
        if rows.end > self.rows || rows.start > rows.end {
            return Err(Error::Row {
                row: rows.end.max(rows.start),
                rows: self.rows,
            });
        }
        Ok(QuantRows {
            ty: self.ty,
            rows: rows.len(),
            cols: self.cols,
            row_bytes: self.row_bytes,
            bytes: Cow::Borrowed(
                &self.bytes[rows.start * self.row_bytes..rows.end * self.row_bytes],
            ),
        })
    }

    /// Row `i` of the result is row `rows[i]` of the matrix, bit for bit.
    ///
    /// # Errors
    /// [`Error::Row`] for a row that does not exist.
    pub fn select(&self, rows: &[usize]) -> Result<QuantRows<'static>> {
        if let Some(&row) = rows.iter().find(|&&row| row >= self.rows) {
            let rows = self.rows;
            return Err(Error::Row { row, rows });
        }
        let mut bytes = Vec::with_capacity(rows.len() * self.row_bytes);
        for &row in rows {
            bytes.extend_from_slice(self.row(row));
        }
        Ok(QuantRows {
            ty: self.ty,
            rows: rows.len(),
            cols: self.cols,
            row_bytes: self.row_bytes,
            bytes: Cow::Owned(bytes),
        })
    }

    /// Finds the first scale, minimum or float that is infinite or no number.
    ///
    /// # Errors
    /// [`Error::Scale`] with row and block, for floats [`Error::Value`] with row and column.
    pub fn check(&self) -> Result<()> {
        let found = (0..self.rows)
            .into_par_iter()
            .filter_map(|row| Some((row, first_non_finite(self.ty, self.row(row))?)))
            .min_by_key(|&(row, _)| row);
        match found {
            None => Ok(()),
            Some((row, block)) if self.ty.is_quantised() => Err(Error::Scale { row, block }),
            Some((row, column)) => Err(Error::Value { row, column }),
        }
    }

    /// Writes the values of neighbouring rows to `values`, row-major.
    ///
    /// # Errors
    /// [`Error::Row`], and [`Error::Length`] when `values` has another length than those rows.
    pub fn dequantise_rows(&self, rows: Range<usize>, values: &mut [f32]) -> Result<()> {
        let part = self.slice(rows)?;
        check_length("values of the rows", values.len(), part.rows * part.cols)?;
        if part.cols == 0 {
            return Ok(());
        }
        values
            .par_chunks_mut(part.cols)
            .enumerate()
            .for_each(|(row, values)| dequantise_row(part.ty, part.row(row), values));
        Ok(())
    }

    /// The values of all rows, row-major.
    pub fn dequantise(&self) -> Vec<f32> {
        let mut values = vec![0.0; self.rows * self.cols];
        self.dequantise_rows(0..self.rows, &mut values)
            .expect("the length is that of all rows");
        values
    }
}

/// Position of the first block (the first float) of a row that has no finite value.
fn first_non_finite(ty: BlockType, row: &[u8]) -> Option<usize> {
    let mut blocks = row.chunks_exact(ty.block_bytes());
    match (ty, Form::of(ty)) {
        (_, Some(form)) => {
            let mut taken_apart = Block::default();
            blocks.position(|block| {
                taken_apart.read_header(ty, block);
                !taken_apart.is_finite(&form)
            })
        }
        (BlockType::F16, None) => blocks.position(|x| !f16_of(x).is_finite()),
        (BlockType::BF16, None) => blocks.position(|x| !bf16_of(x).is_finite()),
        (_, None) => blocks.position(|x| !f32_of(x).is_finite()),
    }
}

/// The values of a row; lengths must fit.
pub(crate) fn dequantise_row(ty: BlockType, row: &[u8], values: &mut [f32]) {
    let blocks = row.chunks_exact(ty.block_bytes());
    match ty {
        BlockType::F32 => blocks.zip(values).for_each(|(x, v)| *v = f32_of(x)),
        BlockType::F16 => blocks
            .zip(values)
            .for_each(|(x, v)| *v = f16_of(x).to_f32()),
        BlockType::BF16 => blocks
            .zip(values)
            .for_each(|(x, v)| *v = bf16_of(x).to_f32()),
        _ => {
            let mut block = Block::default();
            for (bytes, values) in blocks.zip(values.chunks_exact_mut(ty.block_len())) {
                block.read(ty, bytes);
                block.values(ty, values);
            }
        }
    }
}

fn f32_of(x: &[u8]) -> f32 {
    f32::from_le_bytes([x[0], x[1], x[2], x[3]])
}

fn f16_of(x: &[u8]) -> f16 {
    f16::from_le_bytes([x[0], x[1]])
}

fn bf16_of(x: &[u8]) -> bf16 {
    bf16::from_le_bytes([x[0], x[1]])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quantise;

    fn matrix() -> QuantRows<'static> {
        let values: Vec<f32> = (0..5 * 64)
            .map(|i| ((i * i * 7 + i) % 101) as f32 / 50.0 - 1.0)
            .collect();
        quantise(BlockType::Q4_1, &values, 64, None).unwrap()
    }

    #[test]
    fn selected_rows_keep_their_bytes_and_a_permutation_is_undone_by_its_inverse() {
        let matrix = matrix();
        let order = [3, 0, 4, 1, 2];
        let mut inverse = [0; 5];
        for (to, &from) in order.iter().enumerate() {
            inverse[from] = to;
        }
        let permuted = matrix.select(&order).unwrap();
        assert_eq!(permuted.row(0), matrix.row(3));
        assert_eq!(permuted.select(&inverse).unwrap(), matrix);
        assert_eq!(
            matrix.slice(1..3).unwrap().dequantise(),
            matrix.dequantise()[64..3 * 64]
        );
        assert_eq!(matrix.select(&[1, 5]), Err(Error::Row { row: 5, rows: 5 }));
        assert!(matrix.slice(4..6).is_err());
    }

    #[test]
    fn a_scale_that_is_no_number_is_named_by_row_and_block() {
        let matrix = matrix();
        assert_eq!(matrix.check(), Ok(()));
        for (at, bits) in [(0, 0x7e00u16), (2, 0xfc00)] {
            let mut bytes = matrix.bytes().to_vec();
            let block = (3 * 2 + 1) * 20;
            bytes[block + at..block + at + 2].copy_from_slice(&bits.to_le_bytes());
            let broken = QuantRows::new(BlockType::Q4_1, 5, 64, bytes).unwrap();
            assert_eq!(broken.check(), Err(Error::Scale { row: 3, block: 1 }));
        }
        for ty in [BlockType::F16, BlockType::BF16, BlockType::F32] {
            let mut values = vec![1.0f32; 6];
            let good = quantise(ty, &values, 3, None).unwrap();
            assert_eq!(good.check(), Ok(()));
            values[4] = f32::NAN;
            let mut bytes = good.into_bytes();
            let width = ty.block_bytes();
            bytes[4 * width..5 * width].fill(0xff);
            let broken = QuantRows::new(ty, 2, 3, bytes).unwrap();
            assert_eq!(broken.check(), Err(Error::Value { row: 1, column: 1 }));
        }
    }

    #[test]
    fn other_lengths_than_the_shape_are_refused() {
        assert!(QuantRows::new(BlockType::Q8_0, 2, 64, vec![0; 4 * 34]).is_ok());
        assert!(QuantRows::new(BlockType::Q8_0, 2, 64, vec![0; 4 * 34 - 1]).is_err());
        assert!(QuantRows::new(BlockType::Q8_0, 2, 63, vec![0; 4 * 34]).is_err());
        assert!(QuantRows::new(BlockType::F32, usize::MAX, 4, vec![0; 16]).is_err());
    }
}
