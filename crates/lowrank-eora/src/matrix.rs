//! Between candle's row-major tensors and faer's column-major matrices.

use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use faer::linalg::matmul::triangular::{self, BlockStructure};
use faer::{Accum, Mat, MatMut, MatRef, Par};
use rayon::prelude::*;

/// A `[rows, cols]` tensor of any float dtype as a matrix.
///
/// # Errors
/// When the tensor is not two-dimensional or holds a NaN or an infinity; `what` names it.
pub fn from_tensor(tensor: &Tensor, what: &'static str) -> Result<Mat<f64>> {
    let &[rows, cols] = tensor.dims() else {
        let cols = tensor.dims().last().copied().unwrap_or(1);
        return Err(Error::Shape {
            what,
            found: tensor.dims().to_vec(),
            expected: vec![tensor.elem_count() / cols.max(1), cols],
        });
    };
    let values = tensor
        .to_device(&Device::Cpu)?
        .to_dtype(DType::F64)?
        .flatten_all()?
        .to_vec1::<f64>()?;
    let matrix = MatRef::from_row_major_slice(&values, rows, cols).to_owned();
    check_finite(matrix.as_ref(), what)?;
    Ok(matrix)
}

/// A matrix as a `[rows, cols]` tensor.
///
/// # Errors
/// When the device has no room.
pub fn to_tensor(matrix: MatRef<'_, f64>, dtype: DType, device: &Device) -> Result<Tensor> {
    let (rows, cols) = matrix.shape();
    let mut values = vec![0f64; rows * cols];
    MatMut::from_row_major_slice_mut(&mut values, rows, cols).copy_from(matrix);
    Ok(Tensor::from_vec(values, (rows, cols), &Device::Cpu)?
        .to_dtype(dtype)?
        .to_device(device)?)
}

/// D = W − W_c of two `[outputs, inputs]` tensors, subtracted in f64.
///
/// # Errors
/// When shapes differ or an entry is not finite.
pub fn residual(weight: &Tensor, compressed: &Tensor) -> Result<Mat<f64>> {
    let mut d = from_tensor(weight, "weight")?;
    let compressed = from_tensor(compressed, "compressed weight")?;
    expect_shape("compressed weight", compressed.as_ref(), d.shape())?;
    d -= compressed;
    Ok(d)
}

pub(crate) fn expect_shape(
    what: &'static str,
    found: MatRef<'_, f64>,
    (rows, cols): (usize, usize),
) -> Result<()> {
    if found.shape() == (rows, cols) {
        return Ok(());
    }
    Err(Error::Shape {
        what,
        found: vec![found.nrows(), found.ncols()],
        expected: vec![rows, cols],
    })
}

pub(crate) fn check_finite(matrix: MatRef<'_, f64>, what: &'static str) -> Result<()> {
    let bad = (0..matrix.ncols()).into_par_iter().find_map_first(|col| {
        let bad = matrix
            .col(col)
            .iter()
            .enumerate()
            .find(|(_, value)| !value.is_finite());
        bad.map(|(row, &value)| (row, col, value))
    });
    match bad {
        None => Ok(()),
        Some((row, col, value)) => Err(Error::NotFinite {
            what,
            row,
            column: col,
            value,
        }),
    }
}

/// Copies the lower triangle over the upper one, in squares that fit a cache.
pub(crate) fn mirror_lower(matrix: &mut Mat<f64>) {
    const SIDE: usize = 64;
    let n = matrix.ncols();
    for left in (0..n).step_by(SIDE) {
        for top in (left..n).step_by(SIDE) {
            for j in left..n.min(left + SIDE) {
                for i in top.max(j + 1)..n.min(top + SIDE) {
                    matrix[(j, i)] = matrix[(i, j)];
                }
            }
        }
    }
}

/// acc += a bᵀ on the lower triangle, where the product is symmetric.
pub(crate) fn add_symmetric(acc: &mut Mat<f64>, a: MatRef<'_, f64>, b: MatRef<'_, f64>) {
    triangular::matmul(
        acc.as_mut(),
        BlockStructure::TriangularLower,
        Accum::Add,
        a,
        BlockStructure::Rectangular,
        b.transpose(),
        BlockStructure::Rectangular,
        1.0,
        Par::rayon(0),
    );
}

/// Columns of a panel and rows of a tile: a tile of products stays in a core's cache, and small
/// matrices still make enough panels for all cores.
const fn panel(cols: usize) -> usize {
    if cols >= 2048 { 256 } else { 64 }
}
const TILE: usize = 512;

/// Which entries of a sum of products are kept.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Entries {
    /// The lower triangle, down to whole panels.
    Lower,
    /// All.
    All,
}

/// acc += scale · a bᵀ with f32 products and f64 sums; a and b hold one token per column.
///
/// Tiles are fixed by the shape alone, so that the result does not depend on the thread count.
pub(crate) fn add_products(
    acc: &mut Mat<f64>,
    a: MatRef<'_, f32>,
    b: MatRef<'_, f32>,
    scale: f64,
    entries: Entries,
) {
    let rows = acc.nrows();
    let width = panel(acc.ncols());
    acc.as_mut()
        .par_col_chunks_mut(width)
        .enumerate()
        .for_each(|(panel, mut acc)| {
            let (first, cols) = (panel * width, acc.ncols());
            let b = b.subrows(first, cols).transpose();
            let mut tile = Mat::<f32>::zeros(TILE.min(rows), cols);
            let mut top = if entries == Entries::Lower { first } else { 0 };
            while top < rows {
                let height = TILE.min(rows - top);
                let mut tile = tile.as_mut().subrows_mut(0, height);
                faer::linalg::matmul::matmul(
                    tile.as_mut(),
                    Accum::Replace,
                    a.subrows(top, height),
                    b,
                    1.0,
                    Par::Seq,
                );
                for j in 0..cols {
                    let sums = acc.as_mut().col_mut(j).subrows_mut(top, height);
                    let products = tile.as_ref().col(j).try_as_col_major();
                    let (Some(sums), Some(products)) = (sums.try_as_col_major_mut(), products)
                    else {
                        unreachable!("matrices that own their entries are column-major");
                    };
                    for (sum, &product) in sums.as_slice_mut().iter_mut().zip(products.as_slice()) {
                        *sum += scale * f64::from(product);
                    }
                }
                top += height;
            }
        });
}
