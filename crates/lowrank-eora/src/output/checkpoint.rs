//! Whole checkpoints: compressed, merged, or merged by requantisation; dense or packed.

use super::mixed;
use super::options::{CheckpointOptions, Layout, Weights};
use crate::compress::{Compressor, Quantise, Quantised, Symmetry};
use crate::format::{compressed_tensors, gptq};
use crate::matrix::to_tensor;
use crate::repair::{LayerId, Repaired, RepairedLayer, StoredWeight, linears};
use crate::{Error, Result};
use candle_core::{DType, Device};
use causal_lm::Decoder;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use tensor_io::{CheckpointWriter, Progress, TensorSpec, Written};

/// Writes a checkpoint folder; everything but the repaired linears is the dense model's, and in floats the matrices of
/// [`Repaired::others`]. `progress` counts blocks.
///
/// # Errors
/// [`Error::NotStorable`] where the layout cannot hold the weights, [`Error::Setting`] where the
/// repair did not requantise, and what reading and writing report. A failed run leaves nothing.
pub fn write_checkpoint(
    decoder: &Decoder<'_>,
    repaired: &Repaired,
    dst: impl AsRef<Path>,
    options: &CheckpointOptions,
    progress: &dyn Progress,
) -> Result<Written> {
    let (weights, layout) = (options.weights, options.layout);
    let checkpoint = decoder.checkpoint();
    let linears: BTreeSet<LayerId> = repaired.reports().map(|report| report.layer).collect();
    if weights == Weights::Requantised
        && repaired
            .reports()
            .any(|report| report.requantised.is_none())
    {
        return Err(Error::Setting {
            name: "weights",
            value: "requantised".into(),
            expected: "a repair that merged by requantisation",
        });
    }
    let layer_of = |name: &str| {
        let layer = name.strip_suffix(".weight").and_then(LayerId::parse);
        layer.filter(|layer| linears.contains(layer))
    };
    if let (Layout::Gptq { version }, Weights::Compressed, true) =
        (layout, weights, repaired.is_assembled())
    {
        return mixed::write(
            decoder,
            repaired,
            (dst.as_ref(), version),
            options,
            progress,
        );
    }
    let mut compressor = match layout {
        Layout::Dense { .. } => None,
        Layout::Gptq { .. } | Layout::CompressedTensors => Some(packer(repaired, weights, layout)?),
    };
    // The file says what was done, not what was asked for.
    let damping = match weights {
        Weights::Requantised => repaired.requantised_damping(),
        Weights::Compressed | Weights::Merged => repaired.damping(),
    };
    if let (Some(compressor), Some(damping)) = (&mut compressor, damping) {
        compressor.sweep.damping = damping.largest;
    }

    let others = match layout {
        Layout::Dense { .. } => by_weight(repaired)?,
        Layout::Gptq { .. } | Layout::CompressedTensors => BTreeMap::new(),
    };
    // A copy of the embedding is no head any more when the embedding changes.
    let names = decoder.config().names;
    let has_copy = decoder.config().tied && others.contains_key(&names.embedding());
    let stays = |name: &&str| !(has_copy && *name == names.head());

    let mut config = decoder.config_to_write()?;
    let mut specs = Vec::new();
    for name in checkpoint.names().filter(stays) {
        let info = checkpoint.info(name)?;
        match (layer_of(name), layout, &compressor) {
            (Some(layer), Layout::Gptq { .. } | Layout::CompressedTensors, Some(compressor)) => {
                let &[m, n] = info.shape.as_slice() else {
                    continue;
                };
                let Some(quantise) = compressor.quantise else {
                    continue;
                };
                let module = layer.to_string();
                let grid = quantise.grid;
                specs.extend(match layout {
                    Layout::Gptq { .. } => gptq::specs(&module, (m, n), grid.bits, grid.group)?,
                    _ => compressed_tensors::specs(&module, (m, n), &quantise)?,
                });
            }
            (_, Layout::Dense { dtype: Some(dtype) }, _) => {
                specs.push(TensorSpec::new(name, dtype, info.shape.clone()));
            }
            _ => specs.push(TensorSpec::new(name, info.dtype, info.shape.clone())),
        }
    }
    match (layout, &compressor) {
        (Layout::Dense { dtype: Some(dtype) }, _) => {
            let name = match dtype {
                DType::F16 => "float16",
                DType::BF16 => "bfloat16",
                DType::F64 => "float64",
                _ => "float32",
            };
            let field = if config.get("dtype").is_some() {
                "dtype"
            } else {
                "torch_dtype"
            };
            config.set(field, name);
        }
        (Layout::Gptq { version }, Some(compressor)) => {
            if let Some(section) = gptq::quantization_config(compressor, version) {
                config.set("quantization_config", section);
            }
        }
        (Layout::CompressedTensors, Some(compressor)) => {
            if let Some(section) = compressed_tensors::quantization_config(compressor) {
                config.set("quantization_config", section);
            }
        }
        _ => {}
    }

    let mut writer = CheckpointWriter::create(dst, &config, specs, &options.write)?;
    progress.begin("write checkpoint", repaired.blocks() as u64);
    writer.carry_from(checkpoint)?;
    let copied = checkpoint.names().filter(stays);
    for name in copied.filter(|name| layer_of(name).is_none()) {
        if let Some(weight) = others.get(name) {
            writer.write_tensor(name, &weight.floats()?)?;
            continue;
        }
        match layout {
            Layout::Dense { dtype: Some(_) } => {
                // Through f64, which holds every float exactly.
                let tensor = checkpoint.tensor_as(name, DType::F64, &Device::Cpu)?;
                writer.write_tensor(name, &tensor)?;
                checkpoint.release([name]);
            }
            _ => writer.copy_tensor(name, checkpoint)?,
        }
    }
    for block in 0..repaired.blocks() {
        for layer in repaired.block(block)? {
            let id = layer.report.layer;
            match layout {
                Layout::Dense { .. } => {
                    let matrix = match weights {
                        Weights::Compressed => layer.weight.matrix()?,
                        Weights::Merged => layer.merged()?,
                        Weights::Requantised => requantised(&layer, layout.name())?.matrix()?,
                    };
                    let tensor = to_tensor(matrix.as_ref(), DType::F64, &Device::Cpu)?;
                    writer.write_tensor(&id.weight(), &tensor)?;
                }
                Layout::Gptq { version } => {
                    let packed = quantised(&layer, weights, layout)?;
                    for (spec, bytes) in gptq::tensors(&id.to_string(), packed, version)? {
                        writer.write_bytes(&spec.name, &bytes)?;
                    }
                }
                Layout::CompressedTensors => {
                    let packed = quantised(&layer, weights, layout)?;
                    let Some(quantise) = compressor.and_then(|compressor| compressor.quantise)
                    else {
                        continue;
                    };
                    let module = id.to_string();
                    for (spec, bytes) in compressed_tensors::tensors(&module, packed, &quantise)? {
                        writer.write_bytes(&spec.name, &bytes)?;
                    }
                }
            }
        }
        progress.advance(1)?;
    }
    Ok(writer.finish()?)
}

/// The matrices beside the linears by the names of their weights.
fn by_weight(repaired: &Repaired) -> Result<BTreeMap<String, StoredWeight>> {
    let mut named = BTreeMap::new();
    for other in repaired.others() {
        let (module, weight) = other?;
        named.insert(format!("{module}.weight"), weight);
    }
    Ok(named)
}

/// Whether all linears of a model can be stored in a layout after this compressor, as far as shapes and grid tell.
///
/// # Errors
/// [`Error::NotStorable`] with the linear and the reason; for GPTQ version 1 also for asymmetric grids, whose zero points
/// may be 0, which that version does not store.
pub fn check_layout(decoder: &Decoder<'_>, compressor: &Compressor, layout: Layout) -> Result<()> {
    if let Layout::Dense { .. } = layout {
        return Ok(());
    }
    let quantise = groups_of(compressor, layout)?;
    let grid = quantise.grid;
    let v1 = gptq::Version::V1;
    if layout == (Layout::Gptq { version: v1 }) && grid.symmetry == Symmetry::Asymmetric {
        return Err(not_storable(
            layout,
            "the model",
            "asymmetric grids may have zero points of 0, which version 1 does not hold; store gptq-v2, or quantise \
             with `-sym`",
        ));
    }
    for (id, [m, n]) in linears(decoder) {
        let module = id.to_string();
        match layout {
            Layout::Gptq { .. } => gptq::specs(&module, (m, n), grid.bits, grid.group)?,
            _ => compressed_tensors::specs(&module, (m, n), &quantise)?,
        };
    }
    Ok(())
}

/// The quantisation in groups that a packed layout stores.
fn groups_of(compressor: &Compressor, layout: Layout) -> Result<Quantise> {
    let reason = match compressor.quantise {
        Some(quantise) if quantise.grid.symmetry != Symmetry::Offset => return Ok(quantise),
        Some(_) => format!("{compressor} has float offsets, which only GGUF stores"),
        None => {
            format!("{compressor} does not quantise in groups; write it as floats, or as GGUF")
        }
    };
    Err(not_storable(layout, "the model", &reason))
}

fn not_storable(layout: Layout, module: impl ToString, reason: &str) -> Error {
    Error::NotStorable {
        module: module.to_string(),
        format: layout.name(),
        reason: reason.into(),
    }
}

/// The compressor that quantised the weights.
fn packer(repaired: &Repaired, weights: Weights, layout: Layout) -> Result<Compressor> {
    let compressor = match weights {
        Weights::Compressed => repaired.compressor(),
        Weights::Requantised => repaired.requantiser(),
        Weights::Merged => None,
    };
    match (compressor, weights) {
        (Some(compressor), _) => groups_of(&compressor, layout).map(|_| compressor),
        (None, Weights::Merged) => Err(not_storable(
            layout,
            "the model",
            "W_c + B A has no codes; requantise it, or write it dense",
        )),
        (None, _) => Err(not_storable(
            layout,
            "the model",
            "the compressed weights were given, and are stored already",
        )),
    }
}

/// W_c' of a merge by requantisation.
pub(super) fn requantised<'a>(
    layer: &'a RepairedLayer,
    format: &'static str,
) -> Result<&'a StoredWeight> {
    let weight = layer.requantised.as_ref();
    weight.ok_or_else(|| Error::NotStorable {
        module: layer.report.layer.to_string(),
        format,
        reason: "it was not requantised".into(),
    })
}

fn quantised(layer: &RepairedLayer, weights: Weights, layout: Layout) -> Result<&Quantised> {
    let stored = match weights {
        Weights::Requantised => requantised(layer, layout.name())?,
        Weights::Compressed | Weights::Merged => &layer.weight,
    };
    match stored {
        StoredWeight::Quantised { weight, .. } => Ok(weight),
        StoredWeight::Blocks(_) => Err(not_storable(
            layout,
            layer.report.layer,
            "it is in GGUF blocks; write it as GGUF",
        )),
        StoredWeight::Dense(_) => Err(not_storable(
            layout,
            layer.report.layer,
            "it is not quantised",
        )),
    }
}
