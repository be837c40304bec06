//! Qwen2 and Qwen2.5: biases on q, k and v; Qwen3: norms of the heads of q and k.

use super::{ATTENTION_BIAS, DEFAULTS, Defaults, Family, Stock, like_llama, stock};
use crate::Result;
use crate::config::fields::{Fields, Kind};
use crate::config::{Biases, ModelConfig, QkNorm};

pub(super) const QWEN2: Family = like_llama("qwen2", stock("Qwen2ForCausalLM"), read2);
pub(super) const QWEN3: Family = Family {
    defaults: Defaults {
        head_dim: Some(128),
        ..DEFAULTS
    },
    ..like_llama("qwen3", QWEN3_STOCK, read3)
};

/// Its bias switch covers q, k, v and o, and there is none for the MLP.
const QWEN3_STOCK: Stock = Stock {
    attention_bias: ATTENTION_BIAS,
    ..stock("Qwen3ForCausalLM")
};

fn read2(fields: &Fields, model: &mut ModelConfig) -> Result<()> {
    model.biases.qkv = true;
    windows(fields, model)?;
    model.ropes = fields.rope(model, 1e4)?;
    Ok(())
}

fn read3(fields: &Fields, model: &mut ModelConfig) -> Result<()> {
    let bias = fields.flag_or("attention_bias", false)?;
    model.biases = Biases {
        qkv: bias,
        o: bias,
        mlp: false,
    };
    model.qk_norm = QkNorm::Heads;
    windows(fields, model)?;
    model.ropes = fields.rope(model, 1e4)?;
    Ok(())
}

/// Sliding windows only when `use_sliding_window` is set, and then on the layers that `layer_types` or
/// `max_window_layers` say.
fn windows(fields: &Fields, model: &mut ModelConfig) -> Result<()> {
    if !fields.flag_or("use_sliding_window", false)? {
        return Ok(());
    }
    let window = fields.window(Some(4096))?;
    let full = fields.text.opt_usize("max_window_layers")?.unwrap_or(28);
    let rule = |layer| {
        if layer >= full {
            Kind::Sliding
        } else {
            Kind::Full
        }
    };
    let kinds = fields.kinds(model.layers(), rule)?;
    for (attention, kind) in model.attention.iter_mut().zip(kinds) {
        attention.sliding_window = window.filter(|_| kind == Kind::Sliding);
    }
    Ok(())
}
