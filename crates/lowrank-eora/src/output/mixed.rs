//! GPTQ folders whose linears differ in bits and groups, some of them floats or in blocks of GGUF's types.
//!
//! GPTQ's tensors state their own bits and groups. `quantization_config` gives those of most weights, and under `dynamic`,
//! as GPTQModel has it, those of the others; `-:` names modules that are not in groups. Names of tensors say which are in
//! blocks ([`causal_lm::compressed::blocks`]): causal-lm alone reads those.

use crate::Result;
use crate::compress::{Bits, Group};
use crate::format::gptq;
use crate::repair::{LayerId, Repaired, RepairedLayer, StoredWeight};
use causal_lm::Decoder;
use causal_lm::compressed::blocks;
use packed::QuantRows;
use serde_json::{Map, Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use tensor_io::{CheckpointWriter, Progress, TensorSpec, Written};

use super::options::CheckpointOptions;

/// Bits, inputs per group, and whether zero points are all in the middle.
type Scheme = (usize, usize, bool);

/// Writes the folder; everything but the linears and the other matrices of `repaired` is the decoder's.
pub(super) fn write(
    decoder: &Decoder<'_>,
    repaired: &Repaired,
    (dst, version): (&Path, gptq::Version),
    options: &CheckpointOptions,
    progress: &dyn Progress,
) -> Result<Written> {
    let checkpoint = decoder.checkpoint();
    let mut schemes: BTreeMap<String, Option<Scheme>> = BTreeMap::new();
    let mut elements: BTreeMap<Scheme, usize> = BTreeMap::new();
    let mut specs = Vec::new();
    let mut in_blocks = false;
    let mut declare = |module: &str, weight: &StoredWeight| -> Result<()> {
        specs.extend(declared(module, weight)?);
        in_blocks |= matches!(weight, StoredWeight::Blocks(_));
        let scheme = match weight {
            StoredWeight::Quantised { weight, .. } => {
                let symmetric = weight.is_symmetric();
                let scheme = (weight.bits.get(), weight.group_width, symmetric);
                *elements.entry(scheme).or_default() += weight.codes.len();
                Some(scheme)
            }
            _ => None,
        };
        schemes.insert(module.to_string(), scheme);
        Ok(())
    };
    for block in 0..repaired.blocks() {
        for layer in repaired.block(block)? {
            declare(&layer.report.layer.to_string(), &layer.weight)?;
        }
    }
    for other in repaired.others() {
        let (module, weight) = other?;
        declare(module, &weight)?;
    }
    let replaced: BTreeSet<String> = schemes.keys().map(|m| format!("{m}.weight")).collect();
    let names = decoder.config().names;
    // A copy of the embedding is no head any more when the embedding changes, and nobody needs it when it does not.
    let is_copy = |name: &str| decoder.config().tied && name == names.head();
    let stays = |name: &&str| !replaced.contains(*name) && !is_copy(name);
    for name in checkpoint.names().filter(stays) {
        let info = checkpoint.info(name)?;
        specs.push(TensorSpec::new(name, info.dtype, info.shape.clone()));
    }
    let mut config = decoder.config_to_write()?;
    let section = quantization_config(&schemes, &elements, version)
        .or_else(|| in_blocks.then(|| json!({"quant_method": blocks::METHOD})));
    if let Some(section) = section {
        config.set("quantization_config", section);
    }

    let mut writer = CheckpointWriter::create(dst, &config, specs, &options.write)?;
    progress.begin("write checkpoint", repaired.blocks() as u64);
    writer.carry_from(checkpoint)?;
    for name in checkpoint.names().filter(stays) {
        writer.copy_tensor(name, checkpoint)?;
    }
    let mut put = |module: &str, weight: &StoredWeight| -> Result<()> {
        match weight {
            StoredWeight::Quantised { weight, .. } => {
                for (spec, bytes) in gptq::tensors(module, weight, version)? {
                    writer.write_bytes(&spec.name, &bytes)?;
                }
            }
            StoredWeight::Dense(tensor) => {
                writer.write_tensor(&format!("{module}.weight"), tensor)?;
            }
            StoredWeight::Blocks(weight) => {
                writer.write_bytes(&blocks_spec(module, weight)?.name, weight.bytes())?;
            }
        }
        Ok(())
    };
    for block in 0..repaired.blocks() {
        for RepairedLayer { report, weight, .. } in repaired.block(block)? {
            put(&report.layer.to_string(), &weight)?;
        }
        progress.advance(1)?;
    }
    for other in repaired.others() {
        let (module, weight) = other?;
        put(module, &weight)?;
    }
    Ok(writer.finish()?)
}

/// The tensors of a module.
fn declared(module: &str, weight: &StoredWeight) -> Result<Vec<TensorSpec>> {
    match weight {
        StoredWeight::Quantised { weight, .. } => {
            let group = Group::Columns(weight.group_width);
            let shape = (weight.rows, weight.cols);
            let bits: Bits = weight.bits;
            gptq::specs(module, shape, bits, group)
        }
        StoredWeight::Dense(tensor) => Ok(vec![TensorSpec::new(
            format!("{module}.weight"),
            tensor.dtype(),
            tensor.dims().to_vec(),
        )]),
        StoredWeight::Blocks(weight) => Ok(vec![blocks_spec(module, weight)?]),
    }
}

fn blocks_spec(module: &str, weight: &QuantRows<'_>) -> Result<TensorSpec> {
    let shape = [weight.rows(), weight.cols()];
    Ok(blocks::spec(module, shape, weight.block_type())?)
}

/// `None` where nothing is quantised.
fn quantization_config(
    schemes: &BTreeMap<String, Option<Scheme>>,
    elements: &BTreeMap<Scheme, usize>,
    version: gptq::Version,
) -> Option<Value> {
    let (&most, _) = elements.iter().max_by_key(|(_, count)| **count)?;
    let mut dynamic = Map::new();
    for (module, scheme) in schemes {
        let pattern = format!("^{}$", module.replace('.', "\\."));
        match scheme {
            Some(scheme) if *scheme == most => {}
            Some((bits, group_size, sym)) => {
                let own = json!({"bits": bits, "group_size": group_size, "sym": sym});
                dynamic.insert(format!("+:{pattern}"), own);
            }
            None if LayerId::parse(module).is_some() => {
                dynamic.insert(format!("-:{pattern}"), json!({}));
            }
            None => {}
        }
    }
    let (bits, group_size, _) = most;
    let mut section = json!({
        "quant_method": "gptq",
        "checkpoint_format": version.name(),
        "bits": bits,
        "group_size": group_size,
        // Only where it holds of every module.
        "sym": elements.keys().all(|&(_, _, symmetric)| symmetric),
        "desc_act": false,
        "lm_head": false,
    });
    if !dynamic.is_empty() {
        section["dynamic"] = dynamic.into();
    }
    Some(section)
}
