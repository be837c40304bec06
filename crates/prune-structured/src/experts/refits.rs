//! Down projections that were fitted anew to the neurons that stay of an expert.

use crate::Result;
use crate::stored::{self, Tensors};
use candle_core::Tensor;
use std::path::PathBuf;

/// Down projections of experts, one file for each layer.
#[derive(Clone, Debug)]
pub struct ExpertRefits {
    dir: PathBuf,
}

impl ExpertRefits {
    /// Uses `dir`, which must exist and outlive it.
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        Self { dir: dir.into() }
    }

    fn path(&self, layer: usize) -> PathBuf {
        self.dir.join(format!("experts-{layer}.safetensors"))
    }

    /// Stores the weights of a layer's experts, `[hidden, neurons]` f32, by their place in the plan.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn save(&self, layer: usize, weights: &[(usize, Tensor)]) -> Result<()> {
        let named = |(at, weight): &(usize, Tensor)| (key(*at), weight.clone());
        let weights: Vec<(String, Tensor)> = weights.iter().map(named).collect();
        stored::write_tensors(&self.path(layer), &weights)
    }

    /// The weight of the expert at this place of the layer's plan, `[hidden, neurons]` f32; `None` where it was not fitted.
    ///
    /// # Errors
    /// When the file cannot be read or is damaged.
    pub fn load(&self, layer: usize, at: usize) -> Result<Option<Tensor>> {
        let path = self.path(layer);
        if !path.exists() {
            return Ok(None);
        }
        let file = Tensors::open(&path)?;
        let key = key(at);
        file.contains(&key).then(|| file.load(&key)).transpose()
    }
}

fn key(at: usize) -> String {
    format!("down.{at}")
}
