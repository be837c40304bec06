//! Mean output norms, without gates.

use super::{Choosing, each, mean};
use crate::Result;
use crate::experts::layer::Layer;
use serde::{Deserialize, Serialize};

/// Mean of ‖f‖ over an expert's tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Man;

impl Choosing for Man {
    fn scores(&self, layer: &Layer<'_>) -> Result<Vec<f64>> {
        Ok(each(layer, |expert| mean(expert.norms, expert.count)))
    }
}
