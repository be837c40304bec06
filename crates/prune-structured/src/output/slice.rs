//! Cutting rows and columns out of stored matrices, without looking at the values.

use rayon::prelude::*;

/// The rows `rows` of a matrix whose rows have `row_bytes` bytes.
pub(crate) fn rows(matrix: &[u8], row_bytes: usize, rows: &[usize]) -> Vec<u8> {
    let mut out = Vec::with_capacity(rows.len() * row_bytes);
    for &row in rows {
        out.extend_from_slice(&matrix[row * row_bytes..][..row_bytes]);
    }
    out
}

/// The columns `columns` (ascending) of a matrix with `width` columns of `element` bytes.
pub(crate) fn columns(matrix: &[u8], width: usize, element: usize, columns: &[usize]) -> Vec<u8> {
    let runs = runs(columns);
    let mut out = vec![0u8; matrix.len() / width * columns.len()];
    out.par_chunks_mut((columns.len() * element).max(1))
        .zip(matrix.par_chunks(width * element))
        .for_each(|(out, row)| {
            let mut at = 0;
            for &(start, len) in &runs {
                let bytes = len * element;
                out[at..at + bytes].copy_from_slice(&row[start * element..][..bytes]);
                at += bytes;
            }
        });
    out
}

/// Zeroes the rows `rows`.
pub(crate) fn zero_rows(matrix: &mut [u8], row_bytes: usize, rows: &[usize]) {
    for &row in rows {
        matrix[row * row_bytes..][..row_bytes].fill(0);
    }
}

/// Zeroes the columns `columns` (ascending).
pub(crate) fn zero_columns(matrix: &mut [u8], width: usize, element: usize, columns: &[usize]) {
    let runs = runs(columns);
    matrix.par_chunks_mut(width * element).for_each(|row| {
        for &(start, len) in &runs {
            row[start * element..][..len * element].fill(0);
        }
    });
}

/// Ascending ids as runs of consecutive ones: `(start, length)`.
fn runs(ids: &[usize]) -> Vec<(usize, usize)> {
    ids.chunk_by(|a, b| a + 1 == *b)
        .map(|run| (run[0], run.len()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compensation::complement;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn slicing_is_indexing(
            (width, ids) in (1usize..20).prop_flat_map(|w| (Just(w), prop::collection::btree_set(0..w, 0..=w))),
            height in 1usize..10,
            element in 1usize..5,
        ) {
            let ids: Vec<usize> = ids.into_iter().collect();
            let matrix: Vec<u8> = (0..height * width * element).map(|i| i as u8).collect();
            let by_index: Vec<u8> = (0..height)
                .flat_map(|r| ids.iter().map(move |c| (r, *c)))
                .flat_map(|(r, c)| matrix[(r * width + c) * element..][..element].to_vec())
                .collect();
            prop_assert_eq!(columns(&matrix, width, element, &ids), by_index);
            let mut masked = matrix.clone();
            zero_columns(&mut masked, width, element, &complement(&ids, width));
            prop_assert_eq!(columns(&masked, width, element, &ids), columns(&matrix, width, element, &ids));
            prop_assert!(columns(&masked, width, element, &complement(&ids, width)).iter().all(|&b| b == 0));
            // Rows of the matrix read as one of width `height`.
            let row_bytes = height * element;
            let picked: Vec<u8> = ids.iter().flat_map(|r| matrix[r * row_bytes..][..row_bytes].to_vec()).collect();
            prop_assert_eq!(rows(&matrix, row_bytes, &ids), picked);
        }
    }
}
