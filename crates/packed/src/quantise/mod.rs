//! Rounding to blocks, byte for byte as ggml's reference quantiser does it.
//!
//! Sums run over a block from its first value to its last in f32, without fused multiply-adds: other orders choose
//! other codes in a few blocks of a thousand. Rows are independent, so the result does not depend on threads.

mod block;
mod search;

use half::{bf16, f16};
use rayon::prelude::*;

use block::recode;
pub(crate) use block::{RowStats, fit, nearest_code, nearest_level};

use crate::block::Form;
use crate::error::check_length;
use crate::{BlockType, Error, QuantRows, Result};

/// Rounds a matrix of rows of `cols` values to `ty`.
///
/// `importance` weights the error of each column, as the mean square of a linear layer's inputs does; without it the
/// weights follow from the values, as in ggml without an importance matrix. [`BlockType::Q8_0`] and floats ignore it.
///
/// # Errors
/// [`Error::Columns`] when rows are not whole blocks, [`Error::Length`] when `values` are not whole rows or `importance`
/// is not one number a column, [`Error::Value`] and [`Error::Importance`] for numbers that are not finite,
/// [`Error::Overflow`] when a scale or value is beyond 65504, the largest f16 (or the largest bf16).
pub fn quantise(
    ty: BlockType,
    values: &[f32],
    cols: usize,
    importance: Option<&[f32]>,
) -> Result<QuantRows<'static>> {
    let row_bytes = ty.row_bytes(cols)?;
    let rows = values.len().checked_div(cols).unwrap_or(0);
    check_length("values of the matrix", values.len(), rows * cols)?;
    check_importance(importance, cols)?;
    let mut bytes = vec![0; rows * row_bytes];
    if !bytes.is_empty() {
        bytes
            .par_chunks_mut(row_bytes)
            .zip(values.par_chunks(cols))
            .enumerate()
            .map(|(row, (bytes, values))| quantise_row(ty, values, importance, bytes, row))
            // Of several errors the first row's, whatever the threads.
            .find_first(Result::is_err)
            .unwrap_or(Ok(()))?;
    }
    QuantRows::new(ty, rows, cols, bytes)
}

pub(crate) fn check_importance(importance: Option<&[f32]>, cols: usize) -> Result<()> {
    let Some(importance) = importance else {
        return Ok(());
    };
    check_length("importances", importance.len(), cols)?;
    match importance
        .iter()
        .position(|&v| !(v >= 0.0 && v.is_finite()))
    {
        Some(column) => Err(Error::Importance { column }),
        None => Ok(()),
    }
}

pub(crate) fn check_finite(values: &[f32], row: usize) -> Result<()> {
    match values.iter().position(|value| !value.is_finite()) {
        Some(column) => Err(Error::Value { row, column }),
        None => Ok(()),
    }
}

/// Rounds a row; `row` is its number, for errors.
fn quantise_row(
    ty: BlockType,
    values: &[f32],
    importance: Option<&[f32]>,
    bytes: &mut [u8],
    row: usize,
) -> Result<()> {
    check_finite(values, row)?;
    let pieces = bytes.chunks_exact_mut(ty.block_bytes()).enumerate();
    let overflow = |block| Error::Overflow { ty, row, block };
    let Some(form) = Form::of(ty) else {
        for ((i, bytes), &value) in pieces.zip(values) {
            let finite = match ty {
                BlockType::F16 => {
                    let half = f16::from_f32(value);
                    bytes.copy_from_slice(&half.to_le_bytes());
                    half.is_finite()
                }
                BlockType::BF16 => {
                    let half = bf16::from_f32(value);
                    bytes.copy_from_slice(&half.to_le_bytes());
                    half.is_finite()
                }
                _ => {
                    bytes.copy_from_slice(&value.to_le_bytes());
                    true
                }
            };
            if !finite {
                return Err(overflow(i));
            }
        }
        return Ok(());
    };
    let stats = RowStats::of(values);
    for (i, bytes) in pieces {
        let columns = i * form.len..(i + 1) * form.len;
        let values = &values[columns.clone()];
        let importance = importance.map(|v| &v[columns]);
        let mut block = fit(ty, values, importance, &stats);
        if !block.is_finite(&form) {
            return Err(overflow(i));
        }
        if form.has_sub_scales() {
            recode(ty, &form, values, &mut block);
        }
        block.encode(ty, bytes);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_beyond_the_range_of_a_type_are_refused_by_place() {
        let mut values = vec![0.5f32; 3 * 64];
        values[64 + 40] = 2e8;
        let overflow = |ty, block| Err(Error::Overflow { ty, row: 1, block });
        for ty in [BlockType::Q4_0, BlockType::Q8_0, BlockType::Q4_1] {
            assert_eq!(quantise(ty, &values, 64, None).map(|_| ()), overflow(ty, 1));
        }
        let f16 = quantise(BlockType::F16, &values, 64, None).map(|_| ());
        assert_eq!(f16, overflow(BlockType::F16, 40));
        assert!(quantise(BlockType::BF16, &values, 64, None).is_ok());
        values[64 + 3] = f32::INFINITY;
        let found = quantise(BlockType::Q5_1, &values, 64, None).map(|_| ());
        assert_eq!(found, Err(Error::Value { row: 1, column: 3 }));
    }

    #[test]
    fn importances_must_be_numbers_of_at_least_zero() {
        let values = vec![0.5f32; 64];
        for bad in [-1.0, f32::NAN, f32::INFINITY] {
            let mut importance = vec![1.0; 32];
            importance[7] = bad;
            assert_eq!(
                quantise(BlockType::Q4_0, &values, 32, Some(&importance)).map(|_| ()),
                Err(Error::Importance { column: 7 })
            );
        }
        assert!(quantise(BlockType::Q4_0, &values, 32, Some(&[1.0; 31])).is_err());
        assert!(quantise(BlockType::Q4_0, &values, 32, Some(&[0.0; 32])).is_ok());
    }

    #[test]
    fn values_of_a_block_with_its_extreme_code_round_to_themselves() {
        for (ty, extreme) in [
            (BlockType::Q4_0, 0u8),
            (BlockType::Q5_0, 0),
            (BlockType::Q8_0, 255),
        ] {
            let form = Form::of(ty).unwrap();
            for seed in 0..50 {
                let mut block = crate::Block {
                    d: f16::from_f32(0.01 * (seed as f32 - 25.5)),
                    ..crate::Block::default()
                };
                if ty == BlockType::Q8_0 {
                    block.d = f16::from_f32(block.d.to_f32().abs());
                }
                for (i, code) in block.codes[..32].iter_mut().enumerate() {
                    // 8-bit codes below -127 do not come from rounding.
                    *code = ((i * 37 + seed * 11) as u8 & form.max_code()).max(1);
                }
                block.codes[seed % 32] = extreme;
                let mut values = [0.0; 32];
                block.values(ty, &mut values);
                let back = quantise(ty, &values, 32, None).unwrap();
                assert_eq!(back.dequantise(), values, "{ty} {seed}");
            }
        }
    }
}
