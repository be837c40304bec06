//! GPT-NeoX and Pythia: layer norms with biases, attention and MLP side by side, q, k and v interleaved head by head, an
//! MLP without a gate.

use super::{ATTENTION_BIAS, Activation, DEFAULTS, Defaults, Family, Stock, StockHeads, stock};
use crate::Result;
use crate::config::fields::Fields;
use crate::config::{Biases, ModelConfig, NormKind, invalid};
use crate::names;
use crate::rope::{self, Rope};

pub(super) const GPT_NEOX: Family = Family {
    model_type: "gpt_neox",
    names: &names::GPT_NEOX,
    stock: Stock {
        attention_bias: ATTENTION_BIAS,
        heads: StockHeads::Fixed,
        ..stock("GPTNeoXForCausalLM")
    },
    defaults: Defaults {
        eps: ("layer_norm_eps", 1e-5),
        activation: ("hidden_act", Activation::GeluErf),
        ..DEFAULTS
    },
    read,
};

fn read(fields: &Fields, model: &mut ModelConfig) -> Result<()> {
    if let Some(w) = model.widths.iter().find(|w| w.heads != w.kv_heads) {
        let (heads, kv_heads) = (w.heads, w.kv_heads);
        return Err(invalid(
            "num_key_value_heads",
            format!(
                "{kv_heads} for {heads} query heads, but this architecture has no grouped queries"
            ),
        ));
    }
    let attention = fields.flag_or("attention_bias", true)?;
    model.biases = Biases {
        qkv: attention,
        o: attention,
        mlp: true,
    };
    model.norm.kind = NormKind::Layer;
    model.gated_mlp = false;
    model.parallel = fields.flag_or("use_parallel_residual", true)?;
    let defaults = rope::Defaults {
        partial: Some(0.25),
        ..fields.rope_defaults(model, 1e4)
    };
    let mut config = fields.text.clone();
    // Outside the object of the rotation the class reads names of its own, and the usual ones not at all.
    for (usual, own) in [
        ("rope_theta", "rotary_emb_base"),
        ("partial_rotary_factor", "rotary_pct"),
    ] {
        config.remove(usual);
        if let Some(value) = config.remove(own) {
            config.set(usual, value);
        }
    }
    model.ropes = vec![Rope::read(&config, defaults)?];
    Ok(())
}
