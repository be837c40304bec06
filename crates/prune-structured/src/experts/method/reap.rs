//! REAP: the mean of what an expert adds, over the tokens that chose it, so that rarely used specialists stay.
//!
//! Gates are those that the model really uses. The published program takes the softmax over all experts for models that
//! normalise gates without saying so in their config, such as Mixtral.

use super::{Choosing, each, mean};
use crate::Result;
use crate::experts::layer::Layer;
use serde::{Deserialize, Serialize};

/// Mean over an expert's tokens of `g ‖f‖`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reap;

impl Choosing for Reap {
    fn scores(&self, layer: &Layer<'_>) -> Result<Vec<f64>> {
        Ok(each(layer, |expert| mean(expert.gated_norms, expert.count)))
    }
}
