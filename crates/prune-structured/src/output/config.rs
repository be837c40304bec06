//! The config of a pruned checkpoint, and the loader beside it.

use super::form::{Form, Loading, NewBiases};
use crate::plan::Plan;
use causal_lm::config::WIDTHS_KEY;
use causal_lm::{Decoder, Widths};
use serde_json::{Map, Value, json};
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
    let whole = decoder.checkpoint().config();
    if plan.is_identity(decoder) {
        return (whole.clone(), vec![]);
    }
    let model = decoder.config();
    let biases = NewBiases::of(decoder, plan);
    let widths = match form {
        Form::Sliced => plan.widths(),
        Form::Masked => model.widths.clone(),
    };
    let loading = Loading::of(decoder, plan, form);
    let text = || Config::new(text_fields(whole, model.nested));
    match loading {
        Loading::Stock => {
            let mut config = text();
            let slots = [
                (biases.attention, model.stock.attention_bias),
                (biases.mlp, model.stock.mlp_bias),
            ];
            for (_, field) in slots.into_iter().filter(|(new, _)| *new) {
                if let Some(field) = field {
                    config.set(field, true);
                }
            }
            if form == Form::Sliced {
                let heads = |w: &Widths| (w.heads, w.kv_heads);
                let dense = model.widths.iter().map(heads);
                if !widths.iter().map(heads).eq(dense) {
                    config.set("num_attention_heads", widths[0].heads);
                    config.set("num_key_value_heads", widths[0].kv_heads);
                    config.set("head_dim", model.head_dim(0));
                }
                config.set(model.stock.neurons, widths[0].neurons);
                config.remove(WIDTHS_KEY);
            }
            match model.nested {
                false => (config, vec![]),
                true => {
                    let mut whole = whole.clone();
                    whole.set("text_config", config.raw().clone());
                    (whole, vec![])
                }
            }
        }
        Loading::PerLayer => {
            // The scalar fields keep the dense values: they satisfy every reader's own checks, and
            // a reader that ignores the lists stops at the first shape instead of guessing.
            let mut config = text();
            if model
                .attention
                .iter()
                .all(|a| a.head_dim == model.head_dim(0))
            {
                config.set("head_dim", model.head_dim(0));
            }
            config.set(
                WIDTHS_KEY,
                json!({
                    "num_attention_heads": widths.iter().map(|w| w.heads).collect::<Vec<_>>(),
                    "num_key_value_heads": widths.iter().map(|w| w.kv_heads).collect::<Vec<_>>(),
                    "intermediate_size": widths.iter().map(|w| w.neurons).collect::<Vec<_>>(),
                    "o_proj_bias": biases.attention || model.biases.o,
                    "down_proj_bias": biases.mlp || model.biases.mlp,
                }),
            );
            let module = LOADER_FILE.trim_end_matches(".py");
            config.set(
                "auto_map",
                json!({ "AutoModelForCausalLM": format!("{module}.PrunedForCausalLM") }),
            );
            let loader = LOADER.replace("BASE", model.stock.class);
            (config, vec![(LOADER_FILE, loader)])
        }
    }
}

/// The decoder's own fields.
fn text_fields(whole: &Config, nested: bool) -> Map<String, Value> {
    let text = whole.get("text_config").and_then(Value::as_object);
    let Some(text) = text.filter(|_| nested) else {
        return whole.raw().clone();
    };
    let mut fields = text.clone();
    // The reference reads this one from the whole config alone.
    if let Some(tied) = whole.get("tie_word_embeddings") {
        fields.insert("tie_word_embeddings".into(), tied.clone());
    }
    fields
}
