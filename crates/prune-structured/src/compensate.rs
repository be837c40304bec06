//! Compensation: what the kept parameters take over from the removed columns.
//!
//! W is the weight of o_proj or down_proj, `[outputs, columns]`, x its input.

use crate::stats::Part;
use crate::tensor::values;
use crate::{Calibration, Error, Result};
use candle_core::{Device, Tensor};
use causal_lm::{Decoder, LinearName};
use faer::Mat;
use linalg::{Cholesky, product};
use serde::{Deserialize, Serialize};

/// What replaces the removed columns.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Compensation {
    /// Nothing.
    None,
    /// Their mean contribution, as a bias: `b += W[:,R] E[x_R]` (FLAP, arXiv 2312.11983, eq. 7).
    Bias,
    /// The kept columns, refitted to the dense output by least squares on the calibration tokens:
    /// with `H = XᵀX + ridge · mean(diag XᵀX) · I`, `W_K ← W H[:,K] (H[K,K])⁻¹`. Needs no bias slot.
    LeastSquares {
        /// Damping relative to the mean diagonal of the Gram matrix.
        ridge: f64,
    },
    /// StructPrune's refinement on activations that are already pruned: see
    /// [`crate::structprune::refine()`], which makes the weights before they are written.
    Alternating {
        /// Rounds of the alternation in each MLP; with one, weights alone are refitted.
        rounds: usize,
        /// Damping relative to the mean diagonal of the Gram matrix.
        ridge: f64,
    },
}

/// The damping that Týr-the-Pruner and SparseGPT use.
pub const DEFAULT_RIDGE: f64 = 0.01;

impl Compensation {
    /// Least squares with the usual damping.
    pub const LEAST_SQUARES: Self = Self::LeastSquares {
        ridge: DEFAULT_RIDGE,
    };

    /// The damping of the Gram matrix, also for what reads it without refitting.
    pub fn ridge(self) -> f64 {
        match self {
            Self::LeastSquares { ridge } | Self::Alternating { ridge, .. } => ridge,
            Self::None | Self::Bias => DEFAULT_RIDGE,
        }
    }

    /// Bias where the architecture can store one for both o_proj and down_proj, else least squares.
    pub fn suggested(decoder: &Decoder<'_>) -> Self {
        match decoder.config().model_type {
            causal_lm::ModelType::Llama => Self::Bias,
            _ => Self::LEAST_SQUARES,
        }
    }
}

/// What compensation changes in one output projection.
#[derive(Clone, Debug)]
pub(crate) enum Change {
    /// Kept columns stay as they are.
    Nothing,
    /// To be added to the bias, one value per output.
    Bias(Vec<f64>),
    /// New kept columns, `[outputs, kept]` f32.
    Weight(Tensor),
}

impl Change {
    /// The new kept columns, if there are any.
    pub(crate) fn into_weight(self) -> Option<Tensor> {
        match self {
            Self::Weight(weight) => Some(weight),
            Self::Nothing | Self::Bias(_) => None,
        }
    }
}

impl Compensation {
    /// Parameters that it adds to a model: a bias for every output projection without one.
    pub fn added(self, decoder: &Decoder<'_>) -> u64 {
        let config = decoder.config();
        let without_bias = |sublayers: usize, name| {
            if decoder.config().has_bias(name) {
                0
            } else {
                sublayers
            }
        };
        let attention = config.widths.iter().filter(|w| w.heads > 0).count();
        let mlp = config.widths.iter().filter(|w| w.neurons > 0).count();
        let biases = without_bias(attention, LinearName::O) + without_bias(mlp, LinearName::Down);
        match self {
            Self::Bias => (biases * config.hidden) as u64,
            Self::None | Self::LeastSquares { .. } | Self::Alternating { .. } => 0,
        }
    }

    /// The change for one half of a block that keeps `kept` of the columns of `weight`
    /// (`[outputs, columns]` f32).
    pub(crate) fn change(
        self,
        calibration: Option<&Calibration>,
        (layer, part): (usize, Part),
        weight: &Tensor,
        kept: &[usize],
    ) -> Result<Change> {
        let removed = complement(kept, weight.dims()[1]);
        if removed.is_empty() {
            return Ok(Change::Nothing);
        }
        let calibration = || calibration.ok_or(missing(layer, "the calibration"));
        match self {
            // The refinement's weights replace the stored ones as they are written.
            Self::None | Self::Alternating { .. } => Ok(Change::Nothing),
            Self::Bias => {
                let mean = &calibration()?.part(layer, part)?.moments.mean;
                Ok(Change::Bias(mean_contribution(weight, &removed, mean)?))
            }
            Self::LeastSquares { .. } if kept.is_empty() => Ok(Change::Nothing),
            Self::LeastSquares { ridge } => {
                let gram = calibration()?
                    .gram
                    .as_ref()
                    .ok_or(missing(layer, "the Gram matrix"))?
                    .load(layer, part)?;
                Ok(Change::Weight(refit(
                    weight, &gram, kept, &removed, ridge, layer,
                )?))
            }
        }
    }
}

fn missing(layer: usize, what: &'static str) -> Error {
    Error::Missing {
        layer,
        what,
        need: "the plan's compensation reads it",
    }
}

/// Σ over removed columns of mean[c] · W[:,c].
fn mean_contribution(weight: &Tensor, removed: &[usize], mean: &[f64]) -> Result<Vec<f64>> {
    let rows = weight.to_device(&Device::Cpu)?.to_vec2::<f32>()?;
    Ok(rows
        .iter()
        .map(|row| removed.iter().map(|&c| f64::from(row[c]) * mean[c]).sum())
        .collect())
}

/// W_K + (H[K,K]⁻¹ H[K,R] W_Rᵀ)ᵀ, which is W H[:,K] H[K,K]⁻¹ without the part that cancels; in f64.
pub(crate) fn refit(
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

/// The ids below `width` that are not in the ascending list `ids`.
pub(crate) fn complement(ids: &[usize], width: usize) -> Vec<usize> {
    let mut kept = vec![false; width];
    for &id in ids {
        kept[id] = true;
    }
    (0..width).filter(|&id| !kept[id]).collect()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::flap::compat::tests::samples;
    use crate::stats::Moments;

    #[test]
    fn the_bias_is_that_of_the_published_implementation() {
        let mut moments = Moments::new(4);
        samples().iter().for_each(|sample| moments.update(sample));
        let weight: Vec<f32> = (0..12)
            .map(|i| ((3 * (i / 4) + 2 * (i % 4)) % 7) as f32 / 2.0 - 1.5)
            .collect();
        let weight = Tensor::from_vec(weight, (3, 4), &Device::Cpu).unwrap();
        let bias = mean_contribution(&weight, &[1, 3], &moments.mean).unwrap();
        for (ours, golden) in bias.iter().zip([-0.1145833, -0.03125, -0.0208333]) {
            assert!((ours - golden).abs() < 1e-6, "{ours} is not {golden}");
        }
    }

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
    fn a_dead_input_is_no_reason_to_fail_with_a_ridge() {
        let (x, weight) = problem();
        let alive = Tensor::new(&[1f32, 0.0, 1.0, 1.0, 1.0, 1.0], &Device::Cpu).unwrap();
        let x = x.broadcast_mul(&alive).unwrap();
        let gram = x.t().unwrap().matmul(&x).unwrap();
        let kept = [1, 2, 3];
        let refitted = refit(&weight, &gram, &kept, &complement(&kept, 6), 0.01, 0).unwrap();
        assert!(
            refitted
                .sum_all()
                .unwrap()
                .to_scalar::<f32>()
                .unwrap()
                .is_finite()
        );
        let singular = refit(&weight, &gram, &kept, &complement(&kept, 6), 0.0, 4);
        assert!(matches!(singular, Err(Error::Singular { layer: 4 })));
    }
}
