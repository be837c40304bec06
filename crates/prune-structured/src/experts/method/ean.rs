//! Sums of output norms.

use super::{Choosing, each};
use crate::Result;
use crate::experts::layer::Layer;
use serde::{Deserialize, Serialize};

/// Σ ‖f‖ over an expert's tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ean;

impl Choosing for Ean {
    fn scores(&self, layer: &Layer<'_>) -> Result<Vec<f64>> {
        Ok(each(layer, |expert| expert.norms))
    }
}
