//! What llama.cpp's graphs take for granted of each architecture.

use super::unsupported;
use crate::Result;
use causal_lm::config::{Activation, Mixture};
use causal_lm::gguf::Architecture;
use causal_lm::{Decoder, LinearName, ModelConfig};

/// What the file of a model declares itself to be whose configuration is `config`: the decoder's, or the same with other
/// widths.
///
/// # Errors
/// [`Error::Export`](crate::Error::Export) for a model of which llama.cpp would compute something else, and for one with terms
/// that no file holds.
pub(super) fn architecture(decoder: &Decoder<'_>, config: &ModelConfig) -> Result<Architecture> {
    decoder.check_written()?;
    if let Some(layer) = config.expert_maps.iter().position(Option::is_some) {
        return Err(unsupported(
            format!("router rows of layer {layer} that share experts or stand for constants"),
            "llama.cpp has an expert for each row; export a model whose experts were dropped, or merged without ties",
        ));
    }
    let Some(architecture) = Architecture::of(config) else {
        let known = Architecture::ALL.map(Architecture::name).join(", ");
        return Err(unsupported(
            config.model_type,
            format!("this export knows the architectures {known}"),
        ));
    };
    if config.mixtures.iter().any(Option::is_some) {
        mixtures(config, architecture)?;
    }
    widths(config, architecture)?;
    attention(config, architecture)?;
    biases(decoder, architecture)?;
    let expected = match architecture {
        Architecture::Gemma2 | Architecture::Gemma3 | Architecture::Gemma4 => {
            &[Activation::GeluTanh][..]
        }
        // Computed in the form of tanh, from a table of half precision.
        Architecture::GptNeox => &[Activation::GeluErf, Activation::GeluTanh],
        _ => &[Activation::Silu],
    };
    if !expected.contains(&config.activation) {
        return Err(unsupported(
            format!("{:?} in the MLPs", config.activation),
            format!("llama.cpp's {} has another activation", architecture.name()),
        ));
    }
    if architecture == Architecture::Gemma2 && !config.tied {
        return Err(unsupported(
            "a head beside the embedding",
            "llama.cpp's gemma2 always uses the embedding",
        ));
    }
    Ok(architecture)
}

/// Architectures whose projections of q and o are square in llama.cpp.
pub(super) fn has_square_projections(architecture: Architecture) -> bool {
    matches!(
        architecture,
        Architecture::Phi3
            | Architecture::Olmo2
            | Architecture::GptNeox
            | Architecture::Qwen2Moe
            | Architecture::Olmoe
    )
}

/// Architectures whose blocks may differ in width; models of Llama's become `deci` then.
pub(super) fn takes_widths_by_block(architecture: Architecture) -> bool {
    matches!(
        architecture,
        Architecture::Llama | Architecture::Deci | Architecture::Gemma4
    )
}

fn widths(config: &ModelConfig, architecture: Architecture) -> Result<()> {
    // A Llama whose blocks differ is `deci` by now.
    let by_layer = takes_widths_by_block(architecture) && architecture != Architecture::Llama;
    let (first, dim) = (config.widths[0], config.head_dim(0));
    let model = config.model_type;
    if !by_layer {
        let equal = config.widths.iter().all(|widths| *widths == first) && first.heads > 0;
        let dims = (0..config.layers()).all(|layer| config.head_dim(layer) == dim);
        if !equal || !dims {
            return Err(unsupported(
                format!("{model} with different widths in its layers"),
                "llama.cpp takes a width for each layer only of llama, mistral and qwen2 (as deci) and of gemma4; export equal widths",
            ));
        }
    }
    if architecture == Architecture::Gemma4
        && config.widths.iter().any(|w| w.heads == 0 || w.neurons == 0)
    {
        return Err(unsupported(
            format!("{model} with a layer that lacks a half"),
            "llama.cpp's gemma4 has both in every layer",
        ));
    }
    if has_square_projections(architecture) && first.heads * dim != config.hidden {
        return Err(unsupported(
            format!(
                "{} heads of {dim} in a model of {} channels",
                first.heads, config.hidden
            ),
            format!(
                "llama.cpp's {} takes heads that make up the channels",
                architecture.name()
            ),
        ));
    }
    if architecture == Architecture::Olmoe && first.kv_heads != first.heads {
        return Err(unsupported(
            format!(
                "{} key/value heads for {} query heads",
                first.kv_heads, first.heads
            ),
            "llama.cpp's olmoe takes as many of both",
        ));
    }
    Ok(())
}

fn mixtures(config: &ModelConfig, architecture: Architecture) -> Result<()> {
    let first: Option<Mixture> = config.mixtures[0];
    for (layer, mixture) in config.mixtures.iter().enumerate() {
        match (first, mixture) {
            (Some(a), Some(b)) if a == *b => {}
            (Some(a), Some(b)) => {
                return Err(unsupported(
                    format!(
                        "{} experts of {} neurons in layer 0 and {} of {} in layer {layer}",
                        a.experts, a.width, b.experts, b.width
                    ),
                    "a file states one number of experts and one width; keep as many in every layer",
                ));
            }
            _ => {
                return Err(unsupported(
                    "dense layers between mixtures",
                    format!(
                        "llama.cpp's {} has experts in every layer",
                        architecture.name()
                    ),
                ));
            }
        }
    }
    let normalise = first.is_some_and(|mixture| mixture.normalise);
    let expected = !matches!(architecture, Architecture::Qwen2Moe | Architecture::Olmoe);
    if normalise != expected {
        let (found, theirs) = match normalise {
            true => ("divided by their sum", "does not divide them"),
            false => ("not divided by their sum", "divides them"),
        };
        return Err(unsupported(
            format!("gates that are {found} (norm_topk_prob)"),
            format!("llama.cpp's {} {theirs}", architecture.name()),
        ));
    }
    let windows = config.attention.iter().filter_map(|a| a.sliding_window);
    if let Some(window) = windows
        .min()
        .filter(|&window| window < config.max_positions)
    {
        return Err(unsupported(
            format!(
                "a sliding window of {window} in a context of {}",
                config.max_positions
            ),
            format!("llama.cpp's {} has no window", architecture.name()),
        ));
    }
    Ok(())
}

fn attention(config: &ModelConfig, architecture: Architecture) -> Result<()> {
    let name = architecture.name();
    let slides: Vec<bool> = config
        .attention
        .iter()
        .map(|attention| attention.sliding_window.is_some())
        .collect();
    if architecture == Architecture::Gemma4 && !slides.contains(&true) {
        return Err(unsupported(
            "full layers alone",
            "llama.cpp's gemma4 has at least one sliding layer",
        ));
    }
    for (layer, attention) in config.attention.iter().enumerate() {
        if let Some(clip) = attention.clip {
            return Err(unsupported(
                format!("q, k and v clamped to ±{clip} (clip_qkv)"),
                format!("llama.cpp's {name} reads the key and does not clamp"),
            ));
        }
        if attention.gated {
            return Err(unsupported(
                "gated attention",
                "this export has no such architecture",
            ));
        }
        let rotates = match architecture {
            Architecture::SmolLm3 => !(layer + 1).is_multiple_of(4),
            Architecture::Granite => config.attention[0].rotation.is_some(),
            _ => true,
        };
        if attention.rotation.is_some() != rotates {
            return Err(unsupported(
                format!(
                    "layer {layer} {} rotation",
                    if rotates { "without" } else { "with" }
                ),
                format!(
                    "llama.cpp's {name} rotates {}",
                    match architecture {
                        Architecture::SmolLm3 => "all layers but every fourth",
                        _ => "all layers or none",
                    }
                ),
            ));
        }
        let usual = match architecture {
            // What the file states, or what q is multiplied with.
            Architecture::Granite
            | Architecture::GraniteMoe
            | Architecture::Gemma2
            | Architecture::Gemma3 => attention.scale,
            Architecture::Gemma4 => 1.0,
            _ => 1.0 / (attention.head_dim as f64).sqrt(),
        };
        if (attention.scale / usual - 1.0).abs() > 1e-6 {
            return Err(unsupported(
                format!("attention logits multiplied by {}", attention.scale),
                format!("llama.cpp's {name} multiplies them by {usual}"),
            ));
        }
        let alternates = match architecture {
            Architecture::Gemma2 => slides[layer] == layer.is_multiple_of(2),
            _ => true,
        };
        if !alternates {
            return Err(unsupported(
                "another order of full and sliding layers",
                "llama.cpp's gemma2 slides in the first and every other layer",
            ));
        }
        if architecture == Architecture::Gemma2
            && (attention.softcap.is_none() || config.logit_softcap.is_none())
        {
            return Err(unsupported(
                "logits without a cap",
                "llama.cpp's gemma2 always caps them",
            ));
        }
    }
    let mut windows = config.attention.iter().filter_map(|a| a.sliding_window);
    if let Some(first) = windows.next()
        && windows.any(|window| window != first)
    {
        return Err(unsupported(
            "sliding windows of several lengths",
            "a file states one",
        ));
    }
    Ok(())
}

/// Refuses biases that llama.cpp does not load.
fn biases(decoder: &Decoder<'_>, architecture: Architecture) -> Result<()> {
    let config = decoder.config();
    let loads = |linear: LinearName| match architecture {
        Architecture::Llama
        | Architecture::Deci
        | Architecture::Granite
        | Architecture::GraniteMoe
        | Architecture::Mistral3
        | Architecture::GptNeox => true,
        Architecture::Qwen2 | Architecture::Qwen2Moe | Architecture::Glm4 => {
            linear.is_attention() && !linear.is_output()
        }
        _ => false,
    };
    for layer in 0..config.layers() {
        for module in config.names.table().modules {
            let bias = config.names.bias(layer, module);
            if decoder.checkpoint().contains(&bias) && !loads(module.parts[0]) {
                return Err(unsupported(
                    bias,
                    format!(
                        "llama.cpp's {} has no such bias; compensate by least squares",
                        architecture.name()
                    ),
                ));
            }
        }
    }
    Ok(())
}
