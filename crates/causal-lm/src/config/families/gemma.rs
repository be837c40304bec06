//! Gemma 2 and the text part of Gemma 3: norms before and after both halves whose weights are stored less 1, scaled
//! embeddings, GELU; Gemma 2 caps logits, Gemma 3 normalises heads and rotates sliding layers by a base of their own.

use super::{
    ATTENTION_BIAS, Activation, DEFAULTS, Defaults, Family, Sizes, Stock, StockHeads, stock,
};
use crate::Result;
use crate::config::fields::{Fields, Kind};
use crate::config::{Biases, ModelConfig, QkNorm};
use crate::names;

const GEMMA_DEFAULTS: Defaults = Defaults {
    heads: Some(8),
    kv_heads: Some(4),
    head_dim: Some(256),
    activation: ("hidden_activation", Activation::GeluTanh),
    tied: true,
    ..DEFAULTS
};

const fn gemma_stock(class: &'static str) -> Stock {
    Stock {
        attention_bias: ATTENTION_BIAS,
        heads: StockHeads::Divisors,
        ..stock(class)
    }
}

pub(super) const GEMMA2: Family = Family {
    model_type: "gemma2",
    names: &names::GEMMA,
    stock: gemma_stock("Gemma2ForCausalLM"),
    defaults: Defaults {
        vocab: Some(256_000),
        ..GEMMA_DEFAULTS
    },
    read: read2,
};

pub(super) const GEMMA3: Family = Family {
    model_type: "gemma3_text",
    names: &names::GEMMA,
    stock: gemma_stock("Gemma3ForCausalLM"),
    defaults: Defaults {
        vocab: Some(262_208),
        sizes: Some(Sizes {
            hidden: 2304,
            layers: 26,
            neurons: 9216,
            positions: 131_072,
        }),
        ..GEMMA_DEFAULTS
    },
    read: read3,
};

fn common(fields: &Fields, model: &mut ModelConfig) -> Result<()> {
    let bias = fields.flag_or("attention_bias", false)?;
    model.biases = Biases {
        qkv: bias,
        o: bias,
        mlp: false,
    };
    model.norm.offset = 1.0;
    model.embedding_scale = (model.hidden as f64).sqrt();
    let scale = fields.number_or("query_pre_attn_scalar", 256.0)?.powf(-0.5);
    model.attention.iter_mut().for_each(|a| a.scale = scale);
    Ok(())
}

fn read2(fields: &Fields, model: &mut ModelConfig) -> Result<()> {
    common(fields, model)?;
    let cap = |field, default| -> Result<Option<f64>> {
        match fields.text.raw().get(field) {
            None => Ok(Some(default)),
            Some(_) => Ok(fields.text.opt_f64(field)?),
        }
    };
    let softcap = cap("attn_logit_softcapping", 50.0)?;
    model.logit_softcap = cap("final_logit_softcapping", 30.0)?;
    let window = fields.window(Some(4096))?;
    let rule = |layer: usize| match layer.is_multiple_of(2) {
        true => Kind::Sliding,
        false => Kind::Full,
    };
    let kinds = fields.kinds(model.layers(), rule)?;
    for (attention, kind) in model.attention.iter_mut().zip(kinds) {
        attention.sliding_window = window.filter(|_| kind == Kind::Sliding);
        attention.softcap = softcap;
    }
    model.ropes = fields.rope(model, 1e4)?;
    Ok(())
}

fn read3(fields: &Fields, model: &mut ModelConfig) -> Result<()> {
    common(fields, model)?;
    model.qk_norm = QkNorm::Heads;
    // The reference accepts a cap on attention logits and never applies it.
    model.logit_softcap = fields.text.opt_f64("final_logit_softcapping")?;
    let window = fields.window(Some(4096))?;
    let pattern = fields.text.opt_usize("sliding_window_pattern")?;
    let pattern = pattern.or(fields.text.opt_usize("_sliding_window_pattern")?);
    let pattern = pattern.unwrap_or(6).max(1);
    let defaults = [1e6, 1e4].map(|theta| fields.rope_defaults(model, theta));
    let local = Some("rope_local_base_freq");
    fields.alternate(model, (window, pattern), defaults, local)
}
