//! AIMER: an expert whose weights are spread evenly is taken for redundant.

use super::Choosing;
use crate::Result;
use crate::experts::layer::Layer;
use serde::{Deserialize, Serialize};

/// `−‖w‖₁ / (√N ‖w‖₂)` over all N weights of an expert.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Aimer;

impl Choosing for Aimer {
    fn scores(&self, layer: &Layer<'_>) -> Result<Vec<f64>> {
        let score = |expert| -> Result<f64> {
            layer.progress.advance(0)?;
            let weights = layer.weights(expert)?;
            let (mut absolute, mut square) = (0.0, 0.0);
            for weight in &weights {
                let weight = f64::from(*weight);
                absolute += weight.abs();
                square += weight * weight;
            }
            let norm = (weights.len() as f64 * square).sqrt();
            Ok(if norm > 0.0 { -absolute / norm } else { -1.0 })
        };
        (0..layer.experts()).map(score).collect()
    }
}
