//! LLaMA 1 to 3 and everything published in its layout.

use super::{ATTENTION_BIAS, Family, MLP_BIAS, Stock, StockHeads, like_llama, stock};
use crate::Result;
use crate::config::fields::Fields;
use crate::config::{Biases, ModelConfig};

const STOCK: Stock = Stock {
    attention_bias: ATTENTION_BIAS,
    mlp_bias: MLP_BIAS,
    heads: StockHeads::Divisors,
    ..stock("LlamaForCausalLM")
};

pub(super) const LLAMA: Family = like_llama("llama", STOCK, read);

fn read(fields: &Fields, model: &mut ModelConfig) -> Result<()> {
    model.biases = biases(fields)?;
    model.ropes = fields.rope(model, 1e4)?;
    Ok(())
}

/// One switch for attention, one for the MLP.
pub(super) fn biases(fields: &Fields) -> Result<Biases> {
    let attention = fields.flag_or("attention_bias", false)?;
    Ok(Biases {
        qkv: attention,
        o: attention,
        mlp: fields.flag_or("mlp_bias", false)?,
    })
}
