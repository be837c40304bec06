//! MoNE: an expert whose output hardly varies can be replaced by a constant.

use super::{Choosing, each, mean};
use crate::Result;
use crate::experts::layer::Layer;
use serde::{Deserialize, Serialize};

/// Standard deviation of f times the mean gate.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mone;

impl Choosing for Mone {
    fn scores(&self, layer: &Layer<'_>) -> Result<Vec<f64>> {
        Ok(each(layer, |expert| {
            expert.variance().sqrt() * mean(expert.gates, expert.count)
        }))
    }
}
