//! Weights that a refinement of a plan made, which writing puts in place of the stored ones.

use crate::Result;
use crate::stored::{self, Tensors};
use candle_core::Tensor;
use causal_lm::LinearName;
use std::path::PathBuf;

/// Weights that a refinement made, one file per block.
#[derive(Clone, Debug)]
pub struct Refits {
    dir: PathBuf,
}

impl Refits {
    pub(crate) fn new(dir: impl Into<PathBuf>) -> Self {
        Self { dir: dir.into() }
    }

    fn path(&self, layer: usize) -> PathBuf {
        self.dir.join(format!("refit-{layer}.safetensors"))
    }

    pub(crate) fn save(&self, layer: usize, weights: &[(String, Tensor)]) -> Result<()> {
        stored::write_tensors(&self.path(layer), weights)
    }

    /// The weight of one linear as the refinement left it, in the plan's shape, f32; `None` where it
    /// did not touch it.
    ///
    /// # Errors
    /// When the file cannot be read or is damaged.
    pub fn load(&self, layer: usize, name: LinearName) -> Result<Option<Tensor>> {
        let file = Tensors::open(&self.path(layer))?;
        let key = name.to_string();
        file.contains(&key).then(|| file.load(&key)).transpose()
    }
}
