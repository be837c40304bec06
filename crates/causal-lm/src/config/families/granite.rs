//! Granite 3 and the dense models of Granite 4: Llama with factors on embeddings, attention logits, residuals and logits.

use super::llama::biases;
use super::{ATTENTION_BIAS, DEFAULTS, Family, MLP_BIAS, Stock, stock};
use crate::config::fields::Fields;
use crate::config::{Biases, ModelConfig};
use crate::names;
use crate::{Error, Result};

pub(super) const GRANITE: Family = Family {
    model_type: "granite",
    names: &names::LLAMA,
    stock: Stock {
        attention_bias: ATTENTION_BIAS,
        mlp_bias: MLP_BIAS,
        ..stock("GraniteForCausalLM")
    },
    defaults: DEFAULTS,
    read: |fields, model| {
        model.biases = biases(fields)?;
        model.ropes = fields.rope(model, 1e4)?;
        factors(fields, model)
    },
};

pub(super) const HYBRID: Family = Family {
    model_type: "granitemoehybrid",
    names: &names::GRANITE_HYBRID,
    stock: Stock {
        neurons: "shared_intermediate_size",
        attention_bias: ATTENTION_BIAS,
        ..stock("GraniteMoeHybridForCausalLM")
    },
    defaults: DEFAULTS,
    read: read_hybrid,
};

pub(super) fn factors(fields: &Fields, model: &mut ModelConfig) -> Result<()> {
    let factor = |field| fields.number_or(field, 1.0);
    model.embedding_scale = factor("embedding_multiplier")?;
    model.residual_scale = factor("residual_multiplier")?;
    model.logit_scale = 1.0 / factor("logits_scaling")?;
    let scale = factor("attention_multiplier")?;
    model.attention.iter_mut().for_each(|a| a.scale = scale);
    Ok(())
}

fn read_hybrid(fields: &Fields, model: &mut ModelConfig) -> Result<()> {
    let experts = fields.text.opt_usize("num_local_experts")?.unwrap_or(8);
    if experts > 0 {
        return Err(Error::UnsupportedOption {
            field: "num_local_experts",
            value: experts.to_string(),
            supported: "0: the dense models of this architecture",
        });
    }
    // Refuses layers of other kinds than attention.
    fields.kinds(model.layers(), |_| crate::config::fields::Kind::Full)?;
    let attention = fields.flag_or("attention_bias", false)?;
    model.biases = Biases {
        qkv: attention,
        o: attention,
        mlp: false,
    };
    match fields.text.opt_str("position_embedding_type")? {
        Some("rope") => model.ropes = fields.rope(model, 1e4)?,
        None | Some("nope") => model.attention.iter_mut().for_each(|a| a.rotation = None),
        Some(other) => {
            return Err(Error::UnsupportedOption {
                field: "position_embedding_type",
                value: other.into(),
                supported: "rope, nope",
            });
        }
    }
    factors(fields, model)
}
