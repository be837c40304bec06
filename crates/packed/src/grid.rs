//! The values that the weights of a row can take, for roundings other than to the nearest.

use crate::block::{Block, Form, IQ4_NL_LEVELS};
use crate::error::check_length;
use crate::quantise::{RowStats, check_finite, check_importance, fit, nearest_code, nearest_level};
use crate::{BlockType, Error, Result};

/// The grid of a row: its scales and minimums as stored, without codes.
///
/// GPTQ fits a grid to the original row, then chooses the code of one column after the other for a row that changes as
/// errors are passed on, and packs the codes at the end.
#[derive(Clone, Debug)]
pub struct RowGrid {
    ty: BlockType,
    form: Form,
    cols: usize,
    /// With codes of 0.
    blocks: Vec<Block>,
    /// Of each sub-block.
    steps: Vec<Step>,
}

#[derive(Clone, Copy, Debug)]
struct Step {
    step: f32,
    offset: f32,
}

impl RowGrid {
    /// The grid to which [`quantise`](crate::quantise()) would round the row.
    ///
    /// # Errors
    /// As [`quantise`](crate::quantise()), for row 0; [`Error::Unsupported`] for types of floats.
    pub fn fit(ty: BlockType, row: &[f32], importance: Option<&[f32]>) -> Result<Self> {
        let form = form_of(ty)?;
        ty.row_bytes(row.len())?;
        check_importance(importance, row.len())?;
        check_finite(row, 0)?;
        let stats = RowStats::of(row);
        let fitted = row.chunks_exact(form.len).enumerate().map(|(i, x)| {
            let columns = i * form.len..(i + 1) * form.len;
            fit(ty, x, importance.map(|v| &v[columns]), &stats)
        });
        Self::from_blocks(ty, fitted.collect())
    }

    /// The grid of a row that is stored.
    ///
    /// # Errors
    /// [`Error::Length`] unless `bytes` are whole blocks, [`Error::Scale`] (of row 0) for scales that are not finite,
    /// [`Error::Unsupported`] for types of floats.
    pub fn from_bytes(ty: BlockType, bytes: &[u8]) -> Result<Self> {
        form_of(ty)?;
        let size = ty.block_bytes();
        let expected = bytes.len() / size * size;
        check_length("bytes of whole blocks", bytes.len(), expected)?;
        let blocks = bytes.chunks_exact(size);
        Self::from_blocks(ty, blocks.map(|bytes| Block::decode(ty, bytes)).collect())
    }

    /// The grid with these scales and minimums, one block after the other. Codes are ignored.
    ///
    /// # Errors
    /// [`Error::Scale`] (of row 0) for scales that are not finite, [`Error::Unsupported`] for types of floats.
    pub fn from_blocks(ty: BlockType, mut blocks: Vec<Block>) -> Result<Self> {
        let form = form_of(ty)?;
        let mut steps = Vec::with_capacity(blocks.len() * form.len / form.sub);
        for (i, block) in blocks.iter_mut().enumerate() {
            if !block.is_finite(&form) {
                return Err(Error::Scale { row: 0, block: i });
            }
            block.codes.fill(0);
            steps.extend((0..form.len / form.sub).map(|b| Step {
                step: block.step(&form, b),
                offset: block.offset(&form, b),
            }));
        }
        Ok(Self {
            ty,
            form,
            cols: blocks.len() * form.len,
            blocks,
            steps,
        })
    }

    /// The type of the blocks.
    pub fn block_type(&self) -> BlockType {
        self.ty
    }

    /// Columns of the row.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The code whose value in `column` is nearest to `value`. Where the scale is 0 every code has the same value.
    ///
    /// # Panics
    /// When there is no such column.
    #[inline]
    pub fn code(&self, column: usize, value: f32) -> u8 {
        let Step { step, offset } = self.steps[column / self.form.sub];
        if step == 0.0 {
            return self.form.zero;
        }
        let steps = (value - offset) / step;
        match self.ty {
            BlockType::IQ4_NL => nearest_level(steps),
            _ => nearest_code(
                steps,
                f32::from(self.form.zero),
                f32::from(self.form.max_code()),
            ),
        }
    }

    /// The value of a code in `column`, as dequantising gives it.
    ///
    /// # Panics
    /// When there is no such column.
    #[inline]
    pub fn value(&self, column: usize, code: u8) -> f32 {
        let Step { step, offset } = self.steps[column / self.form.sub];
        let centred = match self.ty {
            BlockType::IQ4_NL => f32::from(IQ4_NL_LEVELS[usize::from(code & 15)]),
            _ => (i32::from(code) - i32::from(self.form.zero)) as f32,
        };
        step * centred + offset
    }

    /// The bytes of the row with these codes, one for each column.
    ///
    /// # Errors
    /// [`Error::Length`] unless there is one code for each column, [`Error::Code`] for a code that the type's bits do not hold.
    pub fn pack(&self, codes: &[u8]) -> Result<Vec<u8>> {
        check_length("codes of the row", codes.len(), self.cols)?;
        let most = self.form.max_code();
        if let Some(column) = codes.iter().position(|&code| code > most) {
            return Err(Error::Code {
                row: 0,
                column,
                most,
            });
        }
        let size = self.ty.block_bytes();
        let mut bytes = vec![0; self.blocks.len() * size];
        let parts = codes.chunks_exact(self.form.len).zip(&self.blocks);
        for (bytes, (codes, block)) in bytes.chunks_exact_mut(size).zip(parts) {
            let mut block = *block;
            block.codes[..codes.len()].copy_from_slice(codes);
            block.encode(self.ty, bytes);
        }
        Ok(bytes)
    }
}

fn form_of(ty: BlockType) -> Result<Form> {
    Form::of(ty).ok_or(Error::Unsupported {
        ty,
        reason: "floats have no grid",
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{QuantRows, quantise};

    fn row() -> Vec<f32> {
        let wave = |i: usize| ((i * i * 7 + i * 13) % 257) as f32 / 64.0 - 2.0;
        (0..512).map(wave).collect()
    }

    #[test]
    fn nearest_codes_on_the_fitted_grid_are_what_quantise_stores_in_k_blocks() {
        let importance: Vec<f32> = (0..512).map(|i| ((i * 11) % 17 + 1) as f32).collect();
        for ty in [
            BlockType::Q2_K,
            BlockType::Q3_K,
            BlockType::Q4_K,
            BlockType::Q5_K,
            BlockType::Q6_K,
        ] {
            for importance in [None, Some(importance.as_slice())] {
                let grid = RowGrid::fit(ty, &row(), importance).unwrap();
                let nearest = row()
                    .iter()
                    .enumerate()
                    .map(|(i, &x)| grid.code(i, x))
                    .collect::<Vec<_>>();
                let stored = quantise(ty, &row(), 512, importance).unwrap();
                assert_eq!(grid.pack(&nearest).unwrap(), stored.bytes(), "{ty}");
                let values: Vec<f32> = (0..512).map(|i| grid.value(i, nearest[i])).collect();
                assert_eq!(values, stored.dequantise(), "{ty}");
            }
        }
    }

    #[test]
    fn no_other_code_is_nearer_and_values_are_those_of_the_packed_row() {
        for ty in BlockType::ALL.into_iter().filter(|ty| ty.is_quantised()) {
            let grid = RowGrid::fit(ty, &row(), None).unwrap();
            let most = Form::of(ty).unwrap().max_code();
            let error = |i: usize, code: u8| (grid.value(i, code) - row()[i]).abs();
            let mut codes = vec![0; 512];
            for (i, &x) in row().iter().enumerate() {
                codes[i] = grid.code(i, x);
                let best = (0..=most)
                    .map(|code| error(i, code))
                    .fold(f32::MAX, f32::min);
                assert!(error(i, codes[i]) <= best * 1.0001 + 1e-6, "{ty} {i}");
            }
            let bytes = grid.pack(&codes).unwrap();
            let again = RowGrid::from_bytes(ty, &bytes).unwrap();
            let packed = QuantRows::new(ty, 1, 512, bytes).unwrap().dequantise();
            for (i, &code) in codes.iter().enumerate() {
                assert_eq!(grid.value(i, code), packed[i], "{ty}");
                assert_eq!(again.value(i, code), packed[i], "{ty}");
            }
            codes[3] = most.saturating_add(1);
            assert_eq!(grid.pack(&codes).is_err(), most < u8::MAX);
            assert!(grid.pack(&codes[1..]).is_err());
        }
        assert!(RowGrid::fit(BlockType::F16, &row(), None).is_err());
    }
}
