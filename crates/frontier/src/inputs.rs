//! Second moments of the inputs of all linears on the calibration windows of the dense model, on disk. Of experts, each of which
//! sees tokens of its own, all inputs are kept instead, with what the router makes of them.

use crate::Result;
use crate::matrix::{among, from_tensor, to_tensor};
use candle_core::{DType, Device, Tensor};
use causal_lm::mixture::{ExpertInputs, RoutingRule};
use causal_lm::{
    Decoder, ExpertPass, Hidden, LinearName, Progress, Routed, Site, Tap, TapResult, Windows,
};
use faer::Mat;
use lowrank_eora::repair::layer::{Accumulation, Collect, InputCollector, Rows};
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::path::{Path, PathBuf};
use tensor_io::Checkpoint;

const NAME: &str = "gram";
/// What experts read, `[tokens, hidden]`, and the router's logits, `[tokens, experts]`, f32.
const INPUTS: &str = "inputs";
const LOGITS: &str = "logits";

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
            sums.save_experts(&inputs.experts_path(layer))?;
            let mut tensors = Vec::new();
            for (place, collector) in sums.linears {
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

    fn experts_path(&self, layer: usize) -> PathBuf {
        self.dir.join(format!("experts-{layer}.safetensors"))
    }

    /// What the experts of a block read, as one batch.
    pub(crate) fn experts(&self, decoder: &Decoder<'_>, layer: usize) -> Result<ExpertInputs> {
        let file = Checkpoint::open_checked_file(self.experts_path(layer))?;
        let logits = file.tensor(LOGITS, &Device::Cpu)?;
        let (_, experts) = logits.dims2()?;
        let mixture = decoder.config().mixtures[layer];
        let rule = RoutingRule {
            chosen: mixture.map_or(0, |mixture| mixture.chosen),
            normalise: mixture.is_some_and(|mixture| mixture.normalise),
        };
        let x = file.tensor(INPUTS, decoder.device())?;
        Ok(ExpertInputs {
            inputs: vec![x.to_dtype(decoder.dtype())?],
            routings: vec![rule.route(logits.flatten_all()?.to_vec1()?, experts)?],
        })
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
            Some(ids) => among(gram.as_ref(), ids),
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
struct Sums {
    linears: BTreeMap<&'static str, InputCollector>,
    /// What its experts read, where it has some.
    experts: ExpertInputs,
}

impl Sums {
    fn add(&mut self, site: Site, x: &Tensor) -> Result<()> {
        let rows = Rows::from_tensor(x)?;
        let collector = match self.linears.entry(place(site)) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => {
                let collect = Collect {
                    gram: true,
                    cross: false,
                };
                let width = x.dims().last().copied().unwrap_or(0);
                entry.insert(InputCollector::new(width, collect, Accumulation::Sum)?)
            }
        };
        Ok(collector.update(&rows, None)?)
    }

    /// Keeps what the experts read.
    fn save_experts(&self, path: &Path) -> Result<()> {
        let ExpertInputs { inputs, routings } = &self.experts;
        let Some(experts) = routings.first().map(|routing| routing.experts) else {
            return Ok(());
        };
        let inputs = Tensor::cat(inputs, 0)?.to_dtype(DType::F32)?;
        let logits: Vec<f32> = routings.iter().flat_map(|r| r.logits.clone()).collect();
        let shape = (logits.len() / experts.max(1), experts);
        let logits = Tensor::from_vec(logits, shape, &Device::Cpu)?;
        let tensors = [
            (INPUTS, &inputs.to_device(&Device::Cpu)?),
            (LOGITS, &logits),
        ];
        Ok(tensor_io::write_checked_file(
            path,
            tensors,
            &BTreeMap::new(),
        )?)
    }
}

impl Tap for Sums {
    fn observe(&mut self, _layer: usize, site: Site, x: &Tensor) -> TapResult {
        Ok(self.add(site, x)?)
    }

    fn routed(&mut self, layer: usize, routed: &Routed<'_>) -> TapResult {
        self.experts.routed(layer, routed)
    }

    /// Of the expert that every token passes through, whose error is multiplied by its gate.
    fn expert(&mut self, _layer: usize, pass: &ExpertPass) -> TapResult {
        if pass.expert.is_none() {
            let gates = Tensor::new(pass.gates.as_slice(), pass.input.device())?.unsqueeze(1)?;
            for (site, x) in [(Site::GateUp, &pass.input), (Site::Down, &pass.neurons)] {
                self.add(site, &x.broadcast_mul(&gates.to_dtype(x.dtype())?)?)?;
            }
        }
        Ok(())
    }
}
