//! One file for each architecture, or for a few that share most switches.

mod gemma;
mod gemma4;
mod glm4;
mod gpt_neox;
mod granite;
mod llama;
mod ministral3;
mod mistral;
mod mixture;
mod olmo2;
mod phi3;
mod qwen;
mod qwen3_5;
mod smollm3;

use super::fields::Fields;
use super::{Activation, ModelConfig, Stock, StockHeads};
use crate::Result;
use crate::names::{LLAMA, Table};

/// All supported architectures.
pub(super) const FAMILIES: &[Family] = &[
    llama::LLAMA,
    mistral::MISTRAL,
    qwen::QWEN2,
    qwen::QWEN3,
    qwen3_5::QWEN3_5,
    gemma::GEMMA2,
    gemma::GEMMA3,
    gemma4::GEMMA4,
    gemma4::UNIFIED,
    phi3::PHI3,
    olmo2::OLMO2,
    olmo2::OLMO3,
    smollm3::SMOLLM3,
    granite::GRANITE,
    granite::HYBRID,
    gpt_neox::GPT_NEOX,
    ministral3::MINISTRAL3,
    glm4::GLM4,
    mixture::MIXTRAL,
    mixture::QWEN2_MOE,
    mixture::QWEN3_MOE,
    mixture::OLMOE,
    mixture::GRANITE,
];

/// One architecture.
pub(crate) struct Family {
    pub(super) model_type: &'static str,
    pub(super) names: &'static Table,
    pub(super) stock: Stock,
    pub(super) defaults: Defaults,
    /// Sets what differs from Llama.
    pub(super) read: fn(&Fields, &mut ModelConfig) -> Result<()>,
}

/// What files may leave out because it is the class's own default.
pub(super) struct Defaults {
    /// Field and value of the norms' epsilon.
    pub(super) eps: (&'static str, f64),
    pub(super) heads: Option<usize>,
    /// `None`: as many as query heads.
    pub(super) kv_heads: Option<usize>,
    /// `None`: the hidden size divided by the heads.
    pub(super) head_dim: Option<usize>,
    pub(super) vocab: Option<usize>,
    /// Of families that stand in folders of several modalities, whose configs leave out what their class has anyway.
    pub(super) sizes: Option<Sizes>,
    /// Field and value of the activation.
    pub(super) activation: (&'static str, Activation),
    pub(super) tied: bool,
}

/// Sizes that a class has when a config does not state them.
#[derive(Clone, Copy)]
pub(super) struct Sizes {
    pub(super) hidden: usize,
    pub(super) layers: usize,
    pub(super) neurons: usize,
    pub(super) positions: usize,
}

/// Llama's defaults.
const DEFAULTS: Defaults = Defaults {
    eps: ("rms_norm_eps", 1e-6),
    heads: None,
    kv_heads: None,
    head_dim: None,
    vocab: None,
    sizes: None,
    activation: ("hidden_act", Activation::Silu),
    tied: false,
};

/// A class without switches for biases that takes any number of heads.
const fn stock(class: &'static str) -> Stock {
    Stock {
        class,
        neurons: "intermediate_size",
        attention_bias: None,
        mlp_bias: None,
        heads: StockHeads::Any,
        experts: &[],
        expert_width: "intermediate_size",
        extra_blocks: None,
    }
}

/// A family with Llama's names and defaults.
const fn like_llama(
    model_type: &'static str,
    stock: Stock,
    read: fn(&Fields, &mut ModelConfig) -> Result<()>,
) -> Family {
    Family {
        model_type,
        names: &LLAMA,
        stock,
        defaults: DEFAULTS,
        read,
    }
}

/// The field that gives biases to attention.
const ATTENTION_BIAS: Option<&str> = Some("attention_bias");
/// The field that gives biases to the MLP.
const MLP_BIAS: Option<&str> = Some("mlp_bias");

#[cfg(test)]
mod tests {
    use crate::ModelConfig;
    use serde_json::json;
    use tensor_io::Config;

    #[test]
    fn a_decoder_in_a_folder_of_several_modalities_has_the_sizes_of_its_class_where_its_config_is_silent()
     {
        // What the published folders of Gemma 3 4B and Ministral 3 state of their decoders.
        let gemma = json!({
            "model_type": "gemma3", "text_config": {
                "model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34,
                "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
            },
        });
        let ministral = json!({
            "model_type": "mistral3", "text_config": {"model_type": "ministral3", "hidden_size": 3072, "intermediate_size": 9216},
        });
        for (fields, positions, vocab, layers, heads, head_dim) in [
            (gemma, 131_072, 262_208, 34, 8, 256),
            (ministral, 262_144, 131_072, 34, 32, 128),
        ] {
            let config = Config::new(fields.as_object().unwrap().clone());
            let model = ModelConfig::new(&config).unwrap();
            assert_eq!(
                (
                    model.max_positions,
                    model.vocab,
                    model.layers(),
                    model.widths[0].heads,
                    model.head_dim(0)
                ),
                (positions, vocab, layers, heads, head_dim)
            );
        }
        // Of what it is a part of depends its type, and whether its head is the embedding.
        for (whole, text, tied) in [
            ("mistral3", "mistral", true),
            ("gemma3", "gemma3_text", true),
            ("gemma4", "gemma4_text", true),
            ("gemma4_unified", "gemma4_unified_text", true),
            ("qwen3_5", "qwen3_5_text", false),
        ] {
            let fields = json!({
                "model_type": whole, "text_config": {
                    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
                    "head_dim": 16, "num_key_value_heads": 4, "vocab_size": 8, "max_position_embeddings": 64,
                },
            });
            let mut config = Config::new(fields.as_object().unwrap().clone());
            let model = ModelConfig::new(&config).unwrap();
            assert_eq!((model.model_type, model.tied), (text, tied), "{whole}");
            config.set("tie_word_embeddings", !tied);
            assert_eq!(ModelConfig::new(&config).unwrap().tied, !tied, "{whole}");
        }
        // Elsewhere a config that is silent is incomplete.
        let llama = json!({"model_type": "llama", "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1,
            "num_attention_heads": 4, "vocab_size": 8});
        let refused =
            ModelConfig::new(&Config::new(llama.as_object().unwrap().clone())).unwrap_err();
        assert!(
            refused.to_string().contains("max_position_embeddings"),
            "{refused}"
        );
    }
}
