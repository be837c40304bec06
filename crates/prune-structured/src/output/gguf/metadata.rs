//! The metadata of a GGUF file.

use super::{ExportOptions, tokenizer};
use crate::Result;
use causal_lm::config::NormKind;
use causal_lm::gguf::Architecture;
use causal_lm::{Decoder, ModelConfig, Widths};
use tensor_io::gguf::{Array, Value};

/// Keys and values, in the order in which they are written.
pub(super) fn metadata(
    decoder: &Decoder<'_>,
    architecture: Architecture,
    options: &ExportOptions,
) -> Result<Vec<(String, Value)>> {
    let config = decoder.config();
    let number = |value: usize| Value::U32(value as u32);
    let name = decoder.checkpoint().dir().file_name();
    let name = name.unwrap_or_default().to_string_lossy().into_owned();
    let (name, tokenizer) = tokenizer::metadata(decoder, name)?;
    let mut values: Vec<(String, Value)> = vec![
        (
            "general.architecture".into(),
            Value::String(architecture.name().into()),
        ),
        ("general.name".into(), Value::String(name)),
        ("general.type".into(), "model".into()),
        (
            "general.file_type".into(),
            Value::U32(options.precision.block_type().file_type()),
        ),
        ("general.quantization_version".into(), Value::U32(2)),
    ];
    let prefix = architecture.name();
    let mut put = |key: &str, value: Value| values.push((format!("{prefix}.{key}"), value));
    put("vocab_size", number(config.vocab));
    put("embedding_length", number(config.hidden));
    put("block_count", number(config.layers()));
    let windows = config.attention.iter().filter_map(|a| a.sliding_window);
    let window = windows.min();
    let context = match states_window(architecture) {
        true => config.max_positions,
        // A window is not in the format; within it, it changes nothing.
        false => window.map_or(config.max_positions, |w| config.max_positions.min(w)),
    };
    put("context_length", number(context));
    // A gone half is written as one unit of zeros.
    let widths = |width: fn(&Widths) -> usize| -> Value {
        let all: Vec<u32> = config
            .widths
            .iter()
            .map(|w| width(w).max(1) as u32)
            .collect();
        let equal = all.iter().all(|width| *width == all[0]);
        match architecture {
            Architecture::Deci => all.into(),
            Architecture::Gemma4 if !equal => all.into(),
            _ => all[0].into(),
        }
    };
    put("attention.head_count", widths(|w| w.heads));
    put("attention.head_count_kv", widths(|w| w.kv_heads));
    match config.mixtures[0] {
        None => put("feed_forward_length", widths(|w| w.neurons)),
        Some(mixture) => {
            let has_own_key = matches!(
                architecture,
                Architecture::Qwen2Moe | Architecture::Qwen3Moe
            );
            // There it is the width of dense layers, which there are not.
            let dense = decoder
                .checkpoint()
                .config()
                .opt_usize("intermediate_size")?;
            let dense = dense.filter(|&width| has_own_key && width > 0);
            put(
                "feed_forward_length",
                number(dense.unwrap_or(mixture.width)),
            );
            if has_own_key {
                put("expert_feed_forward_length", number(mixture.width));
            }
            if mixture.shared > 0 {
                put("expert_shared_feed_forward_length", number(mixture.shared));
            }
            put("expert_count", number(mixture.experts));
            put("expert_used_count", number(mixture.chosen));
        }
    }
    let eps = match config.norm.kind {
        NormKind::Rms => "attention.layer_norm_rms_epsilon",
        NormKind::Layer => "attention.layer_norm_epsilon",
    };
    put(eps, Value::F32(config.norm.eps as f32));
    for (key, value) in super::rotation::metadata(decoder, architecture)? {
        put(key, value);
    }
    for (key, value) in own(config, architecture) {
        put(key, value);
    }
    values.extend(tokenizer);
    // Keys of our own, which readers pass over.
    let own = |name: &str, value: &str| (format!("prune.{name}"), Value::from(value));
    values.push(own("version", env!("CARGO_PKG_VERSION")));
    let provenance = options.provenance.iter();
    values.extend(provenance.map(|(name, value)| own(name, value)));
    Ok(values)
}

/// Whether files of this architecture state the window of sliding layers.
fn states_window(architecture: Architecture) -> bool {
    matches!(
        architecture,
        Architecture::Gemma2 | Architecture::Gemma3 | Architecture::Gemma4 | Architecture::Olmo2
    )
}

/// Keys that are an architecture's own, without its name.
fn own(config: &ModelConfig, architecture: Architecture) -> Vec<(&'static str, Value)> {
    let mut values: Vec<(&'static str, Value)> = Vec::new();
    let number = |value: usize| Value::U32(value as u32);
    let float = |value: f64| Value::F32(value as f32);
    let slides = |layer: usize| config.attention[layer].sliding_window.is_some();
    // The width of heads of full layers, or of the only kind.
    let full = (0..config.layers()).find(|&layer| !slides(layer));
    let head_dim = config.head_dim(full.unwrap_or(0));
    // These take heads that make up the channels.
    if !matches!(architecture, Architecture::Phi3 | Architecture::GptNeox) {
        values.push(("attention.key_length", number(head_dim)));
        values.push(("attention.value_length", number(head_dim)));
    }
    let windows = config.attention.iter().filter_map(|a| a.sliding_window);
    if let Some(window) = windows.min().filter(|_| states_window(architecture)) {
        values.push(("attention.sliding_window", number(window)));
        // Readers of Gemma 2 know the order.
        if architecture != Architecture::Gemma2 {
            let list = (0..config.layers()).map(slides).collect();
            let list = Value::Array(Array::Bool(list));
            values.push(("attention.sliding_window_pattern", list));
        }
    }
    if let Some(cap) = config.attention[0].softcap {
        values.push(("attn_logit_softcapping", float(cap)));
    }
    match config.logit_softcap {
        Some(cap) => values.push(("final_logit_softcapping", float(cap))),
        // Its readers cap logits where the key is absent.
        None if architecture == Architecture::Gemma4 => {
            values.push(("final_logit_softcapping", float(0.0)));
        }
        None => {}
    }
    match architecture {
        Architecture::Granite | Architecture::GraniteMoe => values.extend([
            ("attention.scale", float(config.attention[0].scale)),
            ("embedding_scale", float(config.embedding_scale)),
            ("residual_scale", float(config.residual_scale)),
            // What logits are divided by.
            ("logit_scale", float(1.0 / config.logit_scale)),
        ]),
        Architecture::Gemma4 => {
            let sliding = (0..config.layers()).find(|&layer| slides(layer));
            let sliding = number(config.head_dim(sliding.unwrap_or(0)));
            values.extend([
                ("attention.key_length_swa", sliding.clone()),
                ("attention.value_length_swa", sliding),
                ("attention.shared_kv_layers", number(0)),
                ("embedding_length_per_layer_input", number(0)),
            ]);
        }
        // Switched off in its readers, which warn of another one.
        Architecture::Phi3 => values.push(("attention.sliding_window", number(0))),
        Architecture::GptNeox => {
            values.push(("use_parallel_residual", Value::Bool(config.parallel)));
        }
        _ => {}
    }
    values
}
