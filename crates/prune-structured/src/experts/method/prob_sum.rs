//! Sums of router probabilities, chosen or not.

use super::{Choosing, each};
use crate::Result;
use crate::experts::layer::Layer;
use serde::{Deserialize, Serialize};

/// Σ over all tokens of the softmax over all experts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProbSum;

impl Choosing for ProbSum {
    fn scores(&self, layer: &Layer<'_>) -> Result<Vec<f64>> {
        Ok(each(layer, |expert| expert.probabilities))
    }
}
