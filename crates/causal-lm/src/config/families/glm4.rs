//! GLM-4: norms before and after both halves, half of each head rotated in neighbouring pairs, gate and up stacked.

use super::{DEFAULTS, Defaults, Family, stock};
use crate::Result;
use crate::config::ModelConfig;
use crate::config::fields::Fields;
use crate::names;
use crate::rope::{self, Pairs, Rope};

pub(super) const GLM4: Family = Family {
    model_type: "glm4",
    names: &names::GLM4,
    stock: stock("Glm4ForCausalLM"),
    defaults: Defaults {
        eps: ("rms_norm_eps", 1.5625e-7),
        heads: Some(32),
        kv_heads: Some(2),
        head_dim: Some(128),
        ..DEFAULTS
    },
    read,
};

fn read(fields: &Fields, model: &mut ModelConfig) -> Result<()> {
    model.biases.qkv = fields.flag_or("attention_bias", true)?;
    let defaults = rope::Defaults {
        partial: Some(0.5),
        pairs: Pairs::Neighbours,
        ..fields.rope_defaults(model, 1e4)
    };
    model.ropes = vec![Rope::read(&fields.text, defaults)?];
    Ok(())
}
