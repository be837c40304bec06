//! Rounding to the nearest value of a grid.

use rayon::prelude::*;

use super::grid::Grid;
use super::quantised::Quantised;
use super::rows::Rows;

/// Rounds every weight in place; zeros stay exactly zero.
pub(crate) fn round(rows: &mut Rows, grid: &Grid) -> Quantised {
    let (m, n) = (rows.rows(), rows.cols());
    let width = grid.group.width(n);
    let groups = grid.group.count(n);
    let mut codes = vec![0; m * n];
    let mut scales = vec![0.0; m * groups];
    let mut zeros = vec![0; m * groups];
    let mut offsets = vec![0.0; m * groups];
    if n > 0 {
        let steps = (
            scales.par_chunks_mut(groups),
            zeros.par_chunks_mut(groups),
            offsets.par_chunks_mut(groups),
        );
        (
            rows.data_mut().par_chunks_mut(n),
            codes.par_chunks_mut(n),
            steps,
        )
            .into_par_iter()
            .for_each(|(row, codes, (scales, zeros, offsets))| {
                let lines = row.chunks_mut(width).zip(codes.chunks_mut(width));
                for (group, (weights, codes)) in lines.enumerate() {
                    let step = grid.fit(weights);
                    (scales[group], zeros[group]) = (step.scale, step.zero);
                    offsets[group] = step.offset;
                    for (weight, code) in weights.iter_mut().zip(codes) {
                        *code = step.code(*weight);
                        *weight = step.value(*code);
                    }
                }
            });
    }
    Quantised {
        bits: grid.bits,
        rows: m,
        cols: n,
        group_width: width,
        codes,
        scales,
        zeros,
        offsets: grid.stored_offsets(offsets),
        group_index: (0..n).map(|j| (j / width) as u32).collect(),
    }
}
