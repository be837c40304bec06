//! SmolLM3: Llama without rotation on some layers, which may slide.

use super::llama::biases;
use super::{ATTENTION_BIAS, DEFAULTS, Defaults, Family, MLP_BIAS, Stock, stock};
use crate::Result;
use crate::config::fields::{Fields, Kind};
use crate::config::{ModelConfig, invalid};
use crate::names;

pub(super) const SMOLLM3: Family = Family {
    model_type: "smollm3",
    names: &names::LLAMA,
    stock: Stock {
        attention_bias: ATTENTION_BIAS,
        mlp_bias: MLP_BIAS,
        ..stock("SmolLM3ForCausalLM")
    },
    defaults: Defaults {
        heads: Some(16),
        kv_heads: Some(4),
        tied: true,
        ..DEFAULTS
    },
    read,
};

fn read(fields: &Fields, model: &mut ModelConfig) -> Result<()> {
    model.biases = biases(fields)?;
    model.ropes = fields.rope(model, 2e6)?;
    let layers = model.layers();
    // 1 means that the layer rotates.
    let rotates: Vec<bool> = match fields.text.opt_usizes("no_rope_layers")? {
        Some(list) if list.len() == layers => list.iter().map(|&rotates| rotates != 0).collect(),
        Some(list) => {
            return Err(invalid(
                "no_rope_layers",
                format!("{} entries for {layers} layers", list.len()),
            ));
        }
        None => {
            let interval = fields.text.opt_usize("no_rope_layer_interval")?;
            let interval = interval.unwrap_or(4).max(1);
            let rotates = |layer: usize| !(layer + 1).is_multiple_of(interval);
            (0..layers).map(rotates).collect()
        }
    };
    let window = fields.window(None)?;
    // A list stands for itself: the switch is about the layers that the rule finds.
    let slides = fields.flag_or("use_sliding_window", false)?;
    let kinds = fields.kinds(layers, |layer| match slides && !rotates[layer] {
        true => Kind::Sliding,
        false => Kind::Full,
    })?;
    let layers = rotates.into_iter().zip(kinds);
    for (attention, (rotates, kind)) in model.attention.iter_mut().zip(layers) {
        attention.rotation = rotates.then_some(0);
        attention.sliding_window = window.filter(|_| kind == Kind::Sliding);
    }
    Ok(())
}
