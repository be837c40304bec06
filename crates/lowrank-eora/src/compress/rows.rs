//! A weight laid out by rows, as compressors work on it: one output's weights lie side by side.

use candle_core::{DType, Device, Tensor};
use faer::{Mat, MatRef};
use rayon::prelude::*;

use crate::{Error, Result};

/// Rows and columns of the tiles in which matrices are transposed, so that both sides stay in cache.
const TILE: usize = 32;

/// Rows that are worked on together.
pub(crate) const STRIP: usize = 64;

/// A matrix in row-major order.
#[derive(Debug, Clone)]
pub(crate) struct Rows {
    data: Vec<f64>,
    rows: usize,
    cols: usize,
}

impl Rows {
    /// Takes `rows · cols` values.
    pub(crate) fn new(data: Vec<f64>, rows: usize, cols: usize) -> Self {
        debug_assert_eq!(data.len(), rows * cols);
        Self { data, rows, cols }
    }

    /// Copies a matrix and checks that it is finite.
    pub(crate) fn read(matrix: MatRef<'_, f64>, what: &'static str) -> Result<Self> {
        let (rows, cols) = matrix.shape();
        let mut data = vec![0.0; rows * cols];
        transpose(&mut data, cols, |row, column| matrix[(row, column)]);
        match data.par_iter().position_first(|value| !value.is_finite()) {
            None => Ok(Self { data, rows, cols }),
            Some(at) => Err(Error::NotFinite {
                what,
                row: at / cols,
                column: at % cols,
                value: data[at],
            }),
        }
    }

    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    pub(crate) fn cols(&self) -> usize {
        self.cols
    }

    pub(crate) fn data(&self) -> &[f64] {
        &self.data
    }

    pub(crate) fn data_mut(&mut self) -> &mut [f64] {
        &mut self.data
    }

    /// As a tensor `[rows, cols]`.
    pub(crate) fn to_tensor(&self, dtype: DType, device: &Device) -> Result<Tensor> {
        let tensor = Tensor::from_slice(&self.data, (self.rows, self.cols), &Device::Cpu)?;
        Ok(tensor.to_dtype(dtype)?.to_device(device)?)
    }

    pub(crate) fn to_mat(&self) -> Mat<f64> {
        let mut columns = vec![0.0; self.data.len()];
        transpose(&mut columns, self.rows, |column, row| {
            self.data[row * self.cols + column]
        });
        MatRef::from_column_major_slice(&columns, self.rows, self.cols).to_owned()
    }
}

/// Fills lines of `length` values, tile by tile, from `value(line, position)`.
pub(crate) fn transpose(
    lines: &mut [f64],
    length: usize,
    value: impl Fn(usize, usize) -> f64 + Sync,
) {
    if length == 0 {
        return;
    }
    lines
        .par_chunks_mut(TILE * length)
        .enumerate()
        .for_each(|(tile, lines)| {
            for start in (0..length).step_by(TILE) {
                let end = (start + TILE).min(length);
                for (i, line) in lines.chunks_mut(length).enumerate() {
                    for (j, target) in (start..end).zip(&mut line[start..end]) {
                        *target = value(tile * TILE + i, j);
                    }
                }
            }
        });
}
