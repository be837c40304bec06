//! The mean contribution of the removed columns, as a bias.

use super::{Change, Compensate, Pruned, needed};
use crate::{Calibration, Result};
use candle_core::{Device, Tensor};
use serde::{Deserialize, Serialize};

/// `b += W[:,R] E[x_R]` (FLAP, arXiv 2312.11983, eq. 7).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bias;

impl Compensate for Bias {
    fn change(&self, pruned: &Pruned<'_>, calibration: Option<&Calibration>) -> Result<Change> {
        let stats = needed(calibration, pruned.layer)?.part(pruned.layer, pruned.part)?;
        let bias = mean_contribution(pruned.weight, pruned.removed, &stats.moments.mean)?;
        Ok(Change::Bias(bias))
    }

    fn adds_bias(&self) -> bool {
        true
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stats::Moments;
    use crate::stats::fluctuation::tests::samples;

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
}
