//! Nemotron-NAS (DeciLM) folders: `block_configs` with a width for each layer, as vLLM reads them.
//!
//! The format has one number of query heads for all layers, so that attention must come out equally
//! wide; MLPs may differ. Widths that are all multiples of 256 are written as `ffn_mult`, the form
//! of the published checkpoints; others as `intermediate_size`, which vLLM's `DeciLMForCausalLM`
//! reads where a block has no `ffn_mult`. Tensors are copied byte for byte. The config class, which
//! the published checkpoints bring along too, goes into the folder.

use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use causal_lm::config::{QkNorm, WIDTHS_KEY};
use causal_lm::{Decoder, LinearName, Progress, Widths};
use serde_json::{Value, json};
use std::path::Path;
use tensor_io::{CheckpointWriter, Config, TensorSpec, WriteOptions, Written};

/// File name of the config class.
pub const CONFIG_CLASS_FILE: &str = "configuration_decilm.py";
const CONFIG_CLASS: &str = include_str!("configuration_decilm.py");

/// What `ffn_mult` is rounded up to.
const MULTIPLE: usize = 256;

/// Writes `decoder`, dense or pruned, as a Nemotron-NAS folder; a step of `progress` is a tensor.
///
/// # Errors
/// [`Error::Export`] for what the format cannot represent: attention of different widths, a removed half, norms of q
/// and k, a sliding window; [`Error::Cancelled`], and what reading and writing report.
pub fn export(
    decoder: &Decoder<'_>,
    dst: impl AsRef<Path>,
    options: &WriteOptions,
    progress: &dyn Progress,
) -> Result<Written> {
    let config = config(decoder)?;
    let checkpoint = decoder.checkpoint();
    let mut specs = Vec::new();
    for name in checkpoint.names() {
        let info = checkpoint.info(name)?;
        specs.push(TensorSpec::new(name, info.dtype, info.shape.clone()));
    }
    let zeros = missing_biases(decoder)?;
    specs.extend(zeros.iter().cloned());
    let mut writer = CheckpointWriter::create(dst, &config, specs, options)?;
    writer.carry_from(checkpoint)?;
    writer.add_file(CONFIG_CLASS_FILE, CONFIG_CLASS.as_bytes())?;
    progress.begin("nemotron-nas", checkpoint.names().count() as u64);
    for name in checkpoint.names() {
        writer.copy_tensor(name, checkpoint)?;
        progress.advance(1)?;
    }
    for spec in zeros {
        let zeros = Tensor::zeros(spec.shape.as_slice(), DType::F32, &Device::Cpu)?;
        writer.write_tensor(&spec.name, &zeros)?;
    }
    Ok(writer.finish()?)
}

/// Whether any layer has a bias for one of these linears. The format has biases on all linears of a half or on none, but
/// for q, k and v, which may have them alone.
fn has_bias(decoder: &Decoder<'_>, names: &[LinearName]) -> bool {
    let in_layer = |layer| names.iter().any(|&name| decoder.has_bias(layer, name));
    (0..decoder.config().layers()).any(in_layer)
}

const QKV: [LinearName; 3] = [LinearName::Q, LinearName::K, LinearName::V];
const ATTENTION: [LinearName; 4] = [LinearName::Q, LinearName::K, LinearName::V, LinearName::O];
const MLP: [LinearName; 3] = [LinearName::Gate, LinearName::Up, LinearName::Down];

/// Biases of zeros for linears whose half has others with one.
fn missing_biases(decoder: &Decoder<'_>) -> Result<Vec<TensorSpec>> {
    let mut needed: Vec<LinearName> = Vec::new();
    if has_bias(decoder, &[LinearName::O]) {
        needed.extend(ATTENTION);
    } else if has_bias(decoder, &QKV) {
        needed.extend(QKV);
    }
    if has_bias(decoder, &MLP) {
        needed.extend(MLP);
    }
    let names = decoder.config().names;
    let mut specs = Vec::new();
    for layer in 0..decoder.config().layers() {
        for &name in &needed {
            let Some(module) = names.module_of(name) else {
                continue;
            };
            let shape = decoder.config().linear_shape(layer, name);
            if let Some([rows, _]) = shape
                && !decoder.has_bias(layer, name)
            {
                let weight = names.weight(layer, module);
                let dtype = decoder.checkpoint().info(&weight)?.dtype;
                specs.push(TensorSpec::new(
                    names.bias(layer, module),
                    dtype,
                    vec![rows],
                ));
            }
        }
    }
    Ok(specs)
}

/// Whether a model could be exported if its layers had these widths, those that it has or those that a plan keeps.
///
/// # Errors
/// [`Error::Export`] as for [`export`].
pub fn check(decoder: &Decoder<'_>, widths: &[Widths]) -> Result<()> {
    let model = decoder.config();
    let unsupported = |what: &str, reason: &str| {
        Err(Error::Export {
            format: "nemotron-nas",
            what: what.into(),
            reason: reason.into(),
        })
    };
    if model.has_expert_map() {
        return unsupported(
            "router rows that share experts or stand for constants",
            "the format's blocks have no experts",
        );
    }
    if model.qk_norm != QkNorm::None {
        return unsupported(
            model.model_type,
            "the format's blocks have no norms of q and k",
        );
    }
    if model.attention.iter().any(|a| a.sliding_window.is_some()) {
        return unsupported(
            "a sliding window",
            "the format's attention sees everything before",
        );
    }
    if !model.is_plain_llama() {
        return unsupported(model.model_type, "the format's blocks are Llama's");
    }
    let Some(first) = widths.first() else {
        return Ok(());
    };
    for (layer, widths) in widths.iter().enumerate() {
        let same = (widths.heads, widths.kv_heads) == (first.heads, first.kv_heads);
        if !same || widths.heads == 0 || widths.neurons == 0 {
            return unsupported(
                &format!(
                    "layer {layer} with {} heads, {} key/value heads and {} neurons",
                    widths.heads, widths.kv_heads, widths.neurons
                ),
                "attention must be equally wide in all layers and no half gone; prune with equal widths or keep all attention",
            );
        }
    }
    Ok(())
}

fn config(decoder: &Decoder<'_>) -> Result<Config> {
    let model = decoder.config();
    check(decoder, &model.widths)?;
    let first = model.widths[0];
    let in_multiples = model
        .widths
        .iter()
        .all(|w| w.neurons.is_multiple_of(MULTIPLE));
    let blocks: Vec<Value> = model
        .widths
        .iter()
        .map(|widths| {
            let mut ffn = json!({ "no_op": false, "replace_with_linear": false });
            if in_multiples {
                ffn["ffn_mult"] = json!(ffn_mult(widths.neurons, model.hidden));
            } else {
                ffn["intermediate_size"] = json!(widths.neurons);
            }
            json!({
                "attention": {
                    "n_heads_in_group": widths.heads / widths.kv_heads,
                    "no_op": false,
                    "replace_with_linear": false,
                },
                "ffn": ffn,
            })
        })
        .collect();
    let mut config = decoder.config_to_write()?;
    for key in [WIDTHS_KEY, "intermediate_size", "auto_map"] {
        config.remove(key);
    }
    config.set("architectures", json!(["DeciLMForCausalLM"]));
    config.set("model_type", "nemotron-nas");
    config.set(
        "auto_map",
        json!({ "AutoConfig": "configuration_decilm.DeciLMConfig" }),
    );
    config.set("num_attention_heads", first.heads);
    config.set("num_key_value_heads", first.kv_heads);
    config.set("head_dim", model.head_dim(0));
    config.set("attention_bias", has_bias(decoder, &[LinearName::O]));
    if has_bias(decoder, &QKV) {
        config.set("qkv_bias", true);
    }
    config.set("mlp_bias", has_bias(decoder, &MLP));
    config.set("block_configs", blocks);
    Ok(config)
}

/// The multiplier that readers turn into `neurons`: they take `⌊2/3 · ffn_mult · hidden⌋` and round
/// up to a multiple of 256, so that the middle of the step is aimed at.
fn ffn_mult(neurons: usize, hidden: usize) -> f64 {
    1.5 * (neurons as f64 - MULTIPLE as f64 / 2.0) / hidden as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The rule of the readers.
    fn intermediate_size(ffn_mult: f64, hidden: usize) -> usize {
        ((2.0 * ffn_mult * hidden as f64 / 3.0) as usize).next_multiple_of(256)
    }

    #[test]
    fn readers_turn_the_multiplier_back_into_the_width() {
        for hidden in [64, 896, 4096, 8192] {
            for neurons in (256..32768).step_by(256) {
                assert_eq!(
                    intermediate_size(ffn_mult(neurons, hidden), hidden),
                    neurons
                );
            }
        }
    }
}
