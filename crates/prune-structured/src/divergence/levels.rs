//! Sublayers at several widths, on disk: kept units and refitted columns, nothing dense.
//!
//! ```text
//! DIR/levels-3-mlp.safetensors   units.N, weight.N for N steps kept; the dense width needs neither
//! DIR/gram-3-mlp.safetensors     Gram matrix of the inputs they were refitted on
//! DIR/stats-3.json               moments of these inputs; written last, so that it marks a block
//! ```

use crate::Result;
use crate::obs::Level;
use crate::ranking::Ranking;
use crate::stats::{GramStore, LayerStats, Part};
use crate::stored::{self, Tensors, damaged};
use candle_core::{Device, Tensor};
use std::path::PathBuf;

/// A folder of pruned sublayers.
#[derive(Clone, Debug)]
pub(crate) struct LevelStore {
    dir: PathBuf,
}

/// What a width keeps.
#[derive(Clone, Debug)]
pub enum Kept {
    /// Everything, as it was.
    Dense,
    /// Part of the units.
    Some {
        /// Their ids, ascending.
        units: Vec<usize>,
        /// The projection refitted to their columns, `[outputs, kept columns]`.
        weight: Tensor,
    },
    /// Nothing.
    Gone,
}

impl LevelStore {
    /// Uses `dir`, made where it does not exist.
    pub(crate) fn create(dir: impl Into<PathBuf>) -> Result<Self> {
        let dir = dir.into();
        std::fs::create_dir_all(&dir).map_err(|e| damaged(&dir, e))?;
        Ok(Self { dir })
    }

    /// Gram matrices in the same folder.
    pub(crate) fn gram(&self) -> GramStore {
        GramStore::new(&self.dir)
    }

    fn levels_path(&self, layer: usize, part: Part) -> PathBuf {
        self.dir
            .join(format!("levels-{layer}-{}.safetensors", part.name()))
    }

    fn stats_path(&self, layer: usize) -> PathBuf {
        self.dir.join(format!("stats-{layer}.json"))
    }

    /// Stores the levels of a sublayer, of which dense and empty ones take no space.
    pub(crate) fn save(&self, ranking: &Ranking, levels: &[Level]) -> Result<()> {
        let mut tensors = Vec::new();
        for level in levels {
            if level.steps > 0 && level.steps < ranking.steps().len() {
                let units = level.units.iter().map(|&unit| unit as u32);
                let units = Tensor::from_iter(units, &Device::Cpu)?;
                tensors.push((format!("units.{}", level.steps), units));
                tensors.push((format!("weight.{}", level.steps), level.weight.clone()));
            }
        }
        stored::write_tensors(&self.levels_path(ranking.layer, ranking.part), &tensors)
    }

    /// Stores the statistics of a block, whose levels must have been stored before.
    pub(crate) fn finish(&self, layer: usize, stats: &LayerStats) -> Result<()> {
        stored::write_json(&self.stats_path(layer), stats)
    }

    /// Statistics of a block that is complete.
    pub(crate) fn stats(&self, layer: usize) -> Result<Option<LayerStats>> {
        stored::read_json(&self.stats_path(layer))
    }

    /// A sublayer of `ranking` at the width of `steps`.
    pub(crate) fn load(&self, ranking: &Ranking, steps: usize) -> Result<Kept> {
        if steps == 0 {
            return Ok(Kept::Gone);
        }
        if steps == ranking.steps().len() {
            return Ok(Kept::Dense);
        }
        let file = Tensors::open(&self.levels_path(ranking.layer, ranking.part))?;
        let units = file.load(&format!("units.{steps}"))?;
        let weight = file.load(&format!("weight.{steps}"))?;
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
