//! OWL: how much of each layer is pruned, by how many of its weights stand out (arXiv 2310.05175).
//!
//! With D the percentage of a layer's scores above M times their mean, and D' = 2λ (D − min) / (max − min), layer l loses the
//! share S + mean D' − D'_l of its weights. The mean is weighted by the layers' weights, so that S is met where layers
//! differ in size.

use super::{ExpertRepair, LINEARS, values};
use crate::compress::{Compressor, Pattern};
use crate::{Error, Result};
use candle_core::Tensor;
use causal_lm::{Decoder, ExpertPass, Hidden, LinearName, Site, Tap, TapResult, Windows};
use tensor_io::Progress;

/// How shares of layers are found.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct Owl {
    /// M: scores above so many times their mean stand out.
    pub outlier: f64,
    /// λ: shares differ from S by at most this.
    pub spread: f64,
}

impl Default for Owl {
    fn default() -> Self {
        Self {
            outlier: 5.0,
            spread: 0.08,
        }
    }
}

impl Owl {
    /// The share that each layer loses, from its percentage of outliers and its size, where all together lose `share`.
    pub fn shares(self, outliers: &[f64], sizes: &[f64], share: f64) -> Vec<f64> {
        let least = outliers.iter().copied().fold(f64::INFINITY, f64::min);
        let most = outliers.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let scaled = |outliers: &f64| match most > least {
            true => 2.0 * self.spread * (outliers - least) / (most - least),
            false => 0.0,
        };
        let scaled: Vec<f64> = outliers.iter().map(scaled).collect();
        let total: f64 = sizes.iter().sum();
        let weighted: f64 = scaled.iter().zip(sizes).map(|(d, size)| d * size).sum();
        let mean = if total > 0.0 { weighted / total } else { 0.0 };
        scaled.iter().map(|d| share + mean - d).collect()
    }

    /// The share that a compressor prunes, in percent.
    ///
    /// # Errors
    /// [`Error::Setting`] for a compressor that does not prune a share of weights wherever they are.
    pub(super) fn check(self, compressor: &Compressor) -> Result<f64> {
        percent(compressor).ok_or_else(|| Error::Setting {
            name: "compressor of OWL",
            value: compressor.to_string(),
            expected: "pruning of a share of the weights, such as wanda-50",
        })
    }

    /// The compressor of each layer that has experts, `None` for others.
    ///
    /// # Errors
    /// [`Error::Setting`] for a compressor that does not prune a share of weights wherever they are.
    pub(super) fn compressors(
        self,
        decoder: &Decoder<'_>,
        windows: &Windows,
        options: &ExpertRepair,
        progress: &dyn Progress,
    ) -> Result<Vec<Option<Compressor>>> {
        let compressor = &options.compressor;
        let percent = self.check(compressor)?;
        let config = decoder.config();
        let mut hidden = Hidden::embed(decoder, windows)?;
        let (mut outliers, mut sizes) = (Vec::new(), Vec::new());
        for (layer, mixture) in config.mixtures.iter().enumerate() {
            let experts = mixture.map_or(0, |mixture| mixture.experts);
            let mut squares = Squares {
                sums: vec![[vec![], vec![]]; experts],
                gate_weight: options.gate_weight,
            };
            hidden.advance_stored(decoder, layer, &mut squares)?;
            let Some(mixture) = mixture else { continue };
            outliers.push(self.outliers(decoder, layer, &squares)?);
            sizes.push((experts * mixture.width * config.hidden) as f64);
            progress.advance(0)?;
        }
        let mut shares = self.shares(&outliers, &sizes, percent / 100.0).into_iter();
        let of_layer = |mixture: &Option<_>| {
            mixture.as_ref()?;
            let percent = (100.0 * shares.next()?).clamp(0.0, 99.9);
            Some(with_percent(*compressor, percent))
        };
        Ok(config.mixtures.iter().map(of_layer).collect())
    }

    /// Percentage of a layer's scores that stand out. Experts without tokens have no scores.
    fn outliers(self, decoder: &Decoder<'_>, layer: usize, squares: &Squares) -> Result<f64> {
        let each = |visit: &mut dyn FnMut(f64)| -> Result<()> {
            for (expert, [inputs, neurons]) in squares.sums.iter().enumerate() {
                if inputs.is_empty() {
                    continue;
                }
                let mlp = decoder.expert(layer, expert)?;
                decoder.release_expert(layer, expert);
                for name in LINEARS {
                    let (linear, roots) = match name {
                        LinearName::Gate => (mlp.gate.as_ref(), inputs),
                        LinearName::Up => (Some(&mlp.up), inputs),
                        _ => (Some(&mlp.down), neurons),
                    };
                    let Some(linear) = linear else { continue };
                    for row in values(&linear.weight()?)?.chunks(roots.len()) {
                        let scores = row.iter().zip(roots);
                        scores.for_each(|(&w, sum)| visit(f64::from(w).abs() * sum.sqrt()));
                    }
                }
            }
            Ok(())
        };
        let (mut sum, mut count) = (0.0, 0usize);
        each(&mut |score| (sum, count) = (sum + score, count + 1))?;
        let bound = self.outlier * sum / count.max(1) as f64;
        let mut above = 0usize;
        each(&mut |score| above += usize::from(score > bound))?;
        Ok(100.0 * above as f64 / count.max(1) as f64)
    }
}

/// The share that is pruned, in percent, where zeros may lie anywhere.
fn percent(compressor: &Compressor) -> Option<f64> {
    match compressor.prune?.pattern {
        Pattern::Unstructured { percent, .. } => Some(percent),
        Pattern::Nm { .. } => None,
    }
}

fn with_percent(mut compressor: Compressor, to: f64) -> Compressor {
    if let Some(prune) = &mut compressor.prune
        && let Pattern::Unstructured { percent, .. } = &mut prune.pattern
    {
        *percent = to;
    }
    compressor
}

/// Σ g² x² of the inputs of each expert, and of its neurons; Σ x² where gates do not weigh.
struct Squares {
    sums: Vec<[Vec<f64>; 2]>,
    gate_weight: bool,
}

impl Tap for Squares {
    fn observe(&mut self, _layer: usize, _site: Site, _x: &Tensor) -> TapResult {
        Ok(())
    }

    fn expert(&mut self, _layer: usize, pass: &ExpertPass) -> TapResult {
        let Some(sums) = pass.expert.and_then(|expert| self.sums.get_mut(expert)) else {
            return Ok(());
        };
        for (sums, x) in sums.iter_mut().zip([&pass.input, &pass.neurons]) {
            let width = x.dim(1)?;
            sums.resize(width, 0.0);
            for (row, &gate) in values(x)?.chunks(width).zip(&pass.gates) {
                let weight = match self.gate_weight {
                    true => f64::from(gate).powi(2),
                    false => 1.0,
                };
                let squares = sums.iter_mut().zip(row);
                squares.for_each(|(sum, &x)| *sum += weight * f64::from(x).powi(2));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_with_more_outliers_lose_less_and_the_share_is_met() {
        let near = |found: Vec<f64>, expected: [f64; 3]| {
            for (found, expected) in found.into_iter().zip(expected) {
                assert!((found - expected).abs() < 1e-7, "{found} is not {expected}");
            }
        };
        let owl = Owl::default();
        let outliers = [2.0, 4.0, 8.0];
        near(
            owl.shares(&outliers, &[1.0; 3], 0.5),
            [0.571_111_1, 0.517_777_8, 0.411_111_1],
        );
        near(
            owl.shares(&outliers, &[4.0, 3.0, 1.0], 0.5),
            [0.54, 0.486_666_7, 0.38],
        );
        near(owl.shares(&[3.0; 3], &[1.0; 3], 0.5), [0.5; 3]);
    }
}
