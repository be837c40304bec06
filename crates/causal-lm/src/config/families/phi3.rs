//! Phi-3, Phi-3.5 and Phi-4: stacked projections, rotation of a part of each head, frequencies for long sequences.

use super::{DEFAULTS, Defaults, Family, StockHeads, stock};
use crate::Result;
use crate::config::ModelConfig;
use crate::config::fields::Fields;
use crate::names;
use crate::rope::{self, Rope};
use serde_json::json;

pub(super) const PHI3: Family = Family {
    model_type: "phi3",
    names: &names::PHI3,
    stock: stock("Phi3ForCausalLM"),
    defaults: Defaults {
        eps: ("rms_norm_eps", 1e-5),
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
    let defaults = rope::Defaults {
        partial: Some(1.0),
        ..fields.rope_defaults(model, 1e4)
    };
    let mut config = fields.text.clone();
    let mut longrope = false;
    if let Some(section) = rope::section(&config)? {
        let rule = section.opt_str("rope_type")?.or(section.opt_str("type")?);
        longrope = matches!(rule, Some("longrope" | "su" | "yarn"));
        // Early revisions call longrope yarn.
        if rule == Some("yarn") && section.get("short_factor").is_some() {
            let mut renamed = section.raw().clone();
            renamed.insert("rope_type".into(), json!("longrope"));
            config.remove("rope_scaling");
            config.set("rope_parameters", renamed);
        }
    }
    if longrope && config.get("original_max_position_embeddings").is_none() {
        config.set("original_max_position_embeddings", 4096);
    }
    if longrope {
        // The class compares the lengths of the factors with the hidden size divided by the heads.
        model.stock.heads = StockHeads::Fixed;
    }
    model.ropes = vec![Rope::read(&config, defaults)?];
    Ok(())
}
