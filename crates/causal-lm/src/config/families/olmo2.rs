//! OLMo 2 and OLMo 3: norms after both halves and none before, and norms of q and k over all heads together.

use super::{ATTENTION_BIAS, DEFAULTS, Defaults, Family, Stock, stock};
use crate::Result;
use crate::config::fields::Fields;
use crate::config::{Biases, ModelConfig, QkNorm};
use crate::names;

const OLMO_DEFAULTS: Defaults = Defaults {
    eps: ("rms_norm_eps", 1e-5),
    ..DEFAULTS
};

pub(super) const OLMO2: Family = Family {
    model_type: "olmo2",
    names: &names::OLMO2,
    stock: Stock {
        attention_bias: ATTENTION_BIAS,
        ..stock("Olmo2ForCausalLM")
    },
    defaults: OLMO_DEFAULTS,
    read: |fields, model| {
        common(fields, model)?;
        model.ropes = fields.rope(model, 1e4)?;
        Ok(())
    },
};

pub(super) const OLMO3: Family = Family {
    model_type: "olmo3",
    names: &names::OLMO2,
    stock: Stock {
        attention_bias: ATTENTION_BIAS,
        ..stock("Olmo3ForCausalLM")
    },
    defaults: OLMO_DEFAULTS,
    read: read3,
};

fn common(fields: &Fields, model: &mut ModelConfig) -> Result<()> {
    let bias = fields.flag_or("attention_bias", false)?;
    model.biases = Biases {
        qkv: bias,
        o: bias,
        mlp: false,
    };
    model.qk_norm = QkNorm::Projection;
    Ok(())
}

/// OLMo 3: three of four layers slide; scaling is for full layers.
fn read3(fields: &Fields, model: &mut ModelConfig) -> Result<()> {
    common(fields, model)?;
    let window = fields.window(Some(4096))?;
    let defaults = fields.rope_defaults(model, 5e5);
    fields.alternate(model, (window, 4), [defaults, defaults], None)
}
