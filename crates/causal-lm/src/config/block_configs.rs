//! Nemotron-NAS (DeciLM): a Llama whose `block_configs` give each layer its widths.

use super::{WIDTHS_KEY, invalid};
use crate::{Error, Result};
use serde_json::json;
use tensor_io::Config;

/// `model_type` of the format.
pub(super) const MODEL_TYPE: &str = "nemotron-nas";
/// What `ffn_mult` is rounded up to.
const MULTIPLE: usize = 256;

/// The config of a Llama with these widths by layer; any other config as it is.
pub(super) fn as_llama(config: &Config) -> Result<Config> {
    let mut llama = config.clone();
    let is_of_the_format = config.opt_str("model_type")? == Some(MODEL_TYPE);
    let Some(blocks) = config.get("block_configs").filter(|_| is_of_the_format) else {
        return Ok(llama);
    };
    let blocks = blocks
        .as_array()
        .ok_or_else(|| wrong("expected a list with an object for each layer".into()))?;
    let heads = config.usize("num_attention_heads")?;
    let hidden = config.usize("hidden_size")?;
    let (mut kv_heads, mut neurons) = (Vec::new(), Vec::new());
    for (layer, block) in blocks.iter().enumerate() {
        for part in ["attention", "ffn"] {
            for field in ["no_op", "replace_with_linear"] {
                if block[part][field].as_bool() == Some(true) {
                    return Err(Error::UnsupportedOption {
                        field: "block_configs",
                        value: format!("layer {layer}: {part}.{field}"),
                        supported: "layers with attention and an MLP",
                    });
                }
            }
        }
        let group = block["attention"]["n_heads_in_group"].as_u64();
        let group = group.and_then(|group| usize::try_from(group).ok());
        let group = group.filter(|&group| group > 0 && heads.is_multiple_of(group));
        let group = group.ok_or_else(|| {
            wrong(format!(
                "layer {layer}: attention.n_heads_in_group must divide {heads} heads"
            ))
        })?;
        kv_heads.push(heads / group);
        let ffn = &block["ffn"];
        let width = match (ffn["ffn_mult"].as_f64(), ffn["intermediate_size"].as_u64()) {
            (Some(multiplier), _) => width(multiplier, hidden),
            (None, Some(width)) => usize::try_from(width).ok(),
            (None, None) => None,
        };
        neurons.push(width.ok_or_else(|| {
            wrong(format!(
                "layer {layer}: expected ffn.ffn_mult or ffn.intermediate_size"
            ))
        })?);
    }
    llama.set("model_type", "llama");
    llama.set("architectures", json!(["LlamaForCausalLM"]));
    llama.set(
        "num_key_value_heads",
        kv_heads.iter().max().copied().unwrap_or(heads),
    );
    llama.set(
        "intermediate_size",
        neurons.iter().max().copied().unwrap_or(0),
    );
    llama.set(
        WIDTHS_KEY,
        json!({
            "num_attention_heads": vec![heads; blocks.len()],
            "num_key_value_heads": kv_heads,
            "intermediate_size": neurons,
        }),
    );
    for key in ["block_configs", "auto_map"] {
        llama.remove(key);
    }
    Ok(llama)
}

/// Two thirds of `multiplier` times the channels, rounded down and then up to a multiple of 256, as the published class does.
fn width(multiplier: f64, hidden: usize) -> Option<usize> {
    let width = 2.0 * multiplier * hidden as f64 / 3.0;
    // Anything larger is refused by the limits on widths.
    (0.0..1e9)
        .contains(&width)
        .then(|| (width as usize).next_multiple_of(MULTIPLE))
}

fn wrong(reason: String) -> Error {
    invalid("block_configs", reason)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ModelConfig;
    use serde_json::Value;

    fn config(blocks: Value) -> Config {
        let fields = json!({
            "model_type": MODEL_TYPE, "hidden_size": 512, "num_hidden_layers": 2, "num_attention_heads": 8,
            "vocab_size": 40, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "block_configs": blocks,
        });
        Config::new(fields.as_object().unwrap().clone())
    }

    fn block(group: usize, ffn: Value) -> Value {
        json!({"attention": {"n_heads_in_group": group, "no_op": false, "replace_with_linear": false}, "ffn": ffn})
    }

    #[test]
    fn widths_are_those_that_the_published_class_computes() {
        // ⌊2 · 2.625 · 512 / 3⌋ = 896 and ⌊2 · 1.3125 · 512 / 3⌋ = 448, up to multiples of 256.
        let blocks = json!([
            block(4, json!({"ffn_mult": 2.625, "no_op": false})),
            block(8, json!({"ffn_mult": 1.3125})),
        ]);
        let model = ModelConfig::new(&config(blocks)).unwrap();
        let widths: Vec<_> = model
            .widths
            .iter()
            .map(|w| (w.heads, w.kv_heads, w.neurons))
            .collect();
        assert_eq!(widths, [(8, 2, 1024), (8, 1, 512)]);
        let blocks = json!([
            block(2, json!({"intermediate_size": 77})),
            block(2, json!({"intermediate_size": 78})),
        ]);
        let model = ModelConfig::new(&config(blocks)).unwrap();
        assert_eq!((model.widths[0].kv_heads, model.widths[1].neurons), (4, 78));
    }

    #[test]
    fn blocks_without_a_half_or_a_width_are_refused_by_their_layer() {
        let whole = block(2, json!({"intermediate_size": 77}));
        for (other, part) in [
            (
                block(3, json!({"intermediate_size": 77})),
                "n_heads_in_group",
            ),
            (block(2, json!({})), "ffn_mult"),
            (block(2, json!({"no_op": true})), "ffn.no_op"),
            (block(2, json!({"ffn_mult": 1e300})), "ffn_mult"),
        ] {
            let error = ModelConfig::new(&config(json!([whole, other]))).unwrap_err();
            let error = error.to_string();
            assert!(error.contains("layer 1") && error.contains(part), "{error}");
        }
    }
}
