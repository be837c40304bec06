//! Decoders whose MLPs are mixtures of experts: Mixtral, Qwen2 and Qwen3, OLMoE, Granite 3.

use super::granite::factors;
use super::{ATTENTION_BIAS, DEFAULTS, Defaults, Family, Stock, stock};
use crate::Result;
use crate::config::expert_map::{self, EXPERT_MAP, ExpertMap};
use crate::config::fields::{Fields, Kind, MOST_EXPERTS, check_experts, check_widths};
use crate::config::{Biases, Mixture, ModelConfig, QkNorm, WIDTHS_KEY, Widths, invalid};
use crate::names;

/// The field of the number of experts in Mixtral's configs.
const LOCAL: &[&str] = &["num_local_experts"];

// Names of the number of experts: where a config has both, transformers takes the first.
const PLAIN_FIRST: [&str; 2] = ["num_experts", "num_local_experts"];
const LOCAL_FIRST: [&str; 2] = ["num_local_experts", "num_experts"];

pub(super) const MIXTRAL: Family = Family {
    model_type: "mixtral",
    names: &names::MIXTRAL,
    stock: Stock {
        experts: LOCAL,
        ..stock("MixtralForCausalLM")
    },
    defaults: Defaults {
        eps: ("rms_norm_eps", 1e-5),
        ..DEFAULTS
    },
    read: |fields, model| {
        let window = fields.window(None)?;
        let attention = model.attention.iter_mut();
        attention.for_each(|a| a.sliding_window = window);
        model.ropes = fields.rope(model, 1e6)?;
        let mixture = mixture(fields, PLAIN_FIRST, (8, 2), true)?;
        set(fields, model, |_| Some(mixture))
    },
};

pub(super) const QWEN2_MOE: Family = Family {
    model_type: "qwen2_moe",
    names: &names::QWEN2_MOE,
    stock: Stock {
        // `qkv_bias` gives the output projection none.
        experts: &["num_experts"],
        expert_width: "moe_intermediate_size",
        ..stock("Qwen2MoeForCausalLM")
    },
    defaults: DEFAULTS,
    read: read_qwen2,
};

pub(super) const QWEN3_MOE: Family = Family {
    model_type: "qwen3_moe",
    names: &names::OLMOE,
    stock: Stock {
        attention_bias: ATTENTION_BIAS,
        // Older readers know the one, transformers from 5 on prefers the other.
        experts: &["num_experts", "num_local_experts"],
        expert_width: "moe_intermediate_size",
        ..stock("Qwen3MoeForCausalLM")
    },
    defaults: DEFAULTS,
    read: read_qwen3,
};

pub(super) const OLMOE: Family = Family {
    model_type: "olmoe",
    names: &names::OLMOE,
    stock: Stock {
        attention_bias: ATTENTION_BIAS,
        experts: &["num_experts"],
        ..stock("OlmoeForCausalLM")
    },
    defaults: Defaults {
        eps: ("rms_norm_eps", 1e-5),
        ..DEFAULTS
    },
    read: |fields, model| {
        biases(fields, model)?;
        model.qk_norm = QkNorm::Projection;
        let clip = fields.text.opt_f64("clip_qkv")?;
        model.attention.iter_mut().for_each(|a| a.clip = clip);
        model.ropes = fields.rope(model, 1e4)?;
        let normalise = fields.flag_or("norm_topk_prob", false)?;
        let mixture = mixture(fields, LOCAL_FIRST, (64, 8), normalise)?;
        set(fields, model, |_| Some(mixture))
    },
};

pub(super) const GRANITE: Family = Family {
    model_type: "granitemoe",
    names: &names::GRANITE_MOE,
    stock: Stock {
        attention_bias: ATTENTION_BIAS,
        experts: LOCAL,
        ..stock("GraniteMoeForCausalLM")
    },
    defaults: DEFAULTS,
    read: |fields, model| {
        biases(fields, model)?;
        model.ropes = fields.rope(model, 1e4)?;
        factors(fields, model)?;
        let mixture = mixture(fields, LOCAL_FIRST, (8, 2), true)?;
        set(fields, model, |_| Some(mixture))
    },
};

/// One switch for q, k, v and o.
fn biases(fields: &Fields, model: &mut ModelConfig) -> Result<()> {
    let bias = fields.flag_or("attention_bias", false)?;
    model.biases = Biases {
        qkv: bias,
        o: bias,
        mlp: false,
    };
    Ok(())
}

/// The experts of a layer that has some, of the width that dense layers have elsewhere.
fn mixture(
    fields: &Fields,
    names: [&'static str; 2],
    defaults: (usize, usize),
    normalise: bool,
) -> Result<Mixture> {
    let experts = fields.experts_or(names, defaults.0)?;
    let width = match fields.text.get(WIDTHS_KEY) {
        Some(_) => 0,
        None => fields.positive("intermediate_size")?,
    };
    Ok(Mixture {
        experts,
        width,
        chosen: fields.positive_or("num_experts_per_tok", Some(defaults.1))?,
        normalise,
        shared: 0,
    })
}

/// Gives layers their experts in place of an MLP. A pruned model lists the number and width of its experts by layer, and what
/// router rows stand for where they are not these.
fn set(
    fields: &Fields,
    model: &mut ModelConfig,
    of: impl Fn(usize) -> Option<Mixture>,
) -> Result<()> {
    let layers = model.layers();
    let lists = match fields.text.opt_section(WIDTHS_KEY)? {
        None => None,
        Some(lists) => {
            let list = |field| match lists.usizes(field)? {
                list if list.len() == layers => Ok(list),
                list => Err(invalid(
                    WIDTHS_KEY,
                    format!("{field} has {} entries for {layers} layers", list.len()),
                )),
            };
            let (experts, widths) = (list("num_experts")?, list("expert_size")?);
            check_experts(&experts)?;
            check_widths(&widths)?;
            let maps = lists.get(EXPERT_MAP);
            let maps = maps.map(|maps| expert_map::lists(maps, layers, MOST_EXPERTS));
            Some((experts, widths, maps.transpose()?))
        }
    };
    for layer in 0..layers {
        let mixture = of(layer).filter(|mixture| mixture.experts > 0);
        model.mixtures[layer] = match (mixture, &lists) {
            (Some(mixture), Some((experts, width, _))) => (experts[layer] > 0).then_some(Mixture {
                experts: experts[layer],
                width: width[layer],
                ..mixture
            }),
            (mixture, _) => mixture,
        };
        if let Some((_, _, Some(maps))) = &lists {
            model.expert_maps[layer] = mapped(layer, model.mixtures[layer], &maps[layer])?;
        }
        if model.mixtures[layer].is_some() {
            let widths = &mut model.widths[layer];
            *widths = Widths {
                neurons: 0,
                ..*widths
            };
        }
    }
    Ok(())
}

/// The map of a layer, where it is not the identity.
fn mapped(layer: usize, mixture: Option<Mixture>, ids: &[usize]) -> Result<Option<ExpertMap>> {
    let Some(mixture) = mixture else {
        return match ids {
            [] => Ok(None),
            _ => Err(invalid(
                WIDTHS_KEY,
                format!("{EXPERT_MAP} of layer {layer} has ids, but the layer has no experts"),
            )),
        };
    };
    let map = ExpertMap::new(ids.to_vec(), mixture.experts)?;
    Ok(Some(map).filter(|map| !map.is_identity()))
}

/// Which layers of Qwen's mixtures have experts; those are narrower than the MLPs of the others.
fn set_qwen(
    fields: &Fields,
    model: &mut ModelConfig,
    names: [&'static str; 2],
    defaults: (usize, usize, usize),
    shared: usize,
) -> Result<()> {
    let normalise = fields.flag_or("norm_topk_prob", false)?;
    let (experts, chosen, width) = defaults;
    let mixture = Mixture {
        width: fields.positive_or("moe_intermediate_size", Some(width))?,
        shared,
        ..mixture(fields, names, (experts, chosen), normalise)?
    };
    let dense = match fields.text.get("mlp_only_layers") {
        Some(_) => fields.text.usizes("mlp_only_layers")?,
        None => vec![],
    };
    let step = fields.positive_or("decoder_sparse_step", Some(1))?;
    set(fields, model, |layer| {
        let sparse = !dense.contains(&layer) && (layer + 1).is_multiple_of(step);
        sparse.then_some(mixture)
    })
}

fn read_qwen2(fields: &Fields, model: &mut ModelConfig) -> Result<()> {
    model.biases.qkv = fields.flag_or("qkv_bias", true)?;
    if fields.flag_or("use_sliding_window", false)? {
        // Written as 0 when it is unused.
        let window = fields.window(Some(4096))?.filter(|&window| window > 0);
        let sliding = fields.text.opt_usize("max_window_layers")?.unwrap_or(28);
        let rule = |layer: usize| match layer.is_multiple_of(2) && layer < sliding {
            true => Kind::Sliding,
            false => Kind::Full,
        };
        let kinds = fields.kinds(model.layers(), rule)?;
        for (attention, kind) in model.attention.iter_mut().zip(kinds) {
            attention.sliding_window = window.filter(|_| kind == Kind::Sliding);
        }
    }
    model.ropes = fields.rope(model, 1e4)?;
    let shared = fields.positive_or("shared_expert_intermediate_size", Some(5632))?;
    set_qwen(fields, model, PLAIN_FIRST, (60, 4, 1408), shared)
}

fn read_qwen3(fields: &Fields, model: &mut ModelConfig) -> Result<()> {
    biases(fields, model)?;
    model.qk_norm = QkNorm::Heads;
    if fields.flag_or("use_sliding_window", false)? {
        let window = fields.window(Some(4096))?.filter(|&window| window > 0);
        let attention = model.attention.iter_mut();
        attention.for_each(|a| a.sliding_window = window);
    }
    model.ropes = fields.rope(model, 1e4)?;
    set_qwen(fields, model, LOCAL_FIRST, (128, 8, 768), 0)
}
