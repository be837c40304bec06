//! Mistral: Llama with an optional sliding window.

use super::{Family, like_llama, stock};
use crate::Result;
use crate::config::ModelConfig;
use crate::config::fields::Fields;

pub(super) const MISTRAL: Family = like_llama("mistral", stock("MistralForCausalLM"), read);

fn read(fields: &Fields, model: &mut ModelConfig) -> Result<()> {
    let window = fields.window(Some(4096))?;
    model
        .attention
        .iter_mut()
        .for_each(|a| a.sliding_window = window);
    model.ropes = fields.rope(model, 1e4)?;
    Ok(())
}
