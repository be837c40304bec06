//! Second moments of the inputs of all linears on the calibration windows of the dense model, on disk.

use crate::Result;
use crate::matrix::{from_tensor, to_tensor};
use candle_core::{DType, Device};
use causal_lm::{Decoder, Hidden, LinearName, Progress, Site, Tap, TapResult, Windows};
use faer::Mat;
use lowrank_eora::repair::layer::{Accumulation, Collect, InputCollector, Rows};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use tensor_io::Checkpoint;

const NAME: &str = "gram";

/// A folder with H = X Xᵀ of each input of each block, f32.
#[derive(Clone, Debug)]
pub(crate) struct Inputs {
    dir: PathBuf,
}

impl Inputs {
    /// Sums up what is not in `dir` yet; a step of `progress` is a block.
    pub(crate) fn collect(
        decoder: &Decoder<'_>,
        windows: &Windows,
        dir: &Path,
        progress: &dyn Progress,
    ) -> Result<Self> {
        std::fs::create_dir_all(dir).map_err(tensor_io::Error::io("create", dir))?;
        let inputs = Self {
            dir: dir.to_owned(),
        };
        let layers = decoder.config().layers();
        progress.begin("inputs of linears", layers as u64);
        if (0..layers).all(|layer| inputs.path(layer).exists()) {
            progress.advance(layers as u64)?;
            return Ok(inputs);
        }
        let mut hidden = Hidden::embed(decoder, windows)?;
        for layer in 0..layers {
            let mut sums = Sums::default();
            hidden.advance_stored(decoder, layer, &mut sums)?;
            let mut tensors = Vec::new();
            for (place, collector) in sums.0 {
                if let Some(gram) = collector.finish().gram {
                    let gram = to_tensor(gram.matrix(), DType::F32)?;
                    tensors.push((format!("{NAME}.{place}"), gram));
                }
            }
            let named = tensors.iter().map(|(name, gram)| (name.as_str(), gram));
            tensor_io::write_checked_file(inputs.path(layer), named, &BTreeMap::new())?;
            progress.advance(1)?;
        }
        Ok(inputs)
    }

    fn path(&self, layer: usize) -> PathBuf {
        self.dir.join(format!("inputs-{layer}.safetensors"))
    }

    /// H of the input of a linear, of the channels `columns` alone where they are given.
    pub(crate) fn gram(
        &self,
        layer: usize,
        linear: LinearName,
        columns: Option<&[usize]>,
    ) -> Result<Mat<f64>> {
        let file = Checkpoint::open_checked_file(self.path(layer))?;
        let name = format!("{NAME}.{}", place(site_of(linear)));
        let gram = from_tensor(&file.tensor(&name, &Device::Cpu)?)?;
        Ok(match columns {
            None => gram,
            Some(ids) => Mat::from_fn(ids.len(), ids.len(), |i, j| gram[(ids[i], ids[j])]),
        })
    }
}

fn site_of(linear: LinearName) -> Site {
    match (linear.is_attention(), linear.is_output()) {
        (true, false) => Site::Qkv,
        (true, true) => Site::O,
        (false, false) => Site::GateUp,
        (false, true) => Site::Down,
    }
}

fn place(site: Site) -> &'static str {
    match site {
        Site::Qkv => "qkv",
        Site::O => "o",
        Site::GateUp => "gate-up",
        Site::Down => "down",
    }
}

/// The sums of one block.
#[derive(Default)]
struct Sums(BTreeMap<&'static str, InputCollector>);

impl Tap for Sums {
    fn observe(&mut self, _layer: usize, site: Site, x: &candle_core::Tensor) -> TapResult {
        let rows = Rows::from_tensor(x)?;
        let collector = match self.0.entry(place(site)) {
            std::collections::btree_map::Entry::Occupied(entry) => entry.into_mut(),
            std::collections::btree_map::Entry::Vacant(entry) => {
                let collect = Collect {
                    gram: true,
                    cross: false,
                };
                let width = x.dims().last().copied().unwrap_or(0);
                entry.insert(InputCollector::new(width, collect, Accumulation::Sum)?)
            }
        };
        collector.update(&rows, None)?;
        Ok(())
    }
}
