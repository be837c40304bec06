//! The config of a pruned checkpoint, and the loader beside it.

use super::form::{Form, Loading, NewBiases};
use crate::plan::Plan;
use causal_lm::config::WIDTHS_KEY;
use causal_lm::{Decoder, ModelType};
use serde_json::json;
use tensor_io::Config;

/// File name of the Python loader that goes into folders which stock modules cannot open.
pub const LOADER_FILE: &str = "modeling_pruned.py";
/// The loader, with `BASE` standing for the stock class it extends.
const LOADER: &str = include_str!("modeling_pruned.py");

/// The config of the output, and the files that it needs beside it.
pub(crate) fn pruned(
    decoder: &Decoder<'_>,
    plan: &Plan,
    form: Form,
) -> (Config, Vec<(&'static str, String)>) {
    let mut config = decoder.checkpoint().config().clone();
    if plan.is_identity(decoder) {
        return (config, vec![]);
    }
    let biases = NewBiases::of(decoder, plan);
    let widths = match form {
        Form::Sliced => plan.widths(),
        Form::Masked => decoder.config().widths.clone(),
    };
    match Loading::of(decoder, plan, form) {
        Loading::Stock => {
            for (field, new) in [
                ("attention_bias", biases.attention),
                ("mlp_bias", biases.mlp),
            ] {
                if new {
                    config.set(field, true);
                }
            }
            if form == Form::Sliced {
                config.set("num_attention_heads", widths[0].heads);
                config.set("num_key_value_heads", widths[0].kv_heads);
                config.set("head_dim", decoder.config().head_dim);
                config.set("intermediate_size", widths[0].neurons);
                config.remove(WIDTHS_KEY);
            }
            (config, vec![])
        }
        Loading::PerLayer => {
            // The scalar fields keep the dense values: they satisfy every reader's own checks, and
            // a reader that ignores the lists stops at the first shape instead of guessing.
            config.set("head_dim", decoder.config().head_dim);
            config.set(
                WIDTHS_KEY,
                json!({
                    "num_attention_heads": widths.iter().map(|w| w.heads).collect::<Vec<_>>(),
                    "num_key_value_heads": widths.iter().map(|w| w.kv_heads).collect::<Vec<_>>(),
                    "intermediate_size": widths.iter().map(|w| w.neurons).collect::<Vec<_>>(),
                    "o_proj_bias": biases.attention || decoder.config().biases.o,
                    "down_proj_bias": biases.mlp || decoder.config().biases.mlp,
                }),
            );
            let module = LOADER_FILE.trim_end_matches(".py");
            config.set(
                "auto_map",
                json!({ "AutoModelForCausalLM": format!("{module}.PrunedForCausalLM") }),
            );
            let base = match decoder.config().model_type {
                ModelType::Llama => "LlamaForCausalLM",
                ModelType::Mistral => "MistralForCausalLM",
                ModelType::Qwen2 => "Qwen2ForCausalLM",
                ModelType::Qwen3 => "Qwen3ForCausalLM",
            };
            (config, vec![(LOADER_FILE, LOADER.replace("BASE", base))])
        }
    }
}
