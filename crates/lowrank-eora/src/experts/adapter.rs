//! Corrections of experts as a PEFT adapter.
//!
//! In memory transformers has the experts of a layer in two tensors, `gate_up_proj` `[experts, 2 · width, hidden]` and
//! `down_proj` `[experts, hidden, width]`, and PEFT from 0.19 on adapts them as parameters (`target_parameters`). With E
//! experts of one rank R a tensor has `lora_A` `[E · R, in]`, whose row e · R + ρ is row ρ of expert e, and `lora_B`
//! `[out, R · E]`, whose column ρ · E + e is column ρ of expert e. Gate and up have factors of their own: R is twice their
//! rank, with zeros in B where a factor of the one meets rows of the other.

use super::LINEARS;
use crate::output::peft::{PREFIX, Peft};
use crate::solve::LowRank;
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use causal_lm::{Decoder, LinearName};
use serde_json::{Map, json};
use std::path::{Path, PathBuf};
use tensor_io::PendingFolder;

/// The adapter of a mixture while it grows.
pub(super) struct ExpertAdapter {
    dst: PathBuf,
    overwrite: bool,
    rank: usize,
    experts: usize,
    /// Factors of the experts of the layer at hand, in their order.
    layer: Vec<[Option<LowRank>; 3]>,
    tensors: Vec<(String, Tensor)>,
}

impl ExpertAdapter {
    /// The number of experts of every layer of a model that such an adapter fits.
    ///
    /// # Errors
    /// [`Error::Setting`] for a rank of 0, an architecture whose experts PEFT does not adapt in this form, and numbers of
    /// experts that differ by layer; causal-lm's error for router rows that share experts.
    pub(super) fn check(decoder: &Decoder<'_>, rank: usize) -> Result<usize> {
        let refuse = |value: String, expected: &'static str| Error::Setting {
            name: "PEFT adapter of experts",
            value,
            expected,
        };
        if rank == 0 {
            return Err(refuse("rank 0".into(), "a correction of some rank"));
        }
        let config = decoder.config();
        config.refuse_expert_map("a PEFT adapter of experts")?;
        if !matches!(
            config.model_type,
            "mixtral" | "qwen2_moe" | "qwen3_moe" | "olmoe"
        ) {
            return Err(refuse(
                config.model_type.into(),
                "mixtral, qwen2_moe, qwen3_moe or olmoe; write merged weights",
            ));
        }
        let mut counts = config
            .mixtures
            .iter()
            .flatten()
            .map(|m| (m.experts, m.width));
        let Some(first) = counts.next() else {
            return Err(refuse(config.model_type.into(), "a mixture of experts"));
        };
        if counts.any(|other| other != first) {
            return Err(refuse(
                "experts that differ by layer".into(),
                "a model that stock transformers opens; write merged weights",
            ));
        }
        Ok(first.0)
    }

    /// # Errors
    /// As [`ExpertAdapter::check`].
    pub(super) fn new(
        decoder: &Decoder<'_>,
        dst: &Path,
        rank: usize,
        overwrite: bool,
    ) -> Result<Self> {
        Ok(Self {
            dst: dst.to_path_buf(),
            overwrite,
            rank,
            experts: Self::check(decoder, rank)?,
            layer: vec![],
            tensors: vec![],
        })
    }

    /// Takes the factors of a linear; experts come in ascending order, the linears of each in theirs.
    pub(super) fn add(&mut self, name: LinearName, factors: LowRank) {
        let at = LINEARS.iter().position(|&linear| linear == name);
        if at == Some(0) || self.layer.is_empty() {
            self.layer.push([None, None, None]);
        }
        if let (Some(at), Some(expert)) = (at, self.layer.last_mut()) {
            expert[at] = Some(factors);
        }
    }

    /// Puts the experts of a layer together.
    pub(super) fn end_layer(&mut self, layer: usize) -> Result<()> {
        let experts = std::mem::take(&mut self.layer);
        let factors = |expert: usize, at: usize| experts.get(expert)?.get(at)?.as_ref();
        let (rank, count) = (self.rank, self.experts);
        for (path, linears) in [("experts.base_layer", &[0, 1][..]), ("experts", &[2])] {
            let Some(first) = factors(0, linears[0]) else {
                continue;
            };
            let (inputs, rows) = (first.a.ncols(), first.b.nrows());
            let (ranks, outputs) = (rank * linears.len(), rows * linears.len());
            let mut a = vec![0f32; count * ranks * inputs];
            let mut b = vec![0f32; outputs * ranks * count];
            for expert in 0..count {
                for (nth, &at) in linears.iter().enumerate() {
                    let Some(LowRank { a: ours, b: theirs }) = factors(expert, at) else {
                        continue;
                    };
                    for r in 0..ours.nrows() {
                        let rho = nth * rank + r;
                        for column in 0..inputs {
                            let row = expert * ranks + rho;
                            a[row * inputs + column] = ours[(r, column)] as f32;
                        }
                        for row in 0..rows {
                            let (row, column) = (nth * rows + row, rho * count + expert);
                            b[row * ranks * count + column] = theirs[(row - nth * rows, r)] as f32;
                        }
                    }
                }
            }
            let prefix = format!("{PREFIX}model.layers.{layer}.mlp.{path}");
            let tensor = |values, shape: (usize, usize)| -> Result<Tensor> {
                let tensor = Tensor::from_vec(values, shape, &Device::Cpu)?;
                Ok(tensor.to_dtype(DType::F16)?)
            };
            let a = tensor(a, (count * ranks, inputs))?;
            let b = tensor(b, (outputs, ranks * count))?;
            self.tensors.push((format!("{prefix}.lora_A.weight"), a));
            self.tensors.push((format!("{prefix}.lora_B.weight"), b));
        }
        Ok(())
    }

    /// Writes the folder but for its name, for the base model at this path.
    pub(super) fn pending(self, base: &Path) -> Result<PendingFolder> {
        let ranks = Map::from_iter([(
            ".*\\.experts\\.gate_up_proj".to_owned(),
            json!(2 * self.rank),
        )]);
        let base = std::path::absolute(base).unwrap_or_else(|_| base.to_path_buf());
        let peft = Peft {
            base: &base.display().to_string(),
            rank: self.rank,
            ranks,
            modules: Vec::new(),
            parameters: &["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
            rslora: false,
        };
        peft.pending(&self.dst, self.overwrite, &self.tensors)
    }
}
