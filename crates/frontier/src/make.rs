//! Making treatments: prune and refit, quantise, correct.
//!
//! A site is treated by itself, on second moments of the dense model's inputs, so that what was measured of a treatment is
//! what a plan with it writes. Made weights are kept on disk in their stored form and read when they are needed: a treatment
//! is made once, and memory holds one linear at a time, or one expert.

use crate::error::{Error, Result};
use crate::experts::neuron_options;
use crate::inputs::Inputs;
use crate::matrix::{from_tensor, to_tensor};
use crate::site::Site;
use crate::treatment::{Format, Treatment};
use candle_core::{DType, Device, Tensor};
use causal_lm::names::Module;
use causal_lm::{Block, Decoder, LinearName};
use faer::Mat;
use linalg::{dot, product};
use lowrank_eora::compress::{BlockTypes, Inputs as Known};
use lowrank_eora::repair::layer::{LowRank, Options as Solver, Weighting, solve};
use lowrank_eora::repair::{LayerId, RepairedLayer, StoredWeight, place};
use prune_structured::compensation::refit;
use prune_structured::divergence::{Half, Kept};
use prune_structured::experts::NeuronOptions;
use prune_structured::output::kept_features;
use prune_structured::stats::Part;
use prune_structured::{
    Calibration, Collect, Compensation, DEFAULT_RIDGE, LayerPlan, NoProgress, Plan, Progress,
    Ranking, Recipe,
};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use tensor_io::Checkpoint;

/// Neurons are removed so many at a time, which keeps rows whole blocks and words.
const ALIGNMENT: usize = 32;

/// What weights of a site are made from.
pub(crate) struct Maker<'a> {
    pub(crate) decoder: &'a Decoder<'a>,
    pub(crate) calibration: Calibration,
    pub(crate) recipe: Recipe,
    /// How neurons of experts are chosen.
    pub(crate) neurons: NeuronOptions,
    /// Of the halves of the blocks that can be pruned.
    rankings: BTreeMap<Site, Ranking>,
    pub(crate) inputs: Inputs,
    pub(crate) dir: PathBuf,
    /// The largest rank, from which the smaller ones are cut.
    largest_rank: usize,
    /// Shapes by site and width: a menu asks for those of each width many times.
    shapes: Mutex<BTreeMap<(Site, usize), Shapes>>,
}

/// The linears of a site with the shapes that they are stored with.
type Shapes = Arc<Vec<(LayerId, [usize; 2])>>;

/// A linear at a width, not quantised yet.
struct Pruned {
    name: LinearName,
    id: LayerId,
    /// `[outputs, inputs]` f32.
    weight: Tensor,
    /// The channels that its input keeps, where it loses some.
    columns: Option<Vec<usize>>,
}

impl<'a> Maker<'a> {
    /// Calibrates in `dir`, or reads what an earlier run left there.
    pub(crate) fn new(
        decoder: &'a Decoder<'a>,
        windows: &causal_lm::Windows,
        (seed, largest_rank): (u64, usize),
        dir: &Path,
        progress: &dyn Progress,
    ) -> Result<Self> {
        let mut recipe = Recipe::named("rd-dp", seed).ok_or(Error::Option {
            option: "recipe",
            value: "rd-dp".into(),
            expected: "prune-structured knows it",
        })?;
        let neurons = decoder.config().widths.iter().map(|w| w.neurons);
        if neurons.filter(|&n| n > 0).all(|n| n >= ALIGNMENT) {
            recipe.shape.align_neurons = ALIGNMENT;
        }
        let made = dir.join("made");
        std::fs::create_dir_all(&made).map_err(tensor_io::Error::io("create", &made))?;
        let needs = recipe.score.needs() | Compensation::LEAST_SQUARES.needs();
        let collect = Collect::new(needs, dir);
        let saved = dir.join("calibration.json");
        let calibration = match tensor_io::atomic::read_sealed_json(&saved)? {
            Some(layers) => Calibration {
                layers,
                gram: collect.gram.clone(),
            },
            None => {
                let calibration = Calibration::run(decoder, windows, &collect, progress)?;
                tensor_io::atomic::write_sealed_json(&saved, &calibration.layers)?;
                calibration
            }
        };
        let inputs = Inputs::collect(decoder, windows, dir, progress)?;
        let rankings = recipe
            .score
            .rank(decoder, &calibration, &recipe.shape, progress)?;
        let site = |ranking: &Ranking| match ranking.part {
            Part::Attention => Site::Attention(ranking.layer),
            Part::Mlp => Site::Mlp(ranking.layer),
        };
        Ok(Self {
            decoder,
            calibration,
            neurons: neuron_options(decoder.config(), ALIGNMENT),
            recipe,
            rankings: rankings.into_iter().map(|r| (site(&r), r)).collect(),
            inputs,
            dir: made,
            largest_rank,
            shapes: Mutex::default(),
        })
    }

    /// The ranking of a site's units; `None` where nothing can be pruned.
    pub(crate) fn ranking(&self, site: Site) -> Option<&Ranking> {
        self.rankings.get(&site)
    }

    /// Units that the model has at a site.
    pub(crate) fn units(&self, site: Site) -> usize {
        match (site, self.ranking(site)) {
            (_, Some(ranking)) => ranking.order().len(),
            (Site::Experts(layer), None) => self.mixture(layer).map_or(1, |mixture| mixture.width),
            (_, None) => 1,
        }
    }

    /// The treatment that leaves a site as it is.
    pub(crate) fn dense(&self, site: Site) -> Treatment {
        Treatment {
            width: self.units(site),
            format: Format::Stored,
            rank: 0,
            cache: None,
        }
    }

    /// What blocks keep when sites have these widths.
    pub(crate) fn plan(&self, widths: &[(Site, usize)]) -> Result<Plan> {
        let dense = &self.decoder.config().widths;
        let mut layers: Vec<LayerPlan> = dense.iter().map(|&w| LayerPlan::whole(w)).collect();
        for &(site, width) in widths {
            if let (Some((layer, _)), Some(ranking)) = (site.half(), self.ranking(site)) {
                layers[layer].keep(dense[layer], ranking, kept_units(site, ranking, width)?);
            }
        }
        Ok(Plan {
            recipe: self.recipe.clone(),
            ratio: 0.0,
            compensation: Compensation::LEAST_SQUARES,
            layers,
        })
    }

    /// The linears of a site at a width, with the shapes that they are stored with.
    pub(crate) fn shapes(&self, site: Site, width: usize) -> Result<Shapes> {
        let mut known = match self.shapes.lock() {
            Ok(known) => known,
            Err(poisoned) => poisoned.into_inner(),
        };
        if let Some(shapes) = known.get(&(site, width)) {
            return Ok(shapes.clone());
        }
        if site.matrix(self.decoder).is_some() || matches!(site, Site::Experts(_)) {
            return Err(Error::PlanMismatch(format!(
                "{site} has no linears of its own"
            )));
        }
        let plan = self.plan(&[(site, width)])?;
        let shape = |(_, id, module): (LinearName, LayerId, &'static Module)| {
            let dense = self.decoder.config().module_shape(id.block(), module)?;
            let kept = kept_features(self.decoder, &plan, id.block(), module).len();
            Some(match module.is_output() {
                true => (id, [dense[0], kept]),
                false => (id, [kept, dense[1]]),
            })
        };
        let linears = site.linears(self.decoder).into_iter();
        let shapes = Arc::new(linears.filter_map(shape).collect());
        Ok(known.entry((site, width)).or_insert(shapes).clone())
    }

    /// The share of the squared output of a site that stays at a width, on the calibration windows.
    pub(crate) fn energy_share(&self, site: Site, width: usize) -> Result<f64> {
        if let Site::Experts(layer) = site {
            return self.expert_energy(layer, width);
        }
        let Some((layer, part)) = site.half().filter(|_| width < self.units(site)) else {
            return Ok(1.0);
        };
        let energy = |weight: &Tensor, columns: Option<&[usize]>| -> Result<f64> {
            let weight = from_tensor(weight)?;
            let gram = self.inputs.gram(layer, part.output(), columns)?;
            Ok(dot(
                product(weight.as_ref(), gram.as_ref()).as_ref(),
                weight.as_ref(),
            ))
        };
        let output = |pruned: &Pruned| pruned.name == part.output();
        let dense = self.pruned(site, self.units(site))?;
        let narrow = self.pruned(site, width)?;
        let (Some(dense), Some(narrow)) = (
            dense.iter().find(|p| output(p)),
            narrow.iter().find(|p| output(p)),
        ) else {
            return Ok(1.0);
        };
        let whole = energy(&dense.weight, None)?;
        let kept = energy(&narrow.weight, narrow.columns.as_deref())?;
        Ok(if whole > 0.0 {
            (kept / whole).clamp(0.0, 1.0)
        } else {
            1.0
        })
    }

    /// The linears of a site at a width, refitted.
    fn pruned(&self, site: Site, width: usize) -> Result<Vec<Pruned>> {
        let Some((layer, part)) = site.half() else {
            return Ok(Vec::new());
        };
        let plan = self.plan(&[(site, width)])?;
        let checkpoint = self.decoder.checkpoint();
        let mut all = Vec::new();
        for (name, id, module) in site.linears(self.decoder) {
            let tensor = id.weight();
            let dense = checkpoint.tensor_as(&tensor, DType::F32, &Device::Cpu)?;
            checkpoint.release([tensor.as_str()]);
            let kept = kept_features(self.decoder, &plan, layer, module);
            let (rows, columns) = dense.dims2()?;
            let whole = kept.len() == if module.is_output() { columns } else { rows };
            let (weight, columns) = if whole {
                (dense, None)
            } else if module.is_output() {
                let gram = self.calibration.gram(layer, part)?;
                let removed: Vec<usize> = (0..columns)
                    .filter(|column| kept.binary_search(column).is_err())
                    .collect();
                let weight = refit(&dense, &gram, &kept, &removed, DEFAULT_RIDGE, layer)?;
                (weight, Some(kept))
            } else {
                let ids = kept.iter().map(|&row| row as u32);
                (
                    dense.index_select(&Tensor::from_iter(ids, &Device::Cpu)?, 0)?,
                    None,
                )
            };
            all.push(Pruned {
                name,
                id,
                weight,
                columns,
            });
        }
        Ok(all)
    }

    fn path(&self, site: Site, treatment: Treatment) -> PathBuf {
        let stem = self.file_stem(site, treatment);
        self.dir.join(format!("{stem}.safetensors"))
    }

    /// What a treatment that was made is called on disk; all ranks are cut from one.
    pub(crate) fn file_stem(&self, site: Site, treatment: Treatment) -> String {
        let Treatment {
            width,
            format,
            rank,
            cache: _,
        } = treatment;
        let corrected = if rank > 0 { "-corrected" } else { "" };
        let format = format.to_string().replace(':', "_");
        format!("{site}-{width}-{format}{corrected}")
    }

    /// Makes treatments of a site, those that are not there yet; a step of `progress` is a treatment.
    pub(crate) fn make_all(
        &self,
        site: Site,
        treatments: &[Treatment],
        progress: &dyn Progress,
    ) -> Result<()> {
        if let Site::Experts(layer) = site {
            self.make_experts(layer, treatments, progress)?;
            return Ok(progress.advance(treatments.len() as u64)?);
        }
        for &treatment in treatments {
            self.make(site, treatment)?;
            progress.advance(1)?;
        }
        Ok(())
    }

    /// Makes a treatment, unless it is there.
    pub(crate) fn make(&self, site: Site, treatment: Treatment) -> Result<()> {
        if let Site::Experts(layer) = site {
            return self.make_experts(layer, &[treatment], &NoProgress);
        }
        let path = self.path(site, treatment);
        if treatment.is_dense(self.units(site)) || path.exists() {
            return Ok(());
        }
        let mut tensors: Vec<(String, Tensor)> = Vec::new();
        if let Some(name) = site.matrix(self.decoder) {
            let weight = self.decoder.checkpoint();
            let weight = weight.tensor_as(&name, DType::F32, &Device::Cpu)?;
            let stored = match treatment.format {
                Format::Stored => StoredWeight::Dense(weight),
                Format::Quantised(compressor) => {
                    StoredWeight::of(compressor.compress_tensor(&weight, None)?, DType::F32)?
                }
            };
            tensors.extend(stored.tensors(&site.to_string())?);
        }
        for pruned in self.pruned(site, treatment.width)? {
            let module = pruned.id.to_string();
            let (stored, factors) = self.treated(&pruned, treatment)?;
            tensors.extend(stored.tensors(&module)?);
            if let Some(factors) = factors {
                let (a, b) = factors.to_tensors(DType::F16, &Device::Cpu)?;
                tensors.push((format!("{module}.lora_A"), a));
                tensors.push((format!("{module}.lora_B"), b));
            }
            let gram = self.gram(&pruned)?;
            let diagonal: Vec<f64> = (0..gram.nrows()).map(|i| gram[(i, i)]).collect();
            tensors.push((
                format!("{module}.square"),
                Tensor::new(diagonal, &Device::Cpu)?,
            ));
        }
        let named = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor));
        Ok(tensor_io::write_checked_file(
            path,
            named,
            &BTreeMap::new(),
        )?)
    }

    fn gram(&self, pruned: &Pruned) -> Result<Mat<f64>> {
        let (layer, columns) = (pruned.id.block(), pruned.columns.as_deref());
        self.inputs.gram(layer, pruned.name, columns)
    }

    /// A linear in its stored form, and its correction of the largest rank where one is wanted.
    fn treated(
        &self,
        pruned: &Pruned,
        treatment: Treatment,
    ) -> Result<(StoredWeight, Option<LowRank>)> {
        let stored = match treatment.format {
            Format::Stored => StoredWeight::Dense(pruned.weight.to_dtype(self.dtype(pruned.id)?)?),
            Format::Quantised(_) => {
                let format = self.format_of(pruned.id, treatment.format);
                let uncorrected = Treatment {
                    rank: 0,
                    format,
                    ..treatment
                };
                let site = site_of(pruned);
                match self.path(site, uncorrected).exists() {
                    true => self.read(site, uncorrected, pruned.id)?,
                    false => self.quantised(pruned, format)?,
                }
            }
        };
        if treatment.rank == 0 {
            return Ok((stored, None));
        }
        let residual = from_tensor(&pruned.weight)? - stored.matrix()?;
        if residual.norm_max() == 0.0 {
            return Ok((stored, None));
        }
        let rank = self
            .largest_rank
            .min(residual.nrows())
            .min(residual.ncols());
        let gram = self.gram(pruned)?;
        let weighting = Weighting::Gram(gram.as_ref());
        let solution = solve(residual.as_ref(), &weighting, rank, &Solver::default())?;
        Ok((stored, Some(solution.factors)))
    }

    fn quantised(&self, pruned: &Pruned, format: Format) -> Result<StoredWeight> {
        let Format::Quantised(compressor) = format else {
            return Ok(StoredWeight::Dense(pruned.weight.clone()));
        };
        let gram = self.gram(pruned)?;
        let known = Some(Known::Gram(gram.as_ref()));
        let compressed = compressor.compress_tensor(&pruned.weight, known)?;
        Ok(StoredWeight::of(compressed, DType::F32)?)
    }

    /// The format of a linear of a block: a mix becomes the type that it gives to this one.
    pub(crate) fn format_of(&self, id: LayerId, format: Format) -> Format {
        match format {
            Format::Quantised(mix) if format.is_mix() => {
                Format::Quantised(mix.at(place(self.decoder, id)))
            }
            one => one,
        }
    }

    /// The format at a site: weights of the embedding and the head are rounded, and a mix becomes the type that it gives to
    /// them.
    pub(crate) fn format_at(&self, site: Site, format: Format) -> Result<Format> {
        if site.half().is_some() {
            return Ok(format);
        }
        let Format::Quantised(mut compressor) = format.nearest() else {
            return Ok(format);
        };
        if let (true, Some(name)) = (format.is_mix(), site.matrix(self.decoder))
            && let Some(blocks) = &mut compressor.blocks
        {
            let cols = self.decoder.checkpoint().info(&name)?.shape.last().copied();
            let is_head = self.decoder.config().tied || site != Site::Embedding;
            let cols = cols.unwrap_or(0);
            blocks.types = BlockTypes::One(match is_head {
                true => blocks.types.head(cols),
                false => blocks.types.embedding(cols),
            });
        }
        Ok(Format::Quantised(compressor))
    }

    /// The dtype of a linear in the checkpoint; f32 where it is not stored as floats.
    fn dtype(&self, id: LayerId) -> Result<DType> {
        let info = self.decoder.checkpoint().info(&id.weight())?;
        Ok(info.candle_dtype().unwrap_or(DType::F32))
    }

    /// A linear of a treatment that was made before, without its correction.
    fn read(&self, site: Site, treatment: Treatment, id: LayerId) -> Result<StoredWeight> {
        let file = Checkpoint::open_checked_file(self.path(site, treatment))?;
        Ok(StoredWeight::read(&file, &id.to_string())?)
    }

    /// The matrix of the embedding or the head in its stored form; `None` where it is as in the model.
    pub(crate) fn matrix(&self, site: Site, treatment: Treatment) -> Result<Option<StoredWeight>> {
        if treatment.is_dense(self.units(site)) {
            return Ok(None);
        }
        self.make(site, treatment)?;
        let file = Checkpoint::open_checked_file(self.path(site, treatment))?;
        Ok(Some(StoredWeight::read(&file, &site.to_string())?))
    }

    /// The linears of a site as they are stored after a treatment.
    pub(crate) fn layers(
        &self,
        decoder: &Decoder<'_>,
        site: Site,
        treatment: Treatment,
    ) -> Result<Vec<RepairedLayer>> {
        if treatment.is_dense(self.units(site)) {
            let layer = |(_, id, _): (LinearName, LayerId, &'static Module)| {
                let stored = self.decoder.checkpoint();
                let weight = stored.tensor_as(&id.weight(), self.dtype(id)?, &Device::Cpu)?;
                let inputs = weight.dim(1)?;
                let weight = StoredWeight::Dense(weight);
                Ok(RepairedLayer::made(
                    decoder,
                    id,
                    weight,
                    None,
                    vec![1.0; inputs],
                )?)
            };
            return site.linears(self.decoder).into_iter().map(layer).collect();
        }
        self.make(site, treatment)?;
        let file = Checkpoint::open_checked_file(self.path(site, treatment))?;
        let layer = |(_, id, _): (LinearName, LayerId, &'static Module)| {
            let weight = StoredWeight::read(&file, &id.to_string())?;
            let factors = match treatment.rank {
                0 => None,
                rank => factors(&file, id, rank)?,
            };
            let square = file.tensor(&format!("{id}.square"), &Device::Cpu)?;
            let square = square.to_vec1::<f64>()?;
            Ok(RepairedLayer::made(decoder, id, weight, factors, square)?)
        };
        site.linears(self.decoder).into_iter().map(layer).collect()
    }

    /// The half of a loaded dense block after a treatment.
    pub(crate) fn half(&self, block: &Block, site: Site, treatment: Treatment) -> Result<Half> {
        let Some(ranking) = self.ranking(site) else {
            return self.unpruned_half(block, site, treatment);
        };
        let widths = self.decoder.config().widths[block.layer];
        if treatment.is_dense(self.units(site)) {
            return Ok(Half::new(block, widths, ranking, Kept::Dense)?);
        }
        let weights = self.weights(site, treatment)?;
        let whole = treatment.width == self.units(site);
        let output = weights
            .iter()
            .find(|(name, _)| *name == ranking.part.output());
        let kept = match (whole, output) {
            (false, Some((_, weight))) => Kept::Some {
                units: kept_units(site, ranking, treatment.width)?,
                weight: weight.clone(),
            },
            _ => Kept::Dense,
        };
        let mut half = Half::new(block, widths, ranking, kept)?;
        self.put(&mut half, weights)?;
        Ok(half)
    }

    /// Of a site of which no unit can be removed.
    fn unpruned_half(&self, block: &Block, site: Site, treatment: Treatment) -> Result<Half> {
        let shared = block.experts.as_ref().and_then(|moe| moe.shared.as_ref());
        let mut half = match (site, shared) {
            (Site::Attention(_), _) => Half::Attention(Box::new(block.attention.clone())),
            (Site::SharedExpert(_), Some(shared)) => Half::SharedExpert(shared.mlp.clone()),
            _ => Half::Mlp(block.mlp.clone()),
        };
        if !treatment.is_dense(self.units(site)) {
            self.put(&mut half, self.weights(site, treatment)?)?;
        }
        Ok(half)
    }

    /// W_c + B A of the linears of a site, f32.
    fn weights(&self, site: Site, treatment: Treatment) -> Result<Vec<(LinearName, Tensor)>> {
        let mut weights = Vec::new();
        for layer in self.layers(self.decoder, site, treatment)? {
            let id = layer.report.layer;
            let merged = to_tensor(layer.merged()?.as_ref(), DType::F32)?;
            match id.module().parts {
                [name] => weights.push((*name, merged)),
                _ => weights.extend(self.split(site, treatment.width, (id, &merged))?),
            }
        }
        Ok(weights)
    }

    /// The linears whose rows one stored matrix holds, of a site at a width.
    fn split(
        &self,
        site: Site,
        width: usize,
        (id, stored): (LayerId, &Tensor),
    ) -> Result<Vec<(LinearName, Tensor)>> {
        let (layer, module) = (id.block(), id.module());
        let plan = self.plan(&[(site, width)])?;
        let kept = kept_features(self.decoder, &plan, layer, module);
        let runs = self.decoder.config().runs(layer, module);
        let mut rows: BTreeMap<LinearName, Vec<u32>> = BTreeMap::new();
        let mut run = runs.iter().peekable();
        for (row, dense) in kept.into_iter().enumerate() {
            while run
                .next_if(|run| run.at + run.rows.len() <= dense)
                .is_some()
            {}
            if let Some(run) = run.peek() {
                rows.entry(run.part).or_default().push(row as u32);
            }
        }
        let part = |(name, rows): (LinearName, Vec<u32>)| {
            let rows = Tensor::new(rows, stored.device())?;
            Ok((name, stored.index_select(&rows, 0)?))
        };
        rows.into_iter().map(part).collect()
    }

    fn put(&self, half: &mut Half, weights: Vec<(LinearName, Tensor)>) -> Result<()> {
        for (name, weight) in weights {
            if let Some(linear) = half.linear_mut(name) {
                let weight = weight.to_dtype(self.decoder.dtype())?;
                linear.set_weight(weight.to_device(self.decoder.device())?);
            }
        }
        Ok(())
    }
}

/// The site that a linear belongs to.
fn site_of(pruned: &Pruned) -> Site {
    let block = pruned.id.block();
    match (pruned.name.is_attention(), pruned.name.is_shared()) {
        (true, _) => Site::Attention(block),
        (false, true) => Site::SharedExpert(block),
        (false, false) => Site::Mlp(block),
    }
}

/// Ids of the units that a width keeps, ascending.
fn kept_units(site: Site, ranking: &Ranking, width: usize) -> Result<Vec<usize>> {
    let steps = ranking
        .steps_of(width)
        .ok_or_else(|| Error::PlanMismatch(format!("{site} has no width of {width} units")))?;
    Ok(ranking.kept(steps))
}

/// B and A cut to a rank; `None` where nothing was left to correct.
fn factors(file: &Checkpoint, id: LayerId, rank: usize) -> Result<Option<LowRank>> {
    if !file.contains(&format!("{id}.lora_A")) {
        return Ok(None);
    }
    let factors = LowRank::from_tensors(
        &file.tensor(&format!("{id}.lora_A"), &Device::Cpu)?,
        &file.tensor(&format!("{id}.lora_B"), &Device::Cpu)?,
    )?;
    Ok(Some(factors.truncated(rank.min(factors.rank()))?))
}
