//! The experts of a block as one site.
//!
//! All experts of a block keep as many neurons, each those that matter most to the tokens that chose it, and are stored in one
//! format. They are treated one by one, on what the dense model's router sent to each, so that one expert is in memory at a
//! time. A treatment is a folder with a file for each expert.

use crate::error::{Error, Result};
use crate::make::Maker;
use crate::matrix::{among, from_tensor, to_tensor};
use crate::plan::SitePlan;
use crate::site::Site;
use crate::treatment::{Format, Treatment};
use candle_core::{DType, Device, Tensor};
use causal_lm::block::Mlp;
use causal_lm::config::Mixture;
use causal_lm::names::{ExpertLayout, ExpertPart};
use causal_lm::{Linear, LinearName, ModelConfig};
use faer::Mat;
use linalg::{dot, product};
use lowrank_eora::compress::Inputs as Known;
use lowrank_eora::experts::{ExpertGrams, GramOptions, LayerPool};
use lowrank_eora::repair::StoredWeight;
use prune_structured::Progress;
use prune_structured::experts::{ExpertNeurons, ExpertPlan, ExpertRefits, NeuronOptions};
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::path::PathBuf;
use tensor_io::atomic::Overwrite;
use tensor_io::{Checkpoint, PendingFolder, TensorSpec};

/// Linears of an expert in the order in which they are stored, with what they are called in the files of a treatment.
const LINEARS: [(LinearName, &str); 3] = [
    (LinearName::Gate, "gate"),
    (LinearName::Up, "up"),
    (LinearName::Down, "down"),
];
/// Ids of the neurons that stay, where some go.
const NEURONS: &str = "neurons";
/// Squared output of an expert at the width of a treatment and at its whole width, on the calibration windows.
const ENERGY: &str = "energy";

/// An expert at a width.
struct Narrow {
    mlp: Mlp,
    /// Its neurons, where it loses some.
    kept: Option<Vec<usize>>,
    energy: f64,
}

impl Maker<'_> {
    /// The experts of a block that has some.
    pub(crate) fn mixture(&self, layer: usize) -> Result<Mixture> {
        let mixture = self.decoder.config().mixtures.get(layer).copied().flatten();
        mixture.ok_or_else(|| Error::PlanMismatch(format!("block {layer} has no experts")))
    }

    /// Widths of the experts of a block at shares of their neurons.
    pub(crate) fn expert_widths(&self, layer: usize, shares: &[f64]) -> Result<Vec<usize>> {
        let width = self.mixture(layer)?.width;
        let of = |&share: &f64| -> Result<usize> { Ok(self.neurons.width(layer, width, share)?) };
        shares.iter().map(of).collect()
    }

    /// The model with the experts of a block at a width, stored in this layout; `None` where the architecture does not have
    /// it.
    fn stored_as(&self, layer: usize, width: usize, layout: ExpertLayout) -> Option<ModelConfig> {
        let mut config = self.decoder.config().clone();
        config.names = config.names.with_layout(layout)?;
        config.mixtures[layer].as_mut()?.width = width;
        Some(config)
    }

    /// The tensors of all experts of a block at a width, as floats; `None` where the architecture does not have the layout.
    pub(crate) fn expert_specs(
        &self,
        layer: usize,
        width: usize,
        layout: ExpertLayout,
    ) -> Result<Option<Vec<TensorSpec>>> {
        let Some(config) = self.stored_as(layer, width, layout) else {
            return Ok(None);
        };
        let experts = self.mixture(layer)?.experts;
        // One tensor of all experts has the shape of one, so many times.
        let listed = match layout {
            ExpertLayout::Alone => experts,
            ExpertLayout::Fused => 1,
        };
        let mut specs: Vec<TensorSpec> = Vec::new();
        for expert in 0..listed {
            for (name, _) in LINEARS {
                let Some(ExpertPart {
                    tensor,
                    rows,
                    columns,
                }) = config.expert_part(layer, expert, name)
                else {
                    continue;
                };
                if let Some(gate) = specs.iter_mut().find(|spec| spec.name == tensor) {
                    gate.shape[1] += rows.len();
                    continue;
                }
                let shape = match layout {
                    ExpertLayout::Alone => vec![rows.len(), columns],
                    ExpertLayout::Fused => vec![experts, rows.len(), columns],
                };
                let dtype = self.expert_dtype(layer, expert, name)?;
                specs.push(TensorSpec::new(tensor, dtype, shape));
            }
        }
        Ok(Some(specs))
    }

    /// Names of the tensors of the checkpoint that hold the experts of a block.
    pub(crate) fn expert_sources(&self, layer: usize) -> Result<Vec<String>> {
        let width = self.mixture(layer)?.width;
        let layout = self.decoder.config().names.layout();
        let specs = self.expert_specs(layer, width, layout)?.unwrap_or_default();
        Ok(specs.into_iter().map(|spec| spec.name).collect())
    }

    /// The dtype of a linear of an expert in the checkpoint; f32 where it is not stored as floats.
    pub(crate) fn expert_dtype(
        &self,
        layer: usize,
        expert: usize,
        name: LinearName,
    ) -> Result<DType> {
        let part = self.decoder.config().expert_part(layer, expert, name);
        let tensor = part.map(|part| part.tensor).unwrap_or_default();
        let info = self.decoder.checkpoint().info(&tensor)?;
        Ok(info.candle_dtype().unwrap_or(DType::F32))
    }

    fn experts_dir(&self, layer: usize, treatment: Treatment) -> PathBuf {
        self.dir
            .join(self.file_stem(Site::Experts(layer), treatment))
    }

    /// The file of an expert, checked.
    fn expert_file(&self, layer: usize, treatment: Treatment, expert: usize) -> Result<Checkpoint> {
        let path = self.experts_dir(layer, treatment);
        let path = path.join(format!("{expert}.safetensors"));
        Ok(Checkpoint::open_checked_file(path)?)
    }

    /// Makes treatments of the experts of a block that are not there yet; each expert is loaded once for all of them.
    pub(crate) fn make_experts(
        &self,
        layer: usize,
        treatments: &[Treatment],
        progress: &dyn Progress,
    ) -> Result<()> {
        let mixture = self.mixture(layer)?;
        let mut missing: Vec<(Treatment, PendingFolder)> = Vec::new();
        for &treatment in treatments {
            let dir = self.experts_dir(layer, treatment);
            let known = missing.iter().any(|(other, _)| *other == treatment);
            if !treatment.is_dense(mixture.width) && !known && !dir.exists() {
                missing.push((treatment, PendingFolder::create(dir, Overwrite::Never)?));
            }
        }
        if missing.is_empty() {
            return Ok(());
        }
        let inputs = self.inputs.experts(self.decoder, layer)?;
        let pool = LayerPool::of(&inputs)?;
        let options = GramOptions::default();
        for expert in 0..mixture.experts {
            progress.advance(0)?;
            let dense = self.decoder.expert(layer, expert)?;
            self.decoder.release_expert(layer, expert);
            let grams = ExpertGrams::of(&dense, (&inputs, expert), &pool, &options)?;
            let energy = energy(&dense, &grams, None)?;
            let mut ranked: Option<ExpertNeurons> = None;
            let mut widths: BTreeMap<usize, Narrow> = BTreeMap::new();
            for (treatment, folder) in &missing {
                let width = treatment.width;
                let narrow = match widths.entry(width) {
                    Entry::Occupied(made) => made.into_mut(),
                    Entry::Vacant(place) if width == mixture.width => place.insert(Narrow {
                        mlp: dense.clone(),
                        kept: None,
                        energy,
                    }),
                    Entry::Vacant(place) => {
                        let ranked = match &mut ranked {
                            Some(ranked) => &*ranked,
                            none => {
                                let of = (layer, expert);
                                let found = ExpertNeurons::of(&dense, &inputs, of, &self.neurons)?;
                                none.insert(found)
                            }
                        };
                        place.insert(Narrow::of((&dense, ranked), &grams, width)?)
                    }
                };
                let mut tensors =
                    self.treated_expert((layer, expert), narrow, &grams, treatment.format)?;
                let both = Tensor::new(&[narrow.energy, energy], &Device::Cpu)?;
                tensors.push((ENERGY.to_string(), both));
                let named = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor));
                let path = folder.path().join(format!("{expert}.safetensors"));
                tensor_io::write_checked_file(path, named, &BTreeMap::new())?;
            }
        }
        for (_, folder) in missing {
            folder.persist()?;
        }
        Ok(())
    }

    /// The linears of an expert in a format, with its neurons.
    fn treated_expert(
        &self,
        (layer, expert): (usize, usize),
        narrow: &Narrow,
        grams: &ExpertGrams,
        format: Format,
    ) -> Result<Vec<(String, Tensor)>> {
        let mut tensors = Vec::new();
        for (name, label) in LINEARS {
            let linear = match name {
                LinearName::Gate => narrow.mlp.gate.as_ref(),
                LinearName::Up => Some(&narrow.mlp.up),
                _ => Some(&narrow.mlp.down),
            };
            let Some(linear) = linear else { continue };
            let weight = linear.weight()?.to_device(&Device::Cpu)?;
            let stored = match format {
                Format::Stored => {
                    StoredWeight::Dense(weight.to_dtype(self.expert_dtype(layer, expert, name)?)?)
                }
                Format::Quantised(compressor) => {
                    let gram = match (&narrow.kept, name) {
                        (Some(kept), LinearName::Down) => among(grams.gram(name), kept),
                        _ => grams.gram(name).to_owned(),
                    };
                    let known = Some(Known::Gram(gram.as_ref()));
                    StoredWeight::of(compressor.compress_tensor(&weight, known)?, DType::F32)?
                }
            };
            tensors.extend(stored.tensors(label)?);
        }
        if let Some(kept) = &narrow.kept {
            let ids = kept.iter().map(|&neuron| neuron as u32);
            let ids = Tensor::from_iter(ids, &Device::Cpu)?;
            tensors.push((NEURONS.to_string(), ids));
        }
        Ok(tensors)
    }

    /// An expert after a treatment that was made.
    pub(crate) fn expert(&self, layer: usize, treatment: Treatment, expert: usize) -> Result<Mlp> {
        let decoder = self.decoder;
        if treatment.is_dense(self.units(Site::Experts(layer))) {
            return Ok(decoder.expert(layer, expert)?);
        }
        let file = self.expert_file(layer, treatment, expert)?;
        let linear = |label: &str| -> Result<Linear> {
            let weight = StoredWeight::read(&file, label)?.matrix()?;
            let weight = to_tensor(weight.as_ref(), DType::F32)?.to_dtype(decoder.dtype())?;
            Ok(Linear::new(weight.to_device(decoder.device())?, None))
        };
        Ok(Mlp {
            gate: Some(linear("gate")?),
            up: linear("up")?,
            down: linear("down")?,
            activation: decoder.config().activation,
        })
    }

    /// The share of the squared output of a block's experts that stays at a width, on the calibration windows.
    pub(crate) fn expert_energy(&self, layer: usize, width: usize) -> Result<f64> {
        let site = Site::Experts(layer);
        let treatment = Treatment {
            width,
            ..self.dense(site)
        };
        if treatment.is_dense(self.units(site)) {
            return Ok(1.0);
        }
        self.make(site, treatment)?;
        let (mut kept, mut whole) = (0.0, 0.0);
        for expert in 0..self.mixture(layer)?.experts {
            let file = self.expert_file(layer, treatment, expert)?;
            let energy: Vec<f64> = file.tensor(ENERGY, &Device::Cpu)?.to_vec1()?;
            kept += energy.first().copied().unwrap_or(0.0);
            whole += energy.get(1).copied().unwrap_or(0.0);
        }
        Ok(match whole > 0.0 {
            true => (kept / whole).clamp(0.0, 1.0),
            false => 1.0,
        })
    }

    /// What the experts of a plan keep, and how they are stored, where either is not as in the model. Down projections that
    /// stay as floats and were fitted anew go to `refits`.
    pub(crate) fn expert_plan(
        &self,
        sites: &[SitePlan],
        refits: &ExpertRefits,
    ) -> Result<Option<(ExpertPlan, ExpertLayout)>> {
        let mut plan = ExpertPlan::whole(self.decoder);
        let stored = self.decoder.config().names.layout();
        let mut layout = stored;
        for &SitePlan {
            site, treatment, ..
        } in sites
        {
            let Site::Experts(layer) = site else { continue };
            if treatment.format != Format::Stored {
                // Codes have names of single experts alone.
                layout = ExpertLayout::Alone;
            }
            if treatment.width == self.units(site) {
                continue;
            }
            let mut down = Vec::new();
            let Some(of_layer) = &mut plan.layers[layer] else {
                continue;
            };
            for (expert, neurons) in of_layer.neurons.iter_mut().enumerate() {
                let file = self.expert_file(layer, treatment, expert)?;
                let ids: Vec<u32> = file.tensor(NEURONS, &Device::Cpu)?.to_vec1()?;
                *neurons = ids.into_iter().map(|id| id as usize).collect();
                if let StoredWeight::Dense(weight) = StoredWeight::read(&file, "down")? {
                    down.push((expert, weight.to_dtype(DType::F32)?));
                }
            }
            if !down.is_empty() {
                refits.save(layer, &down)?;
            }
        }
        Ok((!plan.is_identity() || layout != stored).then_some((plan, layout)))
    }

    /// The quantised linears of the experts of a plan with the paths of their modules, one expert at a time.
    pub(crate) fn quantised_experts<'s>(
        &'s self,
        sites: &'s [SitePlan],
    ) -> impl Iterator<Item = Result<(String, StoredWeight)>> + 's {
        let quantised = sites.iter().filter_map(|site| match site.site {
            Site::Experts(layer) if site.treatment.format != Format::Stored => {
                Some((layer, site.treatment))
            }
            _ => None,
        });
        let experts = quantised.flat_map(move |(layer, treatment)| {
            let experts = self.mixture(layer).map_or(0, |mixture| mixture.experts);
            (0..experts).map(move |expert| (layer, treatment, expert))
        });
        experts.flat_map(move |(layer, treatment, expert)| {
            match self.stored_expert(layer, treatment, expert) {
                Ok(linears) => linears.into_iter().map(Ok).collect::<Vec<_>>(),
                Err(error) => vec![Err(error)],
            }
        })
    }

    fn stored_expert(
        &self,
        layer: usize,
        treatment: Treatment,
        expert: usize,
    ) -> Result<Vec<(String, StoredWeight)>> {
        let config = self.stored_as(layer, treatment.width, ExpertLayout::Alone);
        let file = self.expert_file(layer, treatment, expert)?;
        let linear = |(name, label): (LinearName, &str)| {
            let part = config.as_ref()?.expert_part(layer, expert, name)?;
            let module = part.tensor.strip_suffix(".weight")?.to_string();
            Some(StoredWeight::read(&file, label).map(|weight| (module, weight)))
        };
        let linears = LINEARS.into_iter().filter_map(linear);
        Ok(linears.collect::<lowrank_eora::Result<_>>()?)
    }
}

impl Narrow {
    /// An expert with the neurons that matter most.
    fn of(
        (dense, ranked): (&Mlp, &ExpertNeurons),
        grams: &ExpertGrams,
        width: usize,
    ) -> Result<Self> {
        let (mlp, kept) = (ranked.narrowed(dense, width)?, ranked.kept(width));
        Ok(Self {
            energy: energy(&mlp, grams, Some(&kept))?,
            kept: Some(kept),
            mlp,
        })
    }
}

/// Σ of the squared outputs of an expert, its tokens weighted by their squared gates.
fn energy(mlp: &Mlp, grams: &ExpertGrams, kept: Option<&[usize]>) -> Result<f64> {
    let weight = from_tensor(&mlp.down.weight()?)?;
    let gram: Mat<f64> = match kept {
        Some(kept) => among(grams.neurons.as_ref(), kept),
        None => grams.neurons.clone(),
    };
    let square = dot(
        product(weight.as_ref(), gram.as_ref()).as_ref(),
        weight.as_ref(),
    );
    Ok(grams.weight * square)
}

/// How neurons of experts are chosen, with widths that are multiples of `align` where all experts are as wide.
pub(crate) fn neuron_options(config: &ModelConfig, align: usize) -> NeuronOptions {
    let mut options = NeuronOptions::default();
    let mut widths = config
        .mixtures
        .iter()
        .flatten()
        .map(|mixture| mixture.width);
    options.align = match widths.all(|width| width >= align) {
        true => align,
        false => 1,
    };
    options
}
