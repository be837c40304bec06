//! Ministral 3: Llama with YaRN and queries that grow with their position.

use super::{DEFAULTS, Defaults, Family, Sizes, stock};
use crate::Result;
use crate::config::ModelConfig;
use crate::config::fields::Fields;
use crate::names;
use crate::rope::{self, Rope};
use serde_json::json;

pub(super) const MINISTRAL3: Family = Family {
    model_type: "ministral3",
    names: &names::LLAMA,
    stock: stock("Ministral3ForCausalLM"),
    defaults: Defaults {
        eps: ("rms_norm_eps", 1e-5),
        heads: Some(32),
        kv_heads: Some(8),
        head_dim: Some(128),
        vocab: Some(131_072),
        sizes: Some(Sizes {
            hidden: 4096,
            layers: 34,
            neurons: 14_336,
            positions: 262_144,
        }),
        ..DEFAULTS
    },
    read,
};

fn read(fields: &Fields, model: &mut ModelConfig) -> Result<()> {
    let window = fields.window(None)?;
    model
        .attention
        .iter_mut()
        .for_each(|a| a.sliding_window = window);
    let mut config = fields.text.clone();
    if config.get("rope_parameters").is_none() && config.get("rope_scaling").is_none() {
        config.set(
            "rope_parameters",
            json!({"rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 16384, "beta_fast": 32.0,
                "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1}),
        );
    }
    let defaults = fields.rope_defaults(model, 1e4);
    model.ropes = vec![Rope::read(&config, defaults)?];
    model.query_scale = Some(rope::query_scale(&config, model.max_positions)?);
    Ok(())
}
