//! What dropping an expert alone does to its layer's output.

use super::Choosing;
use crate::Result;
use crate::experts::layer::{Batch, Layer};
use crate::experts::routing::{gates, order, softmax};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

/// Mean over tokens of the squared change of the layer's output when the expert is dropped and tokens are routed among
/// the others. Runs one expert more for each token than the model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct OutputChange;

impl Choosing for OutputChange {
    fn scores(&self, layer: &Layer<'_>) -> Result<Vec<f64>> {
        let needed = layer.rule.chosen + 1;
        let wanted = |logits: &[f32]| {
            let mut experts = order(logits);
            experts.truncate(needed);
            experts
        };
        let mut sums = vec![0.0; layer.experts()];
        layer.for_each_batch(needed, wanted, |batch| {
            for (sum, changes) in sums.iter_mut().zip(changes(batch)) {
                *sum += changes;
            }
            Ok(())
        })?;
        let tokens = layer.statistics.tokens.max(1) as f64;
        Ok(sums.into_iter().map(|sum| sum / tokens).collect())
    }
}

/// For each expert Σ over tokens of the squared change of the output without it.
pub(crate) fn changes(batch: Batch<'_>) -> Vec<f64> {
    let experts = batch.outputs.experts;
    let of_token = |token: usize| -> Vec<f64> {
        let logits = batch.logits(token);
        let order = order(logits);
        let dense: Vec<(usize, f64)> = batch.gates(token).collect();
        let mut changes = vec![0.0; experts];
        for &(expert, _) in &dense {
            let others: Vec<usize> = order.iter().copied().filter(|&e| e != expert).collect();
            let mut difference = gates(batch.rule, logits, &others);
            difference.extend(dense.iter().map(|&(e, gate)| (e, -gate)));
            changes[expert] = batch.square(token, &difference);
        }
        if !batch.rule.normalise {
            // The denominator of the softmax loses a term, so that all gates grow.
            let square = batch.square(token, &dense);
            for (expert, p) in softmax(logits).into_iter().enumerate() {
                if dense.iter().all(|&(e, _)| e != expert) {
                    changes[expert] = square * (p / (1.0 - p)).powi(2);
                }
            }
        }
        changes
    };
    let changes: Vec<Vec<f64>> = (0..batch.outputs.tokens)
        .into_par_iter()
        .map(of_token)
        .collect();
    let mut sums = vec![0.0; experts];
    for changes in changes {
        sums.iter_mut().zip(changes).for_each(|(sum, x)| *sum += x);
    }
    sums
}
