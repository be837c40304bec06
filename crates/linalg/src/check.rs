//! Checks of a factorisation's input.

use faer::MatRef;
use rayon::prelude::*;

use crate::{Error, Result};

/// Checks that every entry is finite.
///
/// # Errors
/// [`Error::NotFinite`] with the first entry, column by column, that is NaN or infinite.
pub fn check_finite(matrix: MatRef<'_, f64>) -> Result<()> {
    let bad = (0..matrix.ncols())
        .into_par_iter()
        .find_map_first(|column| first_not_finite(matrix, column, 0));
    bad.map_or(Ok(()), Err)
}

/// The same of the lower triangle, where the upper one is not read.
pub(crate) fn check_lower(matrix: MatRef<'_, f64>) -> Result<()> {
    let bad = (0..matrix.ncols())
        .into_par_iter()
        .find_map_first(|column| first_not_finite(matrix, column, column));
    bad.map_or(Ok(()), Err)
}

fn first_not_finite(matrix: MatRef<'_, f64>, column: usize, from: usize) -> Option<Error> {
    (from..matrix.nrows())
        .map(|row| (row, matrix[(row, column)]))
        .find(|(_, value)| !value.is_finite())
        .map(|(row, value)| Error::NotFinite { row, column, value })
}

pub(crate) fn check_square(matrix: MatRef<'_, f64>) -> Result<()> {
    let (rows, columns) = matrix.shape();
    if rows == columns {
        Ok(())
    } else {
        Err(Error::NotSquare { rows, columns })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use faer::Mat;

    #[test]
    fn the_first_entry_that_is_not_finite_is_named() {
        let mut matrix = Mat::<f64>::zeros(4, 3);
        assert_eq!(check_finite(matrix.as_ref()), Ok(()));
        matrix[(0, 2)] = f64::INFINITY;
        assert_eq!(check_lower(matrix.as_ref()), Ok(()));
        let error = check_finite(matrix.as_ref());
        assert!(matches!(
            error,
            Err(Error::NotFinite {
                row: 0,
                column: 2,
                ..
            })
        ));
        matrix[(3, 1)] = f64::NAN;
        for error in [check_finite(matrix.as_ref()), check_lower(matrix.as_ref())] {
            assert!(matches!(
                error,
                Err(Error::NotFinite {
                    row: 3,
                    column: 1,
                    ..
                })
            ));
        }
    }
}
