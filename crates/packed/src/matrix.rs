//! Matrices that are ready to be multiplied.

use std::fmt;
use std::sync::Arc;

use crate::error::check_length;
use crate::kernel::tail::Float;
use crate::rows::dequantise_row;
use crate::tile::{Layout, Tiles};
use crate::{BlockType, Error, GroupBits, Groups, QuantRows, Result};

/// Bytes that a matrix keeps a share of: a `Vec<u8>`, or the part of a mapped file.
pub type SharedBytes = Arc<dyn AsRef<[u8]> + Send + Sync>;

/// A matrix `[rows, cols]` to be multiplied with tokens: floats in place, or quantised weights in tiles of 16 rows. Cloning
/// shares the weights.
#[derive(Clone, Debug)]
pub struct Matrix {
    pub(crate) weight: Weight,
}

#[derive(Clone, Debug)]
pub(crate) enum Weight {
    Dense(DenseRows),
    Tiles {
        tiles: Arc<Tiles>,
        /// Columns in the order of the tiles, unless they are in their own.
        order: Option<Arc<[u32]>>,
    },
}

/// Rows of floats, little-endian.
#[derive(Clone)]
pub(crate) struct DenseRows {
    pub(crate) ty: BlockType,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    bytes: SharedBytes,
}

impl DenseRows {
    /// The checked length's bytes.
    pub(crate) fn data(&self) -> &[u8] {
        let expected = self.rows * self.cols * self.ty.block_bytes();
        &(*self.bytes).as_ref()[..expected]
    }

    pub(crate) fn float(&self) -> Float {
        match self.ty {
            BlockType::F16 => Float::F16,
            BlockType::BF16 => Float::BF16,
            _ => Float::F32,
        }
    }
}

impl fmt::Debug for DenseRows {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DenseRows")
            .field("ty", &self.ty)
            .field("rows", &self.rows)
            .field("cols", &self.cols)
            .finish_non_exhaustive()
    }
}

/// What the weights of a matrix are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Kind {
    /// Floats.
    Dense(BlockType),
    /// Blocks of a quantised type.
    Blocks(BlockType),
    /// Grouped integers.
    Groups {
        /// Bits of a code.
        bits: GroupBits,
        /// Whether zeros are stored.
        zeros: bool,
    },
}

impl Matrix {
    /// Packs the rows of a quantised type into tiles, in parallel, or copies floats.
    ///
    /// # Errors
    /// As [`QuantRows::check`], for scales and floats that are not finite.
    pub fn from_rows(rows: &QuantRows<'_>) -> Result<Self> {
        rows.check()?;
        let ty = rows.block_type();
        let weight = match ty.is_quantised() {
            true => Weight::Tiles {
                tiles: Arc::new(Tiles::from_rows(rows)),
                order: None,
            },
            false => Weight::Dense(DenseRows {
                ty,
                rows: rows.rows(),
                cols: rows.cols(),
                bytes: Arc::new(rows.bytes().to_vec()),
            }),
        };
        Ok(Self { weight })
    }

    /// Packs grouped integers into tiles, in parallel.
    pub fn from_groups(groups: &Groups) -> Self {
        Self {
            weight: Weight::Tiles {
                tiles: Arc::new(Tiles::from_groups(groups)),
                order: groups.order().map(Arc::from),
            },
        }
    }

    /// Floats in place, little-endian and row-major. They need no alignment.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for quantised types, [`Error::Length`] when there are more or fewer bytes than the shape has,
    /// [`Error::Value`] for values that are not finite.
    pub fn dense(ty: BlockType, rows: usize, cols: usize, bytes: SharedBytes) -> Result<Self> {
        if ty.is_quantised() {
            let reason = "blocks are packed by `Matrix::from_rows`";
            return Err(Error::Unsupported { ty, reason });
        }
        QuantRows::new(ty, rows, cols, (*bytes).as_ref())?.check()?;
        Ok(Self {
            weight: Weight::Dense(DenseRows {
                ty,
                rows,
                cols,
                bytes,
            }),
        })
    }

    /// Rows (outputs).
    pub fn rows(&self) -> usize {
        match &self.weight {
            Weight::Dense(dense) => dense.rows,
            Weight::Tiles { tiles, .. } => tiles.rows(),
        }
    }

    /// Columns (inputs).
    pub fn cols(&self) -> usize {
        match &self.weight {
            Weight::Dense(dense) => dense.cols,
            Weight::Tiles { tiles, .. } => tiles.cols(),
        }
    }

    /// Bytes that a product reads.
    pub fn bytes(&self) -> usize {
        match &self.weight {
            Weight::Dense(dense) => dense.data().len(),
            Weight::Tiles { tiles, .. } => tiles.bytes(),
        }
    }

    /// What the weights are.
    pub fn kind(&self) -> Kind {
        match &self.weight {
            Weight::Dense(dense) => Kind::Dense(dense.ty),
            Weight::Tiles { tiles, .. } => match tiles.layout() {
                Layout::Blocks(ty) => Kind::Blocks(ty),
                Layout::Groups(layout) => Kind::Groups {
                    bits: GroupBits::new(layout.bits).expect("made from group bits"),
                    zeros: layout.zeros,
                },
            },
        }
    }

    /// Writes the values of a row, such as that of a token in an embedding.
    ///
    /// # Errors
    /// [`Error::Row`], and [`Error::Length`] when `values` is not one row.
    pub fn row(&self, row: usize, values: &mut [f32]) -> Result<()> {
        let rows = self.rows();
        if row >= rows {
            return Err(Error::Row { row, rows });
        }
        check_length("values of a row", values.len(), self.cols())?;
        match &self.weight {
            Weight::Dense(dense) => {
                let row_bytes = dense.cols * dense.ty.block_bytes();
                let bytes = &dense.data()[row * row_bytes..][..row_bytes];
                dequantise_row(dense.ty, bytes, values);
            }
            Weight::Tiles { tiles, order: None } => tiles.row_values(row, values),
            Weight::Tiles {
                tiles,
                order: Some(order),
            } => {
                let mut in_order = vec![0.0; values.len()];
                tiles.row_values(row, &mut in_order);
                for (&column, value) in order.iter().zip(in_order) {
                    values[column as usize] = value;
                }
            }
        }
        Ok(())
    }

    /// All values, row-major.
    pub fn dequantise(&self) -> Vec<f32> {
        let (rows, cols) = (self.rows(), self.cols());
        let mut values = vec![0.0; rows * cols];
        for (row, values) in values.chunks_exact_mut(cols.max(1)).enumerate() {
            self.row(row, values).expect("a row of the matrix");
        }
        values
    }

    /// The bytes that the matrix was made from; None for grouped integers.
    pub fn to_rows(&self) -> Option<QuantRows<'_>> {
        let (rows, cols) = (self.rows(), self.cols());
        match &self.weight {
            Weight::Dense(dense) => QuantRows::new(dense.ty, rows, cols, dense.data()).ok(),
            Weight::Tiles { tiles, .. } => {
                let Layout::Blocks(ty) = tiles.layout() else {
                    return None;
                };
                let row_bytes = ty.row_bytes(cols).ok()?;
                let mut bytes = vec![0; rows * row_bytes];
                for (row, bytes) in bytes.chunks_exact_mut(row_bytes.max(1)).enumerate() {
                    tiles.row_bytes(ty, row, bytes);
                }
                QuantRows::new(ty, rows, cols, bytes).ok()
            }
        }
    }
}
