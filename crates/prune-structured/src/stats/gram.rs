//! Gram matrices H = XᵀX of linear inputs, one file per half of a block.
//!
//! Products are f32, as they come from the GEMM. A refit adds a ridge of a hundredth of the mean
//! diagonal, which is far above their rounding.

use super::Part;
use crate::Result;
use candle_core::{DType, Device, Tensor};
use std::path::{Path, PathBuf};

/// A folder of Gram matrices.
#[derive(Clone, Debug)]
pub struct GramStore {
    dir: PathBuf,
}

impl GramStore {
    /// Uses `dir`, which must exist and outlive the store.
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        Self { dir: dir.into() }
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    fn path(&self, layer: usize, part: Part) -> PathBuf {
        let part = match part {
            Part::Attention => "attention",
            Part::Mlp => "mlp",
        };
        self.dir.join(format!("gram-{layer}-{part}.safetensors"))
    }

    pub(crate) fn save(&self, layer: usize, part: Part, gram: &Tensor) -> Result<()> {
        let none = std::collections::BTreeMap::new();
        Ok(tensor_io::write_file(
            self.path(layer, part),
            [("gram", gram)],
            &none,
        )?)
    }

    /// H of one half, `[width, width]` f32.
    ///
    /// # Errors
    /// When it was not collected or its file cannot be read.
    pub fn load(&self, layer: usize, part: Part) -> Result<Tensor> {
        let file = tensor_io::Checkpoint::open_file(self.path(layer, part))?;
        Ok(file.tensor_as("gram", DType::F32, &Device::Cpu)?)
    }
}
