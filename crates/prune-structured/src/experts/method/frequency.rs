//! How often experts are chosen: a common baseline.

use super::{Choosing, each};
use crate::Result;
use crate::experts::layer::Layer;
use serde::{Deserialize, Serialize};

/// Tokens that chose an expert.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Frequency;

impl Choosing for Frequency {
    fn scores(&self, layer: &Layer<'_>) -> Result<Vec<f64>> {
        Ok(each(layer, |expert| expert.count as f64))
    }
}
