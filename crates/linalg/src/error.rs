//! What can go wrong in a factorisation.

/// An error of a factorisation.
#[derive(Debug, Clone, Copy, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An entry is NaN or infinite.
    #[error("entry {value} at row {row}, column {column}")]
    NotFinite {
        /// Row, counted from 0.
        row: usize,
        /// Column, counted from 0.
        column: usize,
        /// NaN or an infinity.
        value: f64,
    },
    /// The factorisation is one of square matrices.
    #[error("a {rows} × {columns} matrix is not square")]
    NotSquare {
        /// Rows.
        rows: usize,
        /// Columns.
        columns: usize,
    },
    /// A Cholesky factorisation met a pivot that is not positive.
    #[error("the matrix is not positive definite: pivot {pivot} is not positive")]
    NotPositiveDefinite {
        /// Index of the pivot, counted from 0.
        pivot: usize,
    },
    /// The iteration for eigenvalues or singular values did not converge.
    #[error("the iteration for the {values} of a {rows} × {columns} matrix did not converge")]
    NoConvergence {
        /// `eigenvalues` or `singular values`.
        values: &'static str,
        /// Rows.
        rows: usize,
        /// Columns.
        columns: usize,
    },
}

/// Result with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;
