//! Writing a mixture while its experts are compressed.

use super::LINEARS;
use crate::{Error, Result};
use candle_core::Tensor;
use causal_lm::names::ExpertLayout;
use causal_lm::{Decoder, LinearName, ModelConfig};
use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::Path;
use tensor_io::{CheckpointWriter, TensorSpec, WriteOptions, Written};

/// Writes each tensor as soon as all its parts are there: at once where every expert has its own, at the end of a layer
/// where one tensor holds all.
pub(super) struct Writer<'a> {
    decoder: &'a Decoder<'a>,
    /// The model as it is written: its experts may be stored in another way.
    target: ModelConfig,
    /// Tensors of experts as they are written.
    specs: BTreeMap<String, TensorSpec>,
    writer: CheckpointWriter,
    /// Parts of tensors by their names, in the order of their rows.
    parts: BTreeMap<String, Vec<Tensor>>,
}

/// The model as it is written with experts stored in this way, or as they were.
///
/// # Errors
/// [`Error::Setting`] for a layout that the architecture does not have.
pub(super) fn target(decoder: &Decoder<'_>, layout: Option<ExpertLayout>) -> Result<ModelConfig> {
    let mut target = decoder.config().clone();
    if let Some(layout) = layout {
        let names = target.names.with_layout(layout);
        target.names = names.ok_or_else(|| Error::Setting {
            name: "layout of experts",
            value: format!("{layout:?}").to_lowercase(),
            expected: "the one that the architecture has",
        })?;
    }
    Ok(target)
}

impl<'a> Writer<'a> {
    /// Begins a checkpoint with everything but the experts in it.
    pub(super) fn create(
        decoder: &'a Decoder<'a>,
        dst: &Path,
        layout: Option<ExpertLayout>,
        files: &WriteOptions,
    ) -> Result<Self> {
        let (checkpoint, source) = (decoder.checkpoint(), decoder.config());
        let target = target(decoder, layout)?;
        let experts = expert_specs(decoder, &target)?;
        let of_experts = expert_tensors(source);
        let others = || {
            checkpoint
                .names()
                .filter(|name| !of_experts.contains(*name))
        };
        // Routers have other names in some layouts.
        let routers = (0..source.layers()).filter_map(|layer| {
            let renamed = target.names.router(layer)?;
            Some((source.names.router(layer)?, renamed))
        });
        let routers: HashMap<String, String> = routers.collect();
        let renamed = |name: &str| routers.get(name).map_or(name, String::as_str).to_owned();
        let mut specs = Vec::new();
        for name in others() {
            let info = checkpoint.info(name)?;
            let spec = TensorSpec::new(renamed(name), info.dtype, info.shape.clone());
            specs.push(spec);
        }
        specs.extend(experts.iter().cloned());
        // In the order of the data; what the config does not announce comes last.
        let tensors = target.tensors().into_iter().enumerate();
        let order: HashMap<String, usize> = tensors.map(|(at, (name, _))| (name, at)).collect();
        specs.sort_by_key(|spec| order.get(&spec.name).copied().unwrap_or(usize::MAX));
        let config = decoder.config_to_write()?;
        let mut writer = CheckpointWriter::create(dst, &config, specs, files)?;
        writer.carry_from(checkpoint)?;
        for name in others() {
            writer.write_bytes(&renamed(name), &checkpoint.bytes(name)?)?;
            checkpoint.release([name]);
        }
        let specs = experts.into_iter().map(|spec| (spec.name.clone(), spec));
        Ok(Self {
            decoder,
            target,
            specs: specs.collect(),
            writer,
            parts: BTreeMap::new(),
        })
    }

    /// Bytes of all experts in the source.
    pub(super) fn expert_bytes(&self) -> u64 {
        let checkpoint = self.decoder.checkpoint();
        let names = expert_tensors(self.decoder.config());
        let infos = names.iter().filter_map(|name| checkpoint.info(name).ok());
        infos.map(|info| info.bytes as u64).sum()
    }

    /// Takes a weight of an expert; experts come in ascending order, the linears of each in theirs.
    pub(super) fn add(
        &mut self,
        (layer, expert): (usize, usize),
        name: LinearName,
        weight: &Tensor,
    ) -> Result<()> {
        let Some(part) = self.target.expert_part(layer, expert, name) else {
            return Ok(());
        };
        let Some(spec) = self.specs.get(&part.tensor) else {
            return Ok(());
        };
        let values: usize = spec.shape.iter().product();
        if values / part.columns.max(1) == part.rows.len() {
            let weight = weight.reshape(spec.shape.as_slice())?;
            return Ok(self.writer.write_tensor(&part.tensor, &weight)?);
        }
        // In the dtype of the file, which is that of its first linear: all experts of a layer wait here.
        let first = self.parts.get(&part.tensor).and_then(|parts| parts.first());
        let dtype = match first {
            Some(first) => Some(first.dtype()),
            None => {
                let source = self.decoder.config().expert_part(layer, expert, name);
                let info = source.map(|part| self.decoder.checkpoint().info(&part.tensor));
                info.transpose()?.and_then(|info| info.candle_dtype())
            }
        };
        let weight = match dtype {
            Some(dtype) => weight.to_dtype(dtype)?,
            None => weight.clone(),
        };
        self.parts.entry(part.tensor).or_default().push(weight);
        Ok(())
    }

    /// Writes the tensors that hold all experts of a layer.
    pub(super) fn end_layer(&mut self) -> Result<()> {
        for (name, parts) in std::mem::take(&mut self.parts) {
            let Some(spec) = self.specs.get(&name) else {
                continue;
            };
            let tensor = Tensor::cat(&parts, 0)?.reshape(spec.shape.as_slice())?;
            self.writer.write_tensor(&name, &tensor)?;
        }
        Ok(())
    }

    pub(super) fn finish(self) -> Result<Written> {
        Ok(self.writer.finish()?)
    }
}

/// Tensors of experts as they are written; what a tensor holds has the dtype of its first linear.
fn expert_specs(decoder: &Decoder<'_>, target: &ModelConfig) -> Result<Vec<TensorSpec>> {
    let shapes: HashMap<String, Vec<usize>> = target.tensors().into_iter().collect();
    let mut specs: BTreeMap<String, TensorSpec> = BTreeMap::new();
    for (layer, mixture) in target.mixtures.iter().enumerate() {
        let experts = mixture.map_or(0, |mixture| mixture.experts);
        for (expert, name) in (0..experts).flat_map(|expert| LINEARS.map(|name| (expert, name))) {
            let source = decoder.config().expert_part(layer, expert, name);
            let Some((part, from)) = target.expert_part(layer, expert, name).zip(source) else {
                continue;
            };
            if let Entry::Vacant(entry) = specs.entry(part.tensor) {
                let dtype = decoder.checkpoint().info(&from.tensor)?.dtype;
                let shape = shapes.get(entry.key()).cloned().unwrap_or_default();
                let spec = TensorSpec::new(entry.key(), dtype, shape);
                entry.insert(spec);
            }
        }
    }
    Ok(specs.into_values().collect())
}

/// Names of all tensors that hold weights of experts.
fn expert_tensors(config: &ModelConfig) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    for (layer, mixture) in config.mixtures.iter().enumerate() {
        let experts = mixture.map_or(0, |mixture| mixture.experts);
        for expert in 0..experts {
            let parts = LINEARS.map(|name| config.expert_part(layer, expert, name));
            names.extend(parts.into_iter().flatten().map(|part| part.tensor));
        }
    }
    names
}
