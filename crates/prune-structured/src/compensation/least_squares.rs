//! Least squares on the kept columns.

use super::{Change, Compensate, DEFAULT_RIDGE, Pruned, missing, needed};
use crate::stats::Needs;
use crate::tensor::values;
use crate::{Calibration, Error, Result};
use candle_core::{Device, Tensor};
use faer::Mat;
use linalg::{Cholesky, product};
use serde::{Deserialize, Serialize};

/// The kept columns, refitted to the dense output on the calibration tokens: with
/// `H = XᵀX + ridge · mean(diag XᵀX) · I`, `W_K ← W H[:,K] (H[K,K])⁻¹`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct LeastSquares {
    /// Damping relative to the mean diagonal of the Gram matrix.
    pub ridge: f64,
}

impl Default for LeastSquares {
    fn default() -> Self {
        Self {
            ridge: DEFAULT_RIDGE,
        }
    }
}

impl Compensate for LeastSquares {
    fn change(&self, pruned: &Pruned<'_>, calibration: Option<&Calibration>) -> Result<Change> {
        let &Pruned {
            layer,
            part,
            weight,
            kept,
            removed,
        } = pruned;
        if kept.is_empty() {
            return Ok(Change::Nothing);
        }
        let gram = needed(calibration, layer)?.gram.as_ref();
        let gram = gram
            .ok_or(missing(layer, "the Gram matrix"))?
            .load(layer, part)?;
        let refitted = refit(weight, &gram, kept, removed, self.ridge, layer)?;
        Ok(Change::Weight(refitted))
    }

    fn needs(&self) -> Needs {
        Needs {
            gram: true,
            ..Needs::default()
        }
    }

    fn ridge(&self) -> f64 {
        self.ridge
    }

    fn refits(&self) -> bool {
        true
    }
}

/// The kept columns of a weight, `[outputs, columns]`, refitted to the dense output: `[outputs, kept]` f32. `gram` is
/// `[columns, columns]`, `kept` and `removed` are ascending and share out all columns, `ridge` is relative to the mean
/// diagonal of the Gram matrix.
///
/// `W_K + (H[K,K]⁻¹ H[K,R] W_Rᵀ)ᵀ`, which is `W H[:,K] H[K,K]⁻¹` without the part that cancels; in f64.
///
/// # Errors
/// [`Error::Singular`] with the layer, and what candle reports.
pub fn refit(
    weight: &Tensor,
    gram: &Tensor,
    kept: &[usize],
    removed: &[usize],
    ridge: f64,
    layer: usize,
) -> Result<Tensor> {
    let (outputs, columns) = weight.dims2()?;
    let (weight, gram) = (values(weight)?, values(gram)?);
    let entry = |i: usize, j: usize| f64::from(gram[i * columns + j]);
    let mean_diagonal = (0..columns).map(|i| entry(i, i)).sum::<f64>() / columns as f64;
    let lost = Mat::from_fn(removed.len(), outputs, |j, o| {
        f64::from(weight[o * columns + removed[j]])
    });
    let cross = Mat::from_fn(kept.len(), removed.len(), |i, j| entry(kept[i], removed[j]));
    let right = product(cross.as_ref(), lost.as_ref());
    drop(cross);
    let normal = Mat::from_fn(kept.len(), kept.len(), |i, j| entry(kept[i], kept[j]));
    let delta = solve_damped(normal, ridge * mean_diagonal, right, layer)?;
    let refitted: Vec<f32> = (0..outputs)
        .flat_map(|o| (0..kept.len()).map(move |i| (o, i)))
        .map(|(o, i)| (f64::from(weight[o * columns + kept[i]]) + delta[(i, o)]) as f32)
        .collect();
    Ok(Tensor::from_vec(
        refitted,
        (outputs, kept.len()),
        &Device::Cpu,
    )?)
}

/// `(normal + damping · 1)⁻¹ right`, solved in f64: `[k, k]` and `[k, n]` to `[k, n]`, on the CPU.
pub(crate) fn solve(normal: &Tensor, damping: f64, right: &Tensor, layer: usize) -> Result<Tensor> {
    let (rows, columns) = right.dims2()?;
    let (normal, right) = (values(normal)?, values(right)?);
    let normal = Mat::from_fn(rows, rows, |i, j| f64::from(normal[i * rows + j]));
    let right = Mat::from_fn(rows, columns, |i, o| f64::from(right[i * columns + o]));
    let solved = solve_damped(normal, damping, right, layer)?;
    let solved: Vec<f32> = (0..rows)
        .flat_map(|i| (0..columns).map(move |o| (i, o)))
        .map(|(i, o)| solved[(i, o)] as f32)
        .collect();
    Ok(Tensor::from_vec(solved, (rows, columns), &Device::Cpu)?)
}

fn solve_damped(
    mut normal: Mat<f64>,
    damping: f64,
    right: Mat<f64>,
    layer: usize,
) -> Result<Mat<f64>> {
    // A feature that is always zero has an empty row; without damping it would be singular.
    (0..normal.nrows()).for_each(|i| normal[(i, i)] += damping);
    let factor = Cholesky::new(normal).map_err(|_| Error::Singular { layer })?;
    Ok(factor.solve(right))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::compensation::complement;

    /// Inputs `[20, 6]` and a weight `[3, 6]` of the golden refits.
    pub(crate) fn problem() -> (Tensor, Tensor) {
        let x = |t: usize, c: usize| (((7 * t + 5 * c + (t * c) % 5) % 13) as f32 - 6.0) / 5.0;
        let w = |o: usize, i: usize| (((3 * i + 5 * o + (i * o) % 3) % 11) as f32 - 5.0) / 4.0;
        let inputs = (0..120).map(|i| x(i / 6, i % 6)).collect();
        let weight = (0..18).map(|i| w(i / 6, i % 6)).collect();
        let tensor =
            |values: Vec<f32>, shape| Tensor::from_vec(values, shape, &Device::Cpu).unwrap();
        (tensor(inputs, (20, 6)), tensor(weight, (3, 6)))
    }

    #[test]
    fn the_refit_is_that_of_the_published_tyr_implementation() {
        let (x, weight) = problem();
        let gram = x.t().unwrap().matmul(&x).unwrap();
        let golden: [(&[usize], &[[f32; 3]]); 2] = [
            (
                &[0, 1, 4, 5],
                &[
                    [-1.37619, 0.11317, 1.15035],
                    [-0.54429, 1.19637, -0.30064],
                    [-1.40433, 0.59412, -1.04245],
                    [-0.34822, -1.56315, -0.28744],
                ],
            ),
            (
                &[4, 5],
                &[[-1.25006, 0.96748, -1.42470], [-0.71653, -1.97247, 0.30888]],
            ),
        ];
        for (kept, golden) in golden {
            let refitted = refit(&weight, &gram, kept, &complement(kept, 6), 0.01, 0).unwrap();
            for (column, golden) in refitted
                .t()
                .unwrap()
                .to_vec2::<f32>()
                .unwrap()
                .iter()
                .zip(golden)
            {
                for (ours, golden) in column.iter().zip(golden) {
                    assert!((ours - golden).abs() < 2e-5, "{ours} is not {golden}");
                }
            }
        }
    }

    #[test]
    fn no_other_weight_on_the_kept_columns_comes_closer() {
        let (x, weight) = problem();
        let gram = x.t().unwrap().matmul(&x).unwrap();
        let kept = [1, 2, 5];
        let ids = Tensor::new(&[1u32, 2, 5], &Device::Cpu).unwrap();
        let x_kept = x.index_select(&ids, 1).unwrap();
        let target = x.matmul(&weight.t().unwrap()).unwrap();
        let error = |w: &Tensor| {
            let gap = (x_kept.matmul(&w.t().unwrap()).unwrap() - &target).unwrap();
            gap.sqr()
                .unwrap()
                .sum_all()
                .unwrap()
                .to_scalar::<f32>()
                .unwrap()
        };
        let best = refit(&weight, &gram, &kept, &complement(&kept, 6), 0.0, 0).unwrap();
        assert!(error(&best) < error(&weight.index_select(&ids, 1).unwrap()));
        for i in 0..9 {
            for step in [-0.01f32, 0.01] {
                let mut moved = best.flatten_all().unwrap().to_vec1::<f32>().unwrap();
                moved[i] += step;
                let moved = Tensor::from_vec(moved, (3, 3), &Device::Cpu).unwrap();
                assert!(error(&moved) > error(&best));
            }
        }
    }

    #[test]
    fn a_dead_input_changes_nothing_for_the_others_and_needs_a_ridge() {
        let (x, weight) = problem();
        let alive = Tensor::new(&[1f32, 0.0, 1.0, 1.0, 1.0, 1.0], &Device::Cpu).unwrap();
        let x = x.broadcast_mul(&alive).unwrap();
        let gram = x.t().unwrap().matmul(&x).unwrap();
        let kept = [1, 2, 3];
        let refitted = refit(&weight, &gram, &kept, &complement(&kept, 6), 0.01, 0).unwrap();
        // The same problem without the column whose input is always zero; the ridge is relative to the mean diagonal
        // over six columns there and over five here.
        let others = Tensor::new(&[0u32, 2, 3, 4, 5], &Device::Cpu).unwrap();
        let select = |t: &Tensor, dim| t.index_select(&others, dim).unwrap();
        let (small, weight_of_others) = (select(&select(&gram, 0), 1), select(&weight, 1));
        let kept_there = [1, 2];
        let removed_there = complement(&kept_there, 5);
        let ridge = 0.01 * 5.0 / 6.0;
        let expected = refit(
            &weight_of_others,
            &small,
            &kept_there,
            &removed_there,
            ridge,
            0,
        )
        .unwrap();
        let rows = |t: &Tensor| t.to_vec2::<f32>().unwrap();
        for ((found, expected), dense) in rows(&refitted)
            .iter()
            .zip(rows(&expected))
            .zip(rows(&weight))
        {
            // The dead column's own weight has no say in the output and stays.
            assert_eq!(found[0], dense[1]);
            for (found, expected) in found[1..].iter().zip(expected) {
                assert!((found - expected).abs() < 1e-5, "{found} is not {expected}");
            }
        }
        let singular = refit(&weight, &gram, &kept, &complement(&kept, 6), 0.0, 4);
        assert!(matches!(singular, Err(Error::Singular { layer: 4 })));
    }
}
