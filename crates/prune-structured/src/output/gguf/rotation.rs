//! The rotation of a model as llama.cpp states it: a base, and a rule or factors of the frequencies.

use super::unsupported;
use crate::Result;
use causal_lm::config::AttentionConfig;
use causal_lm::gguf::Architecture;
use causal_lm::gguf::names::{LONG_FACTORS, ROPE_FACTORS, SHORT_FACTORS};
use causal_lm::{Decoder, Long, ModelConfig, Rope};
use tensor_io::gguf::Value;

/// Divides the frequency of a pair that stands still.
const STANDING: f32 = 1e30;

/// The rotation of full and of sliding layers; `None` for a kind that there is not, or that is not rotated.
fn of_kinds(config: &ModelConfig) -> [Option<&Rope>; 2] {
    [false, true].map(|slides| {
        let of_kind = |attention: &&AttentionConfig| {
            attention.sliding_window.is_some() == slides && attention.rotation.is_some()
        };
        let attention = config.attention.iter().find(of_kind)?;
        config.ropes.get(attention.rotation?)
    })
}

/// What scales the frequencies of a rotation.
enum Scaling {
    None,
    /// All are divided by one number.
    Linear(f64),
    Yarn,
    /// Each is divided by a number of its own, those of longer sequences by others, and attention is sharpened.
    Long,
    /// Each is divided by a number of its own.
    Factors(Vec<f32>),
}

fn scaling(rope: &Rope) -> Scaling {
    if rope.yarn.is_some() {
        return Scaling::Yarn;
    }
    let is_long = |long: &Long| long.inv_freq != rope.inv_freq || rope.attention_factor != 1.0;
    if rope.long.as_ref().is_some_and(is_long) {
        return Scaling::Long;
    }
    let unscaled = rope.unscaled();
    let factors: Vec<f64> = unscaled
        .iter()
        .zip(&rope.inv_freq)
        .map(|(base, scaled)| base / scaled)
        .collect();
    let near = |a: f64, b: f64| (a / b - 1.0).abs() < 1e-9;
    if factors.iter().all(|&factor| near(factor, 1.0)) {
        Scaling::None
    } else if factors.iter().all(|&factor| near(factor, factors[0])) {
        Scaling::Linear(factors[0])
    } else {
        let stored = |&factor: &f64| (factor as f32).min(STANDING);
        Scaling::Factors(factors.iter().map(stored).collect())
    }
}

/// Whether the file of this architecture may hold a factor for each frequency.
fn takes_factors(architecture: Architecture) -> bool {
    matches!(
        architecture,
        Architecture::Llama | Architecture::Deci | Architecture::Gemma4
    )
}

/// The keys, without the name of the architecture.
pub(super) fn metadata(
    decoder: &Decoder<'_>,
    architecture: Architecture,
) -> Result<Vec<(&'static str, Value)>> {
    let config = decoder.config();
    let [full, sliding] = of_kinds(config);
    let differs = |attention: &AttentionConfig| {
        let of_kind = [full, sliding][usize::from(attention.sliding_window.is_some())];
        let own = attention
            .rotation
            .and_then(|rotation| config.ropes.get(rotation));
        own.is_some_and(|own| Some(own) != of_kind)
    };
    if config.attention.iter().any(differs) {
        return Err(unsupported(
            "several rotations of layers that are all full, or all sliding",
            "a file states one for either kind",
        ));
    }
    let Some(rope) = full.or(sliding) else {
        // Granite's switch for models that do not encode positions.
        return Ok(vec![("rope.scaling.finetuned", Value::Bool(false))]);
    };
    let float = |value: f64| Value::F32(value as f32);
    let number = |value: f64| Value::U32(value as u32);
    let mut values = vec![
        ("rope.freq_base", float(rope.theta)),
        ("rope.dimension_count", Value::U32(rope.turned() as u32)),
    ];
    if let Some(sliding) = sliding {
        sliding_layers(rope, sliding, architecture, &mut values)?;
    }
    match scaling(rope) {
        Scaling::None => {}
        Scaling::Linear(_) | Scaling::Factors(_) if takes_factors(architecture) => {}
        Scaling::Linear(factor) => {
            values.push(("rope.scaling.type", "linear".into()));
            values.push(("rope.scaling.factor", float(factor)));
        }
        Scaling::Yarn => {
            let Some(yarn) = rope
                .yarn
                .filter(|yarn| yarn.truncate && takes_yarn(architecture))
            else {
                return Err(unsupported(
                    "a YaRN rotation",
                    format!(
                        "llama.cpp's {} has none, or none whose range is of broken pairs",
                        architecture.name()
                    ),
                ));
            };
            // Readers multiply by this themselves.
            let sharpened = 1.0 + 0.1 * yarn.factor.max(1.0).ln();
            values.extend([
                ("rope.scaling.type", "yarn".into()),
                ("rope.scaling.factor", float(yarn.factor)),
                (
                    "rope.scaling.original_context_length",
                    number(yarn.original),
                ),
                (
                    "rope.scaling.attn_factor",
                    float(rope.attention_factor / sharpened),
                ),
                ("rope.scaling.yarn_beta_fast", float(yarn.beta_fast)),
                ("rope.scaling.yarn_beta_slow", float(yarn.beta_slow)),
            ]);
        }
        Scaling::Long if architecture == Architecture::Phi3 => {
            let original = rope.long.as_ref().map_or(0, |long| long.original);
            values.extend([
                (
                    "rope.scaling.original_context_length",
                    Value::U32(original as u32),
                ),
                ("rope.scaling.attn_factor", float(rope.attention_factor)),
            ]);
        }
        Scaling::Long | Scaling::Factors(_) => {
            return Err(unsupported(
                "a scaled rotation",
                format!(
                    "llama.cpp's {} reads no factors of the frequencies",
                    architecture.name()
                ),
            ));
        }
    }
    if let Some(scale) = config.query_scale {
        values.push(("attention.temperature_scale", float(scale.beta)));
        // The positions of a step of the scale are those of the first training context.
        let original = Value::U32(scale.original as u32);
        match rope.yarn {
            None => values.push(("rope.scaling.original_context_length", original)),
            Some(yarn) if yarn.original == scale.original as f64 => {}
            Some(yarn) => {
                return Err(unsupported(
                    format!("queries that grow every {} positions", scale.original),
                    format!(
                        "a file states one original context, {} of the rotation",
                        yarn.original
                    ),
                ));
            }
        }
    }
    Ok(values)
}

fn takes_yarn(architecture: Architecture) -> bool {
    matches!(
        architecture,
        Architecture::Llama
            | Architecture::Deci
            | Architecture::Qwen3
            | Architecture::Qwen3Moe
            | Architecture::Olmo2
            | Architecture::Mistral3
    )
}

/// What is said of sliding layers where they have a rotation of their own.
fn sliding_layers(
    full: &Rope,
    sliding: &Rope,
    architecture: Architecture,
    values: &mut Vec<(&'static str, Value)>,
) -> Result<()> {
    let name = architecture.name();
    let own = matches!(architecture, Architecture::Gemma3 | Architecture::Gemma4);
    let plain = matches!(scaling(sliding), Scaling::None) && sliding.attention_factor == 1.0;
    let fits = match architecture {
        Architecture::Gemma3 | Architecture::Gemma4 => plain,
        Architecture::Olmo2 => plain && sliding.theta == full.theta,
        _ => sliding == full,
    };
    if !fits {
        return Err(unsupported(
            "a scaled rotation of sliding layers, or one of another base",
            format!("llama.cpp's {name} has none"),
        ));
    }
    if own {
        values.push(("rope.freq_base_swa", Value::F32(sliding.theta as f32)));
    }
    if architecture == Architecture::Gemma4 {
        let turned = Value::U32(sliding.turned() as u32);
        values.push(("rope.dimension_count_swa", turned));
    }
    Ok(())
}

/// Tensors of what frequencies are divided by.
pub(super) fn factors(
    decoder: &Decoder<'_>,
    architecture: Architecture,
) -> Result<Vec<(&'static str, Vec<f32>)>> {
    let config = decoder.config();
    let [full, sliding] = of_kinds(config);
    let Some(rope) = full.or(sliding) else {
        return Ok(vec![]);
    };
    let divided = |scaled: &[f64]| -> Vec<f32> {
        let unscaled = rope.unscaled();
        let pairs = unscaled.iter().zip(scaled);
        pairs.map(|(base, scaled)| (base / scaled) as f32).collect()
    };
    Ok(match scaling(rope) {
        Scaling::Long if architecture == Architecture::Phi3 => {
            let long = rope.long.as_ref().map(|long| divided(&long.inv_freq));
            vec![
                (LONG_FACTORS, long.unwrap_or_default()),
                (SHORT_FACTORS, divided(&rope.inv_freq)),
            ]
        }
        Scaling::Factors(factors) if takes_factors(architecture) => vec![(ROPE_FACTORS, factors)],
        Scaling::Linear(factor) if takes_factors(architecture) => {
            vec![(ROPE_FACTORS, vec![factor as f32; rope.inv_freq.len()])]
        }
        // Readers of full layers ask for them.
        Scaling::None if architecture == Architecture::Gemma4 => {
            vec![(ROPE_FACTORS, vec![1.0; rope.inv_freq.len()])]
        }
        _ => vec![],
    })
}
