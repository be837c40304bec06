//! Writing a checkpoint with the experts that stay.
//!
//! Tensors that the plan leaves alone are copied byte for byte, rows of the router are cut without looking at them unless
//! they are averaged, and only experts that were merged, scaled or narrowed are computed anew. Every expert can be moved to the other layout.
//!
//! Where all router rows stay, the config lists what each stands for (`expert_map`), and constants are a tensor beside the router,
//! in its dtype.

use super::ExpertRefits;
use super::merge;
use super::plan::{ExpertPlan, LayerExperts, Member};
use crate::output::{PerLayer, slice};
use crate::{Error, Loading, Result};
use candle_core::{DType, Device, Tensor};
use causal_lm::block::Mlp;
use causal_lm::config::{ExpertMap, WIDTHS_KEY};
use causal_lm::names::{ExpertLayout, Names};
use causal_lm::{Decoder, Linear, LinearName, ModelConfig, Progress};
use half::{bf16, f16};
use std::collections::{BTreeSet, HashMap};
use std::path::Path;
use tensor_io::{CheckpointWriter, Config, TensorSpec, WriteOptions, Written};

/// Linears of an expert in the order in which they are stored.
const LINEARS: [LinearName; 3] = [LinearName::Gate, LinearName::Up, LinearName::Down];

/// How a plan is written.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct ExpertSettings<'a> {
    /// Down projections that were fitted to the neurons that stay, for plans that narrow experts.
    pub refits: Option<&'a ExpertRefits>,
    /// How experts are stored; as they were unless this says otherwise.
    pub layout: Option<ExpertLayout>,
    /// Shards and overwriting.
    pub files: WriteOptions,
}

impl<'a> ExpertSettings<'a> {
    /// The same with down projections that were fitted to the neurons that stay.
    pub fn refits(self, refits: Option<&'a ExpertRefits>) -> Self {
        Self { refits, ..self }
    }

    /// The same with experts stored in this way.
    pub fn layout(self, layout: Option<ExpertLayout>) -> Self {
        Self { layout, ..self }
    }

    /// The same with other files.
    pub fn files(self, files: WriteOptions) -> Self {
        Self { files, ..self }
    }

    /// Refuses a layout that the architecture does not have, before anything is computed.
    ///
    /// # Errors
    /// [`Error::Unsupported`].
    pub fn check(&self, decoder: &Decoder<'_>) -> Result<()> {
        pruned_names(decoder, self).map(drop)
    }
}

/// Parameters and bytes of a model that a plan leaves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ExpertCost {
    /// All parameters.
    pub parameters: u64,
    /// Those that act on a token, at most: all but the experts and constants that it does not go to.
    pub active: u64,
    /// Bytes as stored.
    pub bytes: u64,
    /// Bytes of the experts alone and of the constants in the place of some, without routers and shared experts.
    pub expert_bytes: u64,
}

impl ExpertCost {
    /// Counts what writing `plan` for `decoder` would give.
    ///
    /// # Errors
    /// [`Error::PlanMismatch`] for a plan of another model, and a checkpoint without a tensor of it.
    pub fn of(decoder: &Decoder<'_>, plan: &ExpertPlan) -> Result<Self> {
        plan.check(decoder)?;
        let (dense, checkpoint) = (decoder.config(), decoder.checkpoint());
        let mut cost = Self::default();
        let of_experts = stored_names(dense);
        for name in checkpoint
            .names()
            .filter(|name| !of_experts.contains(*name))
        {
            let info = checkpoint.info(name)?;
            cost.parameters += info.elements() as u64;
            cost.active += info.elements() as u64;
            cost.bytes += info.bytes as u64;
        }
        for (layer, mixture) in plan.mixtures(decoder).into_iter().enumerate() {
            let Some(mixture) = mixture else { continue };
            let map = plan.layers[layer].as_ref().map(LayerExperts::map);
            let map = map.transpose()?.flatten();
            let constants = map.as_ref().map_or(0, ExpertMap::constants);
            // Each expert is larger than a constant.
            let active = mixture.chosen.min(mixture.experts);
            if let Some(router) = dense.names.router(layer) {
                let info = checkpoint.info(&router)?;
                let (hidden, row) = (dense.hidden as u64, (info.bytes / info.shape[0]) as u64);
                let rows = map.map_or(mixture.experts, |map| map.rows()) as u64;
                let (all, of_token) = (constants as u64, (mixture.chosen - active).min(constants));
                cost.parameters += (rows + all) * hidden;
                cost.active += (rows + of_token as u64) * hidden;
                cost.bytes += (rows + all) * row;
                cost.expert_bytes += all * row;
            }
            // Files in blocks may hold one linear in other types than the others.
            for name in LINEARS {
                let Some(part) = dense.expert_part(layer, 0, name) else {
                    continue;
                };
                let weights = (mixture.width * dense.hidden) as u64;
                let bits = checkpoint.info(&part.tensor)?.dtype.bitsize() as u64;
                let bytes = mixture.experts as u64 * weights * bits / 8;
                cost.parameters += mixture.experts as u64 * weights;
                cost.active += active as u64 * weights;
                cost.bytes += bytes;
                cost.expert_bytes += bytes;
            }
        }
        Ok(cost)
    }
}

impl ExpertPlan {
    /// How the plan has to be stored: stock modules open it when all layers keep as many experts of one width.
    pub fn loading(&self, decoder: &Decoder<'_>) -> Loading {
        let listed = decoder.checkpoint().config().get(WIDTHS_KEY).is_some();
        match self.is_uniform() && !listed {
            true => Loading::Stock,
            false => Loading::PerLayer,
        }
    }
}

/// Writes `plan` applied to `decoder` as a new checkpoint folder; a step of `progress` is a tensor.
///
/// # Errors
/// [`Error::PlanMismatch`] for a plan of another model, [`Error::Experts`] for one that keeps fewer experts than a token
/// needs, [`Error::Unsupported`] for a layout that the architecture does not have, [`Error::Cancelled`], and what reading
/// and writing report. A failed run leaves nothing under `dst`.
pub fn write(
    decoder: &Decoder<'_>,
    plan: &ExpertPlan,
    dst: impl AsRef<Path>,
    settings: &ExpertSettings<'_>,
    progress: &dyn Progress,
) -> Result<Written> {
    plan.check(decoder)?;
    let model = pruned(decoder, plan, settings)?;
    let targets = targets(decoder, plan, &model)?;
    let checkpoint = decoder.checkpoint();
    let of_experts = stored_names(decoder.config());
    let mut specs = Vec::new();
    for name in checkpoint
        .names()
        .filter(|name| !of_experts.contains(*name))
    {
        let info = checkpoint.info(name)?;
        specs.push(TensorSpec::new(name, info.dtype, info.shape.clone()));
    }
    specs.extend(targets.iter().map(|target| target.spec.clone()));
    let tensors = model.tensors().into_iter().enumerate();
    let order: HashMap<String, usize> = tensors.map(|(at, (name, _))| (name, at)).collect();
    // In the order of the data; what the config does not announce comes last.
    specs.sort_by_key(|spec| order.get(&spec.name).copied().unwrap_or(usize::MAX));
    let (config, files) = config(decoder, plan, &model)?;
    let mut writer = CheckpointWriter::create(dst, &config, specs.clone(), &settings.files)?;
    writer.carry_from(checkpoint)?;
    for (name, text) in files {
        writer.add_file(name, text.as_bytes())?;
    }
    let by_name = targets
        .iter()
        .map(|target| (target.spec.name.as_str(), target));
    let targets: HashMap<&str, &Target> = by_name.collect();
    let mut source = Source {
        decoder,
        plan,
        refits: settings.refits,
        made: None,
    };
    progress.begin("writing", specs.len() as u64);
    for spec in &specs {
        match targets.get(spec.name.as_str()) {
            None => writer.copy_tensor(&spec.name, checkpoint)?,
            Some(target) => source.write(target, &mut writer)?,
        }
        progress.advance(1)?;
    }
    Ok(writer.finish()?)
}

/// The config of the output as causal-lm reads it.
fn pruned(
    decoder: &Decoder<'_>,
    plan: &ExpertPlan,
    settings: &ExpertSettings<'_>,
) -> Result<ModelConfig> {
    let mut model = decoder.config().clone();
    model.names = pruned_names(decoder, settings)?;
    model.mixtures = plan.mixtures(decoder);
    model.expert_maps = plan.maps()?;
    Ok(model)
}

/// The names of its tensors.
fn pruned_names(decoder: &Decoder<'_>, settings: &ExpertSettings<'_>) -> Result<Names> {
    let model = decoder.config();
    match settings.layout {
        None => Ok(model.names),
        Some(layout) => model.names.with_layout(layout).ok_or(Error::Unsupported {
            method: "another layout of experts",
            model_type: model.model_type,
            reason: "it has but one",
        }),
    }
}

/// Names of all tensors of experts and routers.
fn stored_names(model: &ModelConfig) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    for (layer, mixture) in model.mixtures.iter().enumerate() {
        let Some(mixture) = mixture else { continue };
        names.extend(model.names.router(layer));
        for expert in 0..mixture.experts {
            let parts = LINEARS.map(|name| model.expert_part(layer, expert, name));
            names.extend(parts.into_iter().flatten().map(|part| part.tensor));
        }
    }
    names
}

/// A tensor of the output that is made of experts or of a router.
struct Target {
    spec: TensorSpec,
    layer: usize,
    origin: Origin,
}

enum Origin {
    /// Rows of the router of this name.
    Router(String),
    /// Constants in the place of experts.
    Novices,
    /// Linears of experts by their place in the plan, one below the other.
    Experts(Vec<(usize, LinearName)>),
}

fn targets(decoder: &Decoder<'_>, plan: &ExpertPlan, model: &ModelConfig) -> Result<Vec<Target>> {
    let (checkpoint, source) = (decoder.checkpoint(), decoder.config());
    let shapes: HashMap<String, Vec<usize>> = model.tensors().into_iter().collect();
    let spec = |name: &str, from: &str| -> Result<TensorSpec> {
        let shape = shapes.get(name).cloned().unwrap_or_default();
        Ok(TensorSpec::new(name, checkpoint.info(from)?.dtype, shape))
    };
    let mut targets: Vec<Target> = Vec::new();
    for (layer, experts) in plan.layers.iter().enumerate() {
        let Some(experts) = experts else { continue };
        let routers = source.names.router(layer).zip(model.names.router(layer));
        if let Some((from, name)) = routers {
            targets.push(Target {
                spec: spec(&name, &from)?,
                layer,
                origin: Origin::Router(from),
            });
        }
        let routers = source.names.router(layer);
        let novices = model.names.novices(layer).zip(routers);
        if let Some((name, router)) = novices.filter(|_| !experts.novices.is_empty()) {
            targets.push(Target {
                spec: spec(&name, &router)?,
                layer,
                origin: Origin::Novices,
            });
        }
        let first = targets.len();
        for at in 0..experts.kept.len() {
            for name in LINEARS {
                let (Some(part), Some(from)) = (
                    model.expert_part(layer, at, name),
                    source.expert_part(layer, experts.kept[at], name),
                ) else {
                    continue;
                };
                let of_layer = &mut targets[first..];
                let known = of_layer.iter_mut().find(|t| t.spec.name == part.tensor);
                match known {
                    Some(Target {
                        origin: Origin::Experts(parts),
                        ..
                    }) => parts.push((at, name)),
                    _ => targets.push(Target {
                        spec: spec(&part.tensor, &from.tensor)?,
                        layer,
                        origin: Origin::Experts(vec![(at, name)]),
                    }),
                }
            }
        }
    }
    Ok(targets)
}

/// Makes the tensors of the output.
struct Source<'a> {
    decoder: &'a Decoder<'a>,
    plan: &'a ExpertPlan,
    refits: Option<&'a ExpertRefits>,
    /// The last expert that was computed anew, which up to three tensors need.
    made: Option<((usize, usize), Mlp)>,
}

impl Source<'_> {
    /// One linear of an expert is in memory at a time, whether or not a tensor holds all of a layer.
    fn write(&mut self, target: &Target, writer: &mut CheckpointWriter) -> Result<()> {
        let (plan, checkpoint) = (self.plan, self.decoder.checkpoint());
        let Some(experts) = &plan.layers[target.layer] else {
            return Ok(());
        };
        let name = &target.spec.name;
        match &target.origin {
            Origin::Router(from) => {
                let info = checkpoint.info(from)?;
                let row_bytes = info.bytes / info.shape[0];
                let bytes = checkpoint.bytes(from)?;
                if experts.keeps_rows() {
                    return Ok(writer.write_bytes(name, &bytes)?);
                }
                let mut rows = Vec::with_capacity(experts.kept.len() * row_bytes);
                for (members, expert) in experts.members.iter().zip(&experts.kept) {
                    match self.router_row(from, members)? {
                        Some(row) => rows.extend(encoded(&row, &target.spec)?),
                        None => rows.extend(slice::rows(&bytes, row_bytes, &[*expert])),
                    }
                }
                Ok(writer.write_bytes(name, &rows)?)
            }
            Origin::Novices => {
                let shape = target.spec.shape.as_slice();
                let novices = Tensor::from_vec(experts.novices.concat(), shape, &Device::Cpu)?;
                Ok(writer.write_bytes(name, &encoded(&novices, &target.spec)?)?)
            }
            Origin::Experts(parts) => {
                let parts = parts.iter().map(|&(at, linear)| match experts.is_own(at) {
                    true => self.stored(target, experts.kept[at], linear),
                    false => self.computed(target, (experts, at), linear),
                });
                writer.write_parts(name, parts)
            }
        }
    }

    /// The row of the router of this name for an expert that is averaged with its members' rows.
    fn router_row(&self, router: &str, members: &[Member]) -> Result<Option<Tensor>> {
        if !members.iter().any(|member| member.row) {
            return Ok(None);
        }
        let checkpoint = self.decoder.checkpoint();
        let rows = checkpoint.tensor_as(router, DType::F32, &Device::Cpu)?;
        let width = rows.dim(1)?;
        let row = merge::router_row(&crate::tensor::values(&rows)?, width, members);
        Ok(row
            .map(|row| Tensor::from_vec(row, width, &Device::Cpu))
            .transpose()?)
    }

    /// A linear of an expert that the plan changes.
    fn computed(
        &mut self,
        target: &Target,
        (experts, at): (&LayerExperts, usize),
        name: LinearName,
    ) -> Result<Vec<u8>> {
        let key = (target.layer, at);
        let mlp = match self.made.take() {
            Some((of, mlp)) if of == key => mlp,
            _ => experts.expert(self.decoder, target.layer, at, self.refits)?,
        };
        let linear: Option<&Linear> = match name {
            LinearName::Gate => mlp.gate.as_ref(),
            LinearName::Up => Some(&mlp.up),
            _ => Some(&mlp.down),
        };
        let bytes = match linear {
            Some(linear) => encoded(&linear.weight()?, &target.spec),
            None => Ok(vec![]),
        };
        self.made = Some((key, mlp));
        bytes
    }

    /// Bytes of an expert's linear as they are; calibration has not read those of an expert that no token chose.
    fn stored(&self, target: &Target, expert: usize, name: LinearName) -> Result<Vec<u8>> {
        let Some(part) = self
            .decoder
            .config()
            .expert_part(target.layer, expert, name)
        else {
            return Ok(vec![]);
        };
        let checkpoint = self.decoder.checkpoint();
        let info = checkpoint.info(&part.tensor)?;
        let bytes = match info.dtype == target.spec.dtype {
            true => checkpoint
                .finite_rows(&part.tensor, part.rows)?
                .into_owned(),
            // Experts of one tensor have one dtype.
            false => {
                let weight =
                    checkpoint.rows_as(&part.tensor, part.rows, DType::F32, &Device::Cpu)?;
                encoded(&weight, &target.spec)?
            }
        };
        self.decoder.release_expert(target.layer, expert);
        Ok(bytes)
    }
}

/// Values in the dtype of the file, rounded to nearest even.
fn encoded(weight: &Tensor, spec: &TensorSpec) -> Result<Vec<u8>> {
    let values = crate::tensor::values(weight)?;
    Ok(match spec.dtype {
        tensor_io::Dtype::F16 => {
            let halves = values.iter().map(|&x| f16::from_f32(x));
            halves.flat_map(f16::to_le_bytes).collect()
        }
        tensor_io::Dtype::BF16 => {
            let halves = values.iter().map(|&x| bf16::from_f32(x));
            halves.flat_map(bf16::to_le_bytes).collect()
        }
        tensor_io::Dtype::F64 => {
            let doubles = values.iter().map(|&x| f64::from(x));
            doubles.flat_map(f64::to_le_bytes).collect()
        }
        _ => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
    })
}

/// The config of the output, and the files that it needs beside it.
fn config(
    decoder: &Decoder<'_>,
    plan: &ExpertPlan,
    pruned: &ModelConfig,
) -> Result<(Config, Vec<(&'static str, String)>)> {
    let mut config = decoder.config_to_write()?;
    if plan.is_identity() {
        return Ok((config, vec![]));
    }
    let model = decoder.config();
    if let Some(chosen) = plan.chosen {
        config.set("num_experts_per_tok", chosen);
    }
    if plan.loading(decoder) == Loading::PerLayer {
        let lists = PerLayer {
            widths: &model.widths,
            mixtures: &pruned.mixtures,
            expert_maps: &pruned.expert_maps,
            biases: (model.biases.o, model.biases.mlp),
        };
        let loader = lists.set(&mut config, model)?;
        return Ok((config, vec![loader]));
    }
    let Some(mixture) = pruned.mixtures.iter().flatten().next() else {
        return Ok((config, vec![]));
    };
    // Every name that a reader may look for.
    for field in ["num_local_experts", "num_experts"] {
        if config.get(field).is_some() || model.stock.experts.contains(&field) {
            config.set(field, mixture.experts);
        }
    }
    config.set(model.stock.expert_width, mixture.width);
    Ok((config, vec![]))
}
