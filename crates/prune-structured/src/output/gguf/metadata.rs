//! The metadata of a GGUF file.

use super::{Precision, tokenizer, unsupported};
use crate::Result;
use causal_lm::config::QkNorm;
use causal_lm::gguf::Architecture;
use causal_lm::{Decoder, Widths};
use tensor_io::gguf::Value;

/// Keys and values, in the order in which they are written.
pub(super) fn metadata(
    decoder: &Decoder<'_>,
    architecture: Architecture,
    precision: Precision,
) -> Result<Vec<(String, Value)>> {
    let config = decoder.config();
    let number = |value: usize| Value::U32(value as u32);
    let name = decoder.checkpoint().dir().file_name();
    let mut values: Vec<(String, Value)> = vec![
        (
            "general.architecture".into(),
            Value::String(architecture.name().into()),
        ),
        (
            "general.name".into(),
            Value::String(name.unwrap_or_default().to_string_lossy().into_owned()),
        ),
        ("general.type".into(), "model".into()),
        (
            "general.file_type".into(),
            Value::U32(precision.file_type()),
        ),
        ("general.quantization_version".into(), Value::U32(2)),
    ];
    // A gone half is written as one unit of zeros.
    let widths = |width: fn(&Widths) -> usize| -> Value {
        let mut all = config.widths.iter().map(|w| width(w).max(1) as u32);
        match architecture {
            Architecture::Deci => all.collect::<Vec<u32>>().into(),
            _ => all.next().unwrap_or(0).into(),
        }
    };
    let windows = config.attention.iter().filter_map(|a| a.sliding_window);
    let window = windows.min();
    let context = window.map_or(config.max_positions, |w| config.max_positions.min(w));
    let eps = config.norm.eps as f32;
    for (key, value) in [
        ("vocab_size", number(config.vocab)),
        ("context_length", number(context)),
        ("embedding_length", number(config.hidden)),
        ("block_count", number(config.layers())),
        ("feed_forward_length", widths(|w| w.neurons)),
        ("attention.head_count", widths(|w| w.heads)),
        ("attention.head_count_kv", widths(|w| w.kv_heads)),
        ("attention.key_length", number(config.head_dim(0))),
        ("attention.value_length", number(config.head_dim(0))),
        ("attention.layer_norm_rms_epsilon", Value::F32(eps)),
        ("rope.dimension_count", number(config.head_dim(0))),
        ("rope.freq_base", Value::F32(rope_base(decoder)? as f32)),
    ] {
        values.push((format!("{}.{key}", architecture.name()), value));
    }
    values.extend(tokenizer::metadata(decoder)?);
    Ok(values)
}

/// The base of the rotation's frequencies.
fn rope_base(decoder: &Decoder<'_>) -> Result<f64> {
    let config = decoder.checkpoint().config();
    let section = config.opt_section("rope_parameters")?;
    let nested = section.map(|s| s.opt_f64("rope_theta")).transpose()?;
    let base = nested.flatten().or(config.opt_f64("rope_theta")?);
    // What causal-lm and transformers assume.
    Ok(base.unwrap_or(10_000.0))
}

/// What each frequency is divided by, where that is not 1: every scaling rule but YaRN's comes down
/// to such factors.
pub(super) fn rope_factors(decoder: &Decoder<'_>) -> Result<Option<Vec<f32>>> {
    let config = decoder.config();
    if config.ropes[0].attention_factor != 1.0 {
        return Err(unsupported(
            "a YaRN rotation",
            "this export states scalings as factors of the frequencies, and YaRN scales attention too",
        ));
    }
    let base = rope_base(decoder)?;
    let factor = |(i, frequency): (usize, &f64)| {
        base.powf(-(2.0 * i as f64) / config.head_dim(0) as f64) / frequency
    };
    let factors: Vec<f64> = config.ropes[0]
        .inv_freq
        .iter()
        .enumerate()
        .map(factor)
        .collect();
    if factors.iter().all(|factor| (factor - 1.0).abs() < 1e-9) {
        return Ok(None);
    }
    if config.qk_norm != QkNorm::None {
        return Err(unsupported(
            "a scaled rotation",
            "llama.cpp's qwen3 reads no factors of the frequencies",
        ));
    }
    Ok(Some(factors.iter().map(|&factor| factor as f32).collect()))
}
