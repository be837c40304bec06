//! The dense text part of Gemma 4: heads of two widths, values that are keys on full layers, rotation of a part of each
//! head, and a stored factor on the output of every block.

use super::{ATTENTION_BIAS, Activation, DEFAULTS, Defaults, Family, Sizes, Stock, stock};
use crate::config::fields::{Fields, Kind, width};
use crate::config::{Biases, ModelConfig, QkNorm, WIDTHS_KEY, invalid};
use crate::names;
use crate::rope::{self, Rope};
use crate::{Error, Result};
use serde_json::Value;

const STOCK: Stock = Stock {
    attention_bias: ATTENTION_BIAS,
    ..stock("Gemma4ForCausalLM")
};

const SIZES: Sizes = Sizes {
    hidden: 2304,
    layers: 30,
    neurons: 9216,
    positions: 131_072,
};

const GEMMA4_DEFAULTS: Defaults = Defaults {
    heads: Some(8),
    kv_heads: Some(4),
    head_dim: Some(256),
    vocab: Some(262_144),
    sizes: Some(SIZES),
    activation: ("hidden_activation", Activation::GeluTanh),
    tied: true,
    ..DEFAULTS
};

pub(super) const GEMMA4: Family = Family {
    model_type: "gemma4_text",
    names: &names::GEMMA,
    stock: STOCK,
    defaults: GEMMA4_DEFAULTS,
    read: |fields, model| read(fields, model, 512),
};

pub(super) const UNIFIED: Family = Family {
    model_type: "gemma4_unified_text",
    names: &names::GEMMA,
    stock: Stock {
        class: "Gemma4UnifiedForCausalLM",
        ..STOCK
    },
    defaults: Defaults {
        sizes: Some(Sizes {
            positions: 262_144,
            ..SIZES
        }),
        ..GEMMA4_DEFAULTS
    },
    read: |fields, model| read(fields, model, 1024),
};

fn read(fields: &Fields, model: &mut ModelConfig, default_window: usize) -> Result<()> {
    refuse_other_sizes(fields)?;
    let bias = fields.flag_or("attention_bias", false)?;
    model.biases = Biases {
        qkv: bias,
        o: bias,
        mlp: false,
    };
    model.embedding_scale = (model.hidden as f64).sqrt();
    model.logit_softcap = fields.text.opt_f64("final_logit_softcapping")?;
    (model.qk_norm, model.v_norm, model.layer_scalar) = (QkNorm::Heads, true, true);

    let layers = model.layers();
    let mut kinds = fields.kinds(layers, |layer| match (layer + 1).is_multiple_of(6) {
        true => Kind::Full,
        false => Kind::Sliding,
    })?;
    // The last layer is full whatever the list says.
    if let Some(last) = kinds.last_mut() {
        *last = Kind::Full;
    }
    let window = fields.window(Some(default_window))?;
    let value_is_key = fields.flag_or("attention_k_eq_v", false)?;
    let global_dim = fields.text.opt_usize("global_head_dim")?.unwrap_or(512);
    width("global_head_dim", global_dim)?;
    let global_kv = fields.text.opt_usize("num_global_key_value_heads")?;
    let pruned = fields.text.get(WIDTHS_KEY).is_some();
    // Beside fields by layer those of all full layers are not read.
    let by_layer = fields.text.raw().contains_key("per_layer_config");
    for (layer, &kind) in kinds.iter().enumerate() {
        let own = own_fields(fields, layer)?;
        let attention = &mut model.attention[layer];
        attention.scale = 1.0;
        attention.sliding_window = window.filter(|_| kind == Kind::Sliding);
        if kind == Kind::Full {
            attention.value_is_key = value_is_key;
        }
        let is_global = kind == Kind::Full && !by_layer;
        if let Some(head_dim) = own.head_dim.or(is_global.then_some(global_dim)) {
            attention.head_dim = head_dim;
        }
        let global_kv = global_kv.filter(|_| is_global && value_is_key);
        if let Some(kv_heads) = own.kv_heads.or(global_kv).filter(|_| !pruned) {
            model.widths[layer].kv_heads = kv_heads;
        }
    }
    let dim_of = |kind: Kind| {
        let layer = kinds.iter().position(|k| *k == kind);
        layer.map(|layer| model.attention[layer].head_dim)
    };
    let full = rope::Defaults {
        head_dim: dim_of(Kind::Full).unwrap_or(global_dim),
        ..fields.rope_defaults(model, 1e6)
    };
    let sliding = rope::Defaults {
        head_dim: dim_of(Kind::Sliding).unwrap_or(full.head_dim),
        ..fields.rope_defaults(model, 1e4)
    };
    let of_full = Rope::read_new_kind(&fields.text, Kind::Full.name(), full, || {
        Rope::proportional(full, 0.25)
    })?;
    let of_sliding = Rope::read_new_kind(&fields.text, Kind::Sliding.name(), sliding, || {
        Rope::plain(sliding)
    })?;
    fields.rotate(model, &kinds, [of_full, of_sliding]);
    Ok(())
}

/// What `per_layer_config` says of a layer.
struct Own {
    head_dim: Option<usize>,
    kv_heads: Option<usize>,
}

fn own_fields(fields: &Fields, layer: usize) -> Result<Own> {
    let all = fields.text.opt_section("per_layer_config")?;
    let own = all
        .map(|all| all.opt_section(&layer.to_string()))
        .transpose()?;
    let Some(own) = own.flatten() else {
        return Ok(Own {
            head_dim: None,
            kv_heads: None,
        });
    };
    let known = ["head_dim", "num_key_value_heads"];
    if let Some(other) = own.raw().keys().find(|key| !known.contains(&key.as_str())) {
        return Err(invalid(
            "per_layer_config",
            format!("layer {layer} has a field {other} of its own, which is not supported"),
        ));
    }
    let bounded = |field: &str| -> Result<Option<usize>> {
        let found = own.opt_usize(field)?;
        found
            .map(|found| width("per_layer_config", found))
            .transpose()
    };
    Ok(Own {
        head_dim: bounded("head_dim")?,
        kv_heads: bounded("num_key_value_heads")?,
    })
}

/// The small models embed tokens once more in every layer and share keys and values; the largest has experts.
fn refuse_other_sizes(fields: &Fields) -> Result<()> {
    for (field, supported) in [
        ("enable_moe_block", "false: dense models"),
        ("hidden_size_per_layer_input", "0: no embeddings per layer"),
        (
            "num_kv_shared_layers",
            "0: every layer has its own keys and values",
        ),
        ("use_double_wide_mlp", "false"),
    ] {
        let off = |value: &&Value| matches!(value, Value::Bool(false)) || value.as_u64() == Some(0);
        if let Some(value) = fields.text.get(field).filter(|value| !off(value)) {
            return Err(Error::UnsupportedOption {
                field,
                value: value.to_string(),
                supported,
            });
        }
    }
    Ok(())
}
