//! LoRA adapters as GGUF files, which llama.cpp applies to a quantised base.
//!
//! A linear gets `NAME.weight.lora_a` (A, `r × n`) and `NAME.weight.lora_b` (B, `m × r`), with NAME as in the base.
//! llama.cpp scales B A by alpha / r where the file has an alpha; it is left out, so that every linear can have its own
//! rank and B A applies as it is. Where the architecture rotates neighbouring channels, the rows of B of q and k are
//! reordered as those of the weights.

use super::adapter::Adapter;
use super::gguf_model::{architecture_for, architecture_of, provenance, tensors_of};
use crate::repair::{LayerId, Repaired, linears};
use crate::solve::LowRank;
use crate::{Error, Result};
use causal_lm::Decoder;
use causal_lm::gguf::layout::{FileTensor, Part, Rows, holders};
use causal_lm::gguf::{Architecture, Order};
use faer::MatRef;
use packed::BlockType;
use serde_json::Value as Json;
use std::path::Path;
use tensor_io::gguf::{BlockLayout, Gguf, TensorSpec, Value, Writer};

const A: &str = ".weight.lora_a";
const B: &str = ".weight.lora_b";

/// How an adapter is written as GGUF.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct GgufAdapterOptions {
    /// Architecture of the base, which llama.cpp compares.
    pub architecture: Architecture,
    /// Stored type: f16, bf16 or f32.
    pub dtype: BlockType,
}

impl GgufAdapterOptions {
    /// For a GGUF export of this decoder, or the GGUF file that it runs from; f16.
    pub fn new(decoder: &Decoder<'_>) -> Self {
        Self {
            architecture: architecture_for(decoder).unwrap_or(Architecture::Llama),
            dtype: BlockType::F16,
        }
    }

    /// For this GGUF file of the base; f16.
    ///
    /// # Errors
    /// A file without an architecture, or with one that is not supported.
    pub fn of_base(base: &Gguf) -> Result<Self> {
        Ok(Self {
            architecture: architecture_of(base)?,
            dtype: BlockType::F16,
        })
    }

    /// Architecture of the base.
    pub fn with_architecture(self, architecture: Architecture) -> Self {
        Self {
            architecture,
            ..self
        }
    }

    /// Stored type: f16, bf16 or f32.
    pub fn with_dtype(self, dtype: BlockType) -> Self {
        Self { dtype, ..self }
    }
}

/// Name of the weight in files, and its rows there where they are in another order; `None` for one that is not one tensor.
fn base_of(tensors: &[FileTensor], layer: LayerId) -> Option<(String, Option<Order>)> {
    let weight = layer.weight();
    let mut holders = holders(tensors, &weight);
    let (tensor, None) = (holders.next()?, holders.next()) else {
        return None;
    };
    let [Part { rows, .. }] = &tensor.parts[..] else {
        return None;
    };
    let order = match rows {
        Rows::All => None,
        Rows::Order(order) => Some(*order),
        Rows::Range(_) => return None,
    };
    let name = tensor.name.strip_suffix(".weight")?;
    (tensor.factor == 1.0).then(|| (name.into(), order))
}

/// Row-major f32 values, rows in the given order.
fn values(matrix: MatRef<'_, f64>, order: Option<Order>) -> Vec<f32> {
    let rows = 0..matrix.nrows();
    rows.map(|row| order.map_or(row, |order| order.in_checkpoint(row)))
        .flat_map(|row| (0..matrix.ncols()).map(move |col| matrix[(row, col)] as f32))
        .collect()
}

impl Adapter {
    /// Whether factors of this decoder can be written as GGUF.
    ///
    /// # Errors
    /// [`Error::Setting`] for a type of model that is not mapped, [`Error::NotStorable`] for a linear that files do not have
    /// as one tensor.
    pub fn check_gguf(decoder: &Decoder<'_>) -> Result<()> {
        let model_type = decoder.config().model_type;
        let Some(architecture) = architecture_for(decoder) else {
            return Err(Error::Setting {
                name: "model of a GGUF adapter",
                value: model_type.into(),
                expected: "a type of model that GGUF files have",
            });
        };
        let tensors = tensors_of(decoder, architecture);
        match linears(decoder)
            .into_iter()
            .find(|(layer, _)| base_of(&tensors, *layer).is_none())
        {
            None => Ok(()),
            Some((layer, _)) => Err(not_one_tensor(layer)),
        }
    }

    /// Writes the factors of a repair as a GGUF file for llama.cpp, for the base that `options` name.
    ///
    /// # Errors
    /// [`Error::Setting`] for another type of values or a repair without factors, values beyond the type's range, and
    /// what writing reports.
    pub fn write_gguf(
        repaired: &Repaired,
        decoder: &Decoder<'_>,
        options: &GgufAdapterOptions,
        dst: impl AsRef<Path>,
    ) -> Result<()> {
        let GgufAdapterOptions {
            architecture,
            dtype,
        } = *options;
        Self::check_gguf(decoder)?;
        let layout = BlockLayout::named(dtype.name()).filter(|_| !dtype.is_quantised());
        let Some(layout) = layout else {
            return Err(Error::Setting {
                name: "type of an adapter",
                value: dtype.name().into(),
                expected: "f16, bf16 or f32",
            });
        };
        let repairs = || repaired.reports().filter(|report| report.rank > 0);
        if repairs().next().is_none() {
            return Err(Error::Setting {
                name: "rank of the adapter",
                value: "0".into(),
                expected: "a repair with factors",
            });
        }
        let tensors = tensors_of(decoder, architecture);
        let base = |layer| base_of(&tensors, layer).ok_or_else(|| not_one_tensor(layer));
        let mut specs = Vec::new();
        for report in repairs() {
            let (name, _) = base(report.layer)?;
            let (rank, inputs, outputs) = (report.rank, report.inputs, report.outputs);
            specs.push(TensorSpec::new(
                format!("{name}{A}"),
                layout,
                [rank, inputs],
            ));
            specs.push(TensorSpec::new(
                format!("{name}{B}"),
                layout,
                [outputs, rank],
            ));
        }
        let metadata = [
            ("general.type", "adapter"),
            ("general.architecture", architecture.name()),
            ("adapter.type", "lora"),
        ]
        .map(|(key, value)| (key.to_string(), Value::from(value)));
        let mut metadata = Vec::from(metadata);
        let fact = |key: &str| repaired.facts().get(key).and_then(Json::as_str);
        let method = fact("method").map(|method| ("method", method.to_string()));
        let more: Vec<_> = method.into_iter().collect();
        metadata.extend(provenance(repaired, repaired.compressor(), &more));
        let mut writer = Writer::create(dst.as_ref(), &metadata, &specs)?;
        for block in 0..repaired.blocks() {
            for layer in repaired.block(block)? {
                let (id, Some(LowRank { a, b })) = (layer.report.layer, &layer.factors) else {
                    continue;
                };
                let (name, order) = base(id)?;
                let a_values = values(a.as_ref(), None);
                let b_values = values(b.as_ref(), order);
                for (suffix, values, cols) in [(A, a_values, a.ncols()), (B, b_values, b.ncols())] {
                    let stored = packed::quantise(dtype, &values, cols, None)?;
                    writer.write(&format!("{name}{suffix}"), stored.bytes())?;
                }
            }
        }
        writer.finish()?;
        Ok(())
    }
}

fn not_one_tensor(layer: LayerId) -> Error {
    Error::NotStorable {
        module: layer.to_string(),
        format: "lora-gguf",
        reason: "files of this architecture do not have it as one tensor".into(),
    }
}
