//! Sublayers at several widths, on disk: kept units and refitted columns, nothing dense.
//!
//! ```text
//! DIR/levels-3-mlp.safetensors   units.N, weight.N for N steps kept; the dense width needs neither
//! DIR/gram-3-mlp.safetensors     Gram matrix of the inputs they were refitted on
//! DIR/stats-3.json               moments of these inputs; written last, so that it marks a block
//! ```

use crate::obs::Level;
use crate::ranking::Ranking;
use crate::stats::{GramStore, LayerStats, Part};
use crate::{Error, Result, files};
use candle_core::{DType, Device, Tensor};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use tensor_io::Checkpoint;

/// A folder of pruned sublayers.
#[derive(Clone, Debug)]
pub(crate) struct LevelStore {
    dir: PathBuf,
}

/// What a width keeps.
#[derive(Clone, Debug)]
pub(crate) enum Kept {
    /// Everything, as it was.
    Dense,
    /// Units, ascending, and the projection refitted to their columns.
    Some { units: Vec<usize>, weight: Tensor },
    /// Nothing.
    Gone,
}

impl LevelStore {
    /// Uses `dir`, made where it does not exist.
    pub(crate) fn create(dir: impl Into<PathBuf>) -> Result<Self> {
        let dir = dir.into();
        std::fs::create_dir_all(&dir).map_err(|e| file_error(&dir, e))?;
        Ok(Self { dir })
    }

    /// Gram matrices in the same folder.
    pub(crate) fn gram(&self) -> GramStore {
        GramStore::new(&self.dir)
    }

    fn levels_path(&self, layer: usize, part: Part) -> PathBuf {
        let part = match part {
            Part::Attention => "attention",
            Part::Mlp => "mlp",
        };
        self.dir.join(format!("levels-{layer}-{part}.safetensors"))
    }

    fn stats_path(&self, layer: usize) -> PathBuf {
        self.dir.join(format!("stats-{layer}.json"))
    }

    /// Stores the levels of a sublayer, of which dense and empty ones take no space.
    pub(crate) fn save(&self, ranking: &Ranking, levels: &[Level]) -> Result<()> {
        let mut tensors = Vec::new();
        for level in levels {
            if level.steps > 0 && level.steps < ranking.steps.len() {
                let units = level.units.iter().map(|&unit| unit as u32);
                let units = Tensor::from_iter(units, &Device::Cpu)?;
                tensors.push((format!("units.{}", level.steps), units));
                tensors.push((format!("weight.{}", level.steps), level.weight.clone()));
            }
        }
        let tensors = tensors.iter().map(|(name, tensor)| (name.clone(), tensor));
        let path = self.levels_path(ranking.layer, ranking.part);
        Ok(tensor_io::write_file(path, tensors, &BTreeMap::new())?)
    }

    /// Stores the statistics of a block, whose levels must have been stored before.
    pub(crate) fn finish(&self, layer: usize, stats: &LayerStats) -> Result<()> {
        let path = self.stats_path(layer);
        files::write_json(&path, stats).map_err(|e| file_error(&path, e))
    }

    /// Statistics of a block that is complete.
    pub(crate) fn stats(&self, layer: usize) -> Result<Option<LayerStats>> {
        let path = self.stats_path(layer);
        files::read_json(&path).map_err(|e| file_error(&path, e))
    }

    /// A sublayer of `ranking` at the width of `steps`.
    pub(crate) fn load(&self, ranking: &Ranking, steps: usize) -> Result<Kept> {
        if steps == 0 {
            return Ok(Kept::Gone);
        }
        if steps == ranking.steps.len() {
            return Ok(Kept::Dense);
        }
        let file = Checkpoint::open_file(self.levels_path(ranking.layer, ranking.part))?;
        let units = file.tensor(&format!("units.{steps}"), &Device::Cpu)?;
        let weight = file.tensor_as(&format!("weight.{steps}"), DType::F32, &Device::Cpu)?;
        Ok(Kept::Some {
            units: units
                .to_vec1::<u32>()?
                .into_iter()
                .map(|unit| unit as usize)
                .collect(),
            weight,
        })
    }
}

pub(crate) fn file_error(path: &Path, reason: impl ToString) -> Error {
    Error::SearchFile {
        path: path.into(),
        reason: reason.to_string(),
    }
}
