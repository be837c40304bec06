//! Constants in the place of experts that go (MoNE, arXiv 2507.00390).
//!
//! The router keeps the rows of all experts. A token that chooses one that is gone adds its gate times the mean of that expert's
//! outputs over the tokens that chose it in calibration, which is the constant that leaves the least squared error there. So no
//! gate changes and no other expert steps in; a constant takes as many numbers as the layer has channels.

use super::Compensate;
use crate::experts::layer::{Batch, Layer};
use crate::experts::method::Choice;
use crate::experts::routing::restricted;
use crate::{Error, Result};
use serde::{Deserialize, Serialize};

/// The mean output of each expert that goes; zeros for one that no token chose.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Novice;

impl Compensate for Novice {
    fn factors(&self, layer: &Layer<'_>, choice: &Choice) -> Result<Vec<Vec<f64>>> {
        if choice.members.iter().any(|members| !members.is_empty()) {
            return Err(Error::Unsupported {
                method: "novice",
                model_type: layer.decoder.config().model_type,
                reason: "it stands in for experts that are dropped, and merged ones are still there",
            });
        }
        Ok(vec![vec![]; choice.kept.len()])
    }

    fn keeps_rows(&self) -> bool {
        true
    }

    fn novices(&self, layer: &Layer<'_>, choice: &Choice) -> Result<Vec<Vec<f32>>> {
        let channels = layer.decoder.config().hidden;
        let gone = (0..layer.experts()).filter(|expert| !choice.kept.contains(expert));
        let mean = |expert: usize| {
            let mean = layer.statistics.experts[expert].mean().into_iter();
            let mut mean: Vec<f32> = mean.map(|x| x as f32).collect();
            // Nothing was added up for an expert that no token chose.
            mean.resize(channels, 0.0);
            mean
        };
        Ok(gone.map(mean).collect())
    }
}

impl Novice {
    /// Σ over tokens of the squared change of the layer's output, with `novices` in the place of the experts that are not in
    /// `kept`.
    pub(crate) fn error(layer: &Layer<'_>, kept: &[usize], novices: &[Vec<f32>]) -> Result<f64> {
        let rule = layer.rule;
        let chosen = |logits: &[f32]| {
            let gates = restricted(rule, logits, |_| true).into_iter();
            gates.map(|(expert, _)| expert).collect()
        };
        let mut error = 0.0;
        layer.for_each_batch(rule.chosen, chosen, |batch| {
            error += Self::error_of(batch, kept, novices);
            Ok(())
        })?;
        Ok(error)
    }

    /// The same of the tokens of a batch. What experts that stay add is the same, so that the others are compared alone.
    pub(crate) fn error_of(batch: Batch<'_>, kept: &[usize], novices: &[Vec<f32>]) -> f64 {
        let gone = (0..batch.outputs.experts).filter(|expert| !kept.contains(expert));
        let mut novice_of = vec![None; batch.outputs.experts];
        for (expert, novice) in gone.zip(novices) {
            novice_of[expert] = Some(novice);
        }
        let of_token = |token: usize| {
            let mut change = vec![0.0; batch.outputs.width];
            for (expert, gate) in batch.gates(token) {
                let Some(novice) = novice_of[expert] else {
                    continue;
                };
                let pairs = novice.iter().zip(batch.outputs.row(token, expert));
                for (change, (&constant, &output)) in change.iter_mut().zip(pairs) {
                    *change += gate * (f64::from(constant) - f64::from(output));
                }
            }
            change.iter().map(|x| x * x).sum::<f64>()
        };
        (0..batch.outputs.tokens).map(of_token).sum()
    }
}
