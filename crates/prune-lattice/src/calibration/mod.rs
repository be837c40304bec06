//! What a network's states do on examples: first and second moments of inputs and states, layer by layer, in f64.
//!
//! A [`Calibration`] is plain data. Recording it needs a network that runs (feature `train`); using it does not: the methods
//! `span` and `flow` rank neurons by it, refitting and merging solve least-squares problems with it.

mod moments;
#[cfg(feature = "train")]
mod record;

pub use moments::Moments;
#[cfg(feature = "train")]
pub use moments::MomentsSum;
#[cfg(feature = "train")]
pub use record::{RecordConfig, record, record_joint};

use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};

/// Moments of all layers of a network over the steps of some examples.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Calibration {
    /// What the first layer reads: `x_t`, one-hot or embedded for symbols.
    pub input: Moments,
    /// The layers, lowest first.
    pub layers: Vec<LayerMoments>,
    /// What the read-out sees (after its activation) at the steps that are read.
    pub read_out: Moments,
}

/// Moments of the states of one layer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct LayerMoments {
    /// `h_{t-1}`: what the recurrent weights see.
    pub before: Moments,
    /// `h_t`: what the layer above sees.
    pub after: Moments,
}

impl Calibration {
    /// Assembles a calibration from its parts; `layers` are pairs (before, after).
    pub fn new(
        input: Moments,
        layers: impl IntoIterator<Item = (Moments, Moments)>,
        read_out: Moments,
    ) -> Self {
        Self {
            input,
            layers: layers
                .into_iter()
                .map(|(before, after)| LayerMoments { before, after })
                .collect(),
            read_out,
        }
    }

    /// What the input weights of a layer see.
    pub fn input_of(&self, layer: usize) -> &Moments {
        match layer.checked_sub(1) {
            None => &self.input,
            Some(below) => &self.layers[below].after,
        }
    }

    /// Checks that the calibration is one of a network of these sizes.
    pub(crate) fn check(&self, width: usize, hidden: &[usize]) -> Result<()> {
        let found: Vec<usize> = self.layers.iter().map(|l| l.after.dim()).collect();
        let top = self.read_out.dim();
        if found != hidden || self.input.dim() != width || Some(&top) != hidden.last() {
            return Err(Error::Shape {
                tensor: "calibration".into(),
                expected: format!("input of {width} and layers of {hidden:?}"),
                found: [vec![self.input.dim()], found].concat(),
            });
        }
        match self.layers.iter().any(|l| l.after.count() == 0) || self.read_out.count() == 0 {
            true => Err(Error::Setting {
                setting: "calibration",
                reason: "it holds no steps".into(),
            }),
            false => Ok(()),
        }
    }
}
