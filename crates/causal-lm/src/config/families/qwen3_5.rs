//! The text part of Qwen3.5: gated attention in every fourth layer and a delta net in the others, norms whose weights are stored
//! less 1, rotation of a quarter of each head.

use super::{ATTENTION_BIAS, DEFAULTS, Defaults, Family, Sizes, Stock, stock};
use crate::config::fields::{Fields, width};
use crate::config::{Activation, Biases, DeltaNetConfig, ModelConfig, QkNorm, WIDTHS_KEY, invalid};
use crate::names;
use crate::rope::{self, Rope};
use crate::{Error, Result};
use serde_json::Value;

pub(super) const QWEN3_5: Family = Family {
    model_type: "qwen3_5_text",
    names: &names::QWEN3_5,
    stock: Stock {
        attention_bias: ATTENTION_BIAS,
        extra_blocks: Some("mtp_num_hidden_layers"),
        ..stock("Qwen3_5ForCausalLM")
    },
    defaults: Defaults {
        heads: Some(16),
        kv_heads: Some(4),
        head_dim: Some(256),
        vocab: Some(248_320),
        sizes: Some(Sizes {
            hidden: 4096,
            layers: 32,
            neurons: 12_288,
            positions: 32_768,
        }),
        ..DEFAULTS
    },
    read,
};

/// What stands before the MLP of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Attention,
    DeltaNet,
}

/// Widest head of a delta net, far above published ones: its state is the square of it.
const WIDEST: usize = 1 << 12;

fn read(fields: &Fields, model: &mut ModelConfig) -> Result<()> {
    if let Some(gate) = fields.text.get("attn_output_gate")
        && *gate != Value::Bool(true)
    {
        return Err(Error::UnsupportedOption {
            field: "attn_output_gate",
            value: gate.to_string(),
            supported: "true: attention with a gate",
        });
    }
    if model.activation != Activation::Silu {
        return Err(Error::UnsupportedOption {
            field: "hidden_act",
            value: fields
                .text
                .opt_str("hidden_act")?
                .unwrap_or_default()
                .into(),
            supported: "silu, which the convolutions are followed by too",
        });
    }
    let bias = fields.flag_or("attention_bias", false)?;
    model.biases = Biases {
        qkv: bias,
        o: bias,
        mlp: false,
    };
    model.norm.offset = 1.0;
    model.qk_norm = QkNorm::Heads;
    let defaults = rope::Defaults {
        partial: Some(0.25),
        ..fields.rope_defaults(model, 1e4)
    };
    // Positions on several axes are equal for text, so that it is ordinary rotation.
    model.ropes = vec![Rope::read(&fields.text, defaults)?];
    model.attention.iter_mut().for_each(|a| a.gated = true);

    let period = fields.positive_or("full_attention_interval", Some(4))?;
    let rule = |layer: usize| match (layer + 1).is_multiple_of(period) {
        true => Kind::Attention,
        false => Kind::DeltaNet,
    };
    let named = |name: &str| match name {
        "full_attention" | "attention" => Some(Kind::Attention),
        "linear_attention" | "mamba" => Some(Kind::DeltaNet),
        _ => None,
    };
    let supported = "full_attention, linear_attention";
    let kinds = fields.layer_types(model.layers(), rule, named, supported)?;
    let delta_net = delta_net(fields)?;
    let is_by_layer = fields.text.get(WIDTHS_KEY).is_some();
    for (layer, kind) in kinds.into_iter().enumerate() {
        if kind == Kind::Attention {
            continue;
        }
        let widths = &mut model.widths[layer];
        if is_by_layer && widths.heads + widths.kv_heads > 0 {
            return Err(invalid(
                WIDTHS_KEY,
                format!(
                    "{} query heads for layer {layer}, which is linear_attention and has none",
                    widths.heads
                ),
            ));
        }
        (widths.heads, widths.kv_heads) = (0, 0);
        model.delta_nets[layer] = Some(delta_net);
    }
    Ok(())
}

fn delta_net(fields: &Fields) -> Result<DeltaNetConfig> {
    let head_dim = |field| match fields.positive_or(field, Some(128))? {
        width if width <= WIDEST => Ok(width),
        width => Err(invalid(
            field,
            format!("{width}, but at most {WIDEST} is possible"),
        )),
    };
    let delta_net = DeltaNetConfig {
        key_heads: fields.positive_or("linear_num_key_heads", Some(16))?,
        value_heads: fields.positive_or("linear_num_value_heads", Some(32))?,
        key_dim: head_dim("linear_key_head_dim")?,
        value_dim: head_dim("linear_value_head_dim")?,
        kernel: fields.positive_or("linear_conv_kernel_dim", Some(4))?,
    };
    if !delta_net.value_heads.is_multiple_of(delta_net.key_heads) {
        return Err(invalid(
            "linear_num_value_heads",
            format!(
                "{} value heads cannot share {} key heads",
                delta_net.value_heads, delta_net.key_heads
            ),
        ));
    }
    width("linear_num_value_heads", delta_net.values())?;
    width("linear_num_key_heads", delta_net.keys())?;
    Ok(delta_net)
}
