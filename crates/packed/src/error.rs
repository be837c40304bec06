//! What can be wrong with packed weights.

use crate::BlockType;

/// Errors of this crate. Rows, columns and blocks are counted from 0; a block's number is that within its row.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No type has this name.
    #[error("unknown block type `{0}`")]
    UnknownType(String),
    /// No set of instructions has this name.
    #[error("`{0}` is no instruction level of this architecture ({known})", known = crate::level::names())]
    UnknownLevel(String),
    /// A row is no multiple of the type's block.
    #[error("rows of {cols} values are not whole {ty} blocks of {}", ty.block_len())]
    Columns {
        /// The type.
        ty: BlockType,
        /// Values of a row.
        cols: usize,
    },
    /// A slice has another length than the shape asks for.
    #[error("{what}: {found} given, {expected} expected")]
    Length {
        /// What the slice holds.
        what: &'static str,
        /// Its length.
        found: usize,
        /// The length that fits.
        expected: usize,
    },
    /// A row that the matrix does not have.
    #[error("row {row} of a matrix of {rows} rows")]
    Row {
        /// The row asked for.
        row: usize,
        /// Rows of the matrix.
        rows: usize,
    },
    /// A scale or a minimum in a block is infinite or no number.
    #[error("row {row}, block {block}: a scale is not finite")]
    Scale {
        /// Row of the matrix.
        row: usize,
        /// Block of the row (group, for grouped integers).
        block: usize,
    },
    /// A value is infinite or no number.
    #[error("row {row}, column {column}: the value is not finite")]
    Value {
        /// Row of the matrix.
        row: usize,
        /// Column of the matrix.
        column: usize,
    },
    /// A value or the scale of its block is beyond the range of the floats that the type stores.
    #[error("row {row}, block {block}: too large for {ty}")]
    Overflow {
        /// The type.
        ty: BlockType,
        /// Row of the matrix.
        row: usize,
        /// Block of the row.
        block: usize,
    },
    /// An importance is negative, infinite or no number.
    #[error("column {column}: the importance is not a finite number of at least 0")]
    Importance {
        /// Column of the matrix.
        column: usize,
    },
    /// A code that the bits do not hold.
    #[error("row {row}, column {column}: the code is above {most}")]
    Code {
        /// Row of the matrix.
        row: usize,
        /// Column of the matrix.
        column: usize,
        /// The largest code.
        most: u8,
    },
    /// Factors of low rank that are quantised.
    #[error("factors of low rank must be floats")]
    Factors,
    /// Groups of a width that no kernel serves.
    #[error("groups of {0} columns, expected 16 or a multiple of 32")]
    GroupWidth(usize),
    /// Groups of unequal widths, which no kernel serves.
    #[error("the group index does not give every group its width")]
    GroupIndex,
    /// A scale that f16, in which scales of groups are stored, does not hold exactly.
    #[error("row {row}, group {group}: the scale is no f16 value")]
    GroupScale {
        /// Row of the matrix.
        row: usize,
        /// Group of the row.
        group: usize,
    },
    /// A type that the call does not serve.
    #[error("{ty}: {reason}")]
    Unsupported {
        /// The type.
        ty: BlockType,
        /// Why.
        reason: &'static str,
    },
}

/// Results of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// An error unless `found` is `expected`.
pub(crate) fn check_length(what: &'static str, found: usize, expected: usize) -> Result<()> {
    match found == expected {
        true => Ok(()),
        false => Err(Error::Length {
            what,
            found,
            expected,
        }),
    }
}
