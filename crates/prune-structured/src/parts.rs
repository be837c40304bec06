//! Statistics of a model that are computed in parts, each on some of the calibration windows, and merged.
//!
//! Everything that a calibration keeps is a sum over tokens or a mean that carries its count, so that parts of any number and
//! size give the statistics of all windows. The sums of Gram matrices are in f32 and moments are merged by Chan's update:
//! merged statistics differ from those of one pass, and those of another division, by rounding in the last digits. The same
//! parts in the same order give the same bits. FLAP's fluctuation as published depends on the order of windows and cannot be
//! merged.

use std::path::Path;

use candle_core::DType;
use serde::{Deserialize, Serialize};

use crate::stats::{ColumnStats, GramStore, LayerStats, Part};
use crate::stored;
use crate::{Calibration, Error, Result};

const FILE: &str = "calibration.json";

/// What is not in files of its own.
#[derive(Serialize, Deserialize)]
struct Stored {
    layers: Vec<LayerStats>,
    gram: bool,
}

impl Calibration {
    /// Writes the statistics to the folder `dir`, beside the Gram matrices, which a calibration that collected any must have
    /// collected there.
    ///
    /// # Errors
    /// [`Error::Parts`] for Gram matrices in another folder; a folder that cannot be written.
    pub fn save(&self, dir: impl AsRef<Path>) -> Result<()> {
        let dir = dir.as_ref();
        if let Some(store) = self.gram.as_ref().filter(|store| store.dir() != dir) {
            return Err(Error::Parts(format!(
                "the Gram matrices are in {}, not in {}",
                store.dir().display(),
                dir.display()
            )));
        }
        let stored = Stored {
            layers: self.layers.clone(),
            gram: self.gram.is_some(),
        };
        stored::write_json(&dir.join(FILE), &stored)
    }

    /// The statistics that [`save`](Self::save) wrote to the folder `dir`, which must outlive them.
    ///
    /// # Errors
    /// [`Error::Parts`] for a folder without statistics; a file that is damaged.
    pub fn load(dir: impl AsRef<Path>) -> Result<Self> {
        let dir = dir.as_ref();
        let stored: Option<Stored> = stored::read_json(&dir.join(FILE))?;
        let Some(Stored { layers, gram }) = stored else {
            return Err(Error::Parts(format!("{} has none", dir.display())));
        };
        Ok(Self {
            layers,
            gram: gram.then(|| GramStore::new(dir)),
        })
    }

    /// The statistics of all windows of `parts`, in their order; Gram matrices go to `dir`, which must exist and outlive them.
    ///
    /// # Errors
    /// [`Error::Parts`] where there are none, where they are of different models or kinds, and for statistics that depend on the
    /// order of windows; what reading and writing Gram matrices reports.
    pub fn merge(parts: &[Self], dir: impl AsRef<Path>) -> Result<Self> {
        let different = || Error::Parts("they are of different models or kinds".into());
        let (first, others) = parts
            .split_first()
            .ok_or_else(|| Error::Parts("there are no parts".into()))?;
        let mut layers = first.layers.clone();
        for other in others {
            if other.layers.len() != layers.len() {
                return Err(different());
            }
            for (layer, other) in layers.iter_mut().zip(&other.layers) {
                merge_half(&mut layer.attention, &other.attention)?;
                merge_half(&mut layer.mlp, &other.mlp)?;
                layer.hidden_square += other.hidden_square;
            }
        }
        let stores = parts.iter().map(|part| part.gram.as_ref());
        let stores: Vec<&GramStore> = stores.flatten().collect();
        if !stores.is_empty() && stores.len() != parts.len() {
            return Err(different());
        }
        let gram = match stores.is_empty() {
            true => None,
            false => Some(GramStore::new(dir.as_ref())),
        };
        if let Some(gram) = &gram {
            for (layer, stats) in layers.iter().enumerate() {
                for part in Part::ALL
                    .into_iter()
                    .filter(|&part| stats.part(part).is_some())
                {
                    let mut sum = stores[0].load(layer, part)?.to_dtype(DType::F64)?;
                    for store in &stores[1..] {
                        let other = store.load(layer, part)?;
                        if other.dims() != sum.dims() {
                            return Err(different());
                        }
                        sum = (sum + other.to_dtype(DType::F64)?)?;
                    }
                    gram.save(layer, part, &sum.to_dtype(DType::F32)?)?;
                }
            }
        }
        Ok(Self { layers, gram })
    }
}

fn merge_half(half: &mut Option<ColumnStats>, other: &Option<ColumnStats>) -> Result<()> {
    let different = || Error::Parts("they are of different models or kinds".into());
    let (half, other) = match (half, other) {
        (None, None) => return Ok(()),
        (Some(half), Some(other)) => (half, other),
        _ => return Err(different()),
    };
    if half.fluctuation.is_some() || other.fluctuation.is_some() {
        return Err(Error::Parts(
            "FLAP's fluctuation as published depends on the order of windows".into(),
        ));
    }
    let same_model = half.weight_square == other.weight_square
        && half.weight_abs == other.weight_abs
        && half.outputs == other.outputs;
    if !same_model {
        return Err(different());
    }
    half.output_square = match (half.output_square, other.output_square) {
        (None, None) => None,
        (Some(a), Some(b)) => {
            let (m, n) = (half.moments.count as f64, other.moments.count as f64);
            Some((a * m + b * n) / (m + n).max(1.0))
        }
        _ => return Err(different()),
    };
    half.moments.merge(&other.moments);
    half.samples += other.samples;
    Ok(())
}
