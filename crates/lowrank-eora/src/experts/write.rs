//! Writing a mixture while its experts are compressed.

use super::LINEARS;
use crate::Result;
use candle_core::Tensor;
use causal_lm::{Decoder, LinearName};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use tensor_io::{CheckpointWriter, TensorSpec, WriteOptions, Written};

/// Writes each tensor as soon as all its parts are there: at once where every expert has its own, at the end of a layer
/// where one tensor holds all.
pub(super) struct Writer<'a> {
    decoder: &'a Decoder<'a>,
    writer: CheckpointWriter,
    /// Parts of tensors by their names, in the order of their rows.
    parts: BTreeMap<String, Vec<Tensor>>,
}

impl<'a> Writer<'a> {
    /// Begins a checkpoint with everything but the experts in it.
    pub(super) fn create(
        decoder: &'a Decoder<'a>,
        dst: &Path,
        files: &WriteOptions,
    ) -> Result<Self> {
        let checkpoint = decoder.checkpoint();
        let mut specs = Vec::new();
        for name in checkpoint.names() {
            let info = checkpoint.info(name)?;
            specs.push(TensorSpec::new(name, info.dtype, info.shape.clone()));
        }
        let of_experts = expert_tensors(decoder);
        let config = decoder.config_to_write();
        let mut writer = CheckpointWriter::create(dst, &config, specs, files)?;
        writer.carry_from(checkpoint)?;
        for name in checkpoint
            .names()
            .filter(|name| !of_experts.contains(*name))
        {
            writer.copy_tensor(name, checkpoint)?;
        }
        Ok(Self {
            decoder,
            writer,
            parts: BTreeMap::new(),
        })
    }

    /// Bytes of all experts in the source.
    pub(super) fn expert_bytes(&self) -> u64 {
        let checkpoint = self.decoder.checkpoint();
        let names = expert_tensors(self.decoder);
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
        let Some(part) = self.decoder.config().expert_part(layer, expert, name) else {
            return Ok(());
        };
        let rows = self.decoder.checkpoint().info(&part.tensor)?.elements() / part.columns;
        if rows == part.rows.len() {
            return Ok(self.writer.write_tensor(&part.tensor, weight)?);
        }
        // In the dtype of the file: all experts of a layer wait here.
        let info = self.decoder.checkpoint().info(&part.tensor)?;
        let weight = match info.candle_dtype() {
            Some(dtype) => weight.to_dtype(dtype)?,
            None => weight.clone(),
        };
        self.parts.entry(part.tensor).or_default().push(weight);
        Ok(())
    }

    /// Writes the tensors that hold all experts of a layer.
    pub(super) fn end_layer(&mut self) -> Result<()> {
        for (name, parts) in std::mem::take(&mut self.parts) {
            let shape = self.decoder.checkpoint().info(&name)?.shape.clone();
            let tensor = Tensor::cat(&parts, 0)?.reshape(shape)?;
            self.writer.write_tensor(&name, &tensor)?;
        }
        Ok(())
    }

    pub(super) fn finish(self) -> Result<Written> {
        Ok(self.writer.finish()?)
    }
}

/// Names of all tensors that hold weights of experts.
fn expert_tensors(decoder: &Decoder<'_>) -> BTreeSet<String> {
    let config = decoder.config();
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
