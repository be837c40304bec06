//! Sums of gates.

use super::{Choosing, each};
use crate::Result;
use crate::experts::layer::Layer;
use serde::{Deserialize, Serialize};

/// Σ g over an expert's tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GateSum;

impl Choosing for GateSum {
    fn scores(&self, layer: &Layer<'_>) -> Result<Vec<f64>> {
        Ok(each(layer, |expert| expert.gates))
    }
}
