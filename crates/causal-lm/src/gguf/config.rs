//! The config of a GGUF file: its metadata in the fields of `config.json`.

use serde_json::{Map, Value, json};
use tensor_io::Config;
use tensor_io::gguf::{Gguf, Metadata};

use super::{Architecture, content, names};
use crate::config::WIDTHS_KEY;
use crate::{LinearName, Result};

/// Largest number of blocks that is believed: lists of that length are made.
const MAX_LAYERS: usize = 1 << 16;
/// How closely a rule must reproduce the factors of a file to stand for them.
const RULE_TOLERANCE: f64 = 1e-6;

/// The keys of one architecture.
struct Keys<'a> {
    metadata: Metadata<'a>,
    architecture: Architecture,
}

impl Keys<'_> {
    fn key(&self, key: &str) -> String {
        format!("{}.{key}", self.architecture.name())
    }

    fn usize(&self, key: &str) -> Result<usize> {
        Ok(self
            .metadata
            .required(&self.key(key), Metadata::get_usize)?)
    }

    fn opt_usize(&self, key: &str) -> Result<Option<usize>> {
        Ok(self.metadata.get_usize(&self.key(key))?)
    }

    fn opt_f64(&self, key: &str) -> Result<Option<f64>> {
        Ok(self.metadata.get_f64(&self.key(key))?)
    }

    fn opt_layers(&self, key: &str, layers: usize) -> Result<Option<Vec<usize>>> {
        Ok(self.metadata.get_usizes(&self.key(key), layers)?)
    }

    fn layers(&self, key: &str, layers: usize) -> Result<Vec<usize>> {
        let list = |metadata: &Metadata<'_>, key: &str| metadata.get_usizes(key, layers);
        Ok(self.metadata.required(&self.key(key), list)?)
    }

    fn refuse(&self, what: impl Into<String>) -> crate::Error {
        content(&self.metadata, what)
    }
}

/// The config as Hugging Face would have it.
pub(super) fn config(file: &Gguf, architecture: Architecture) -> Result<Config> {
    let keys = Keys {
        metadata: file.metadata(),
        architecture,
    };
    if let Some(experts) = keys.opt_usize("expert_count")?
        && experts > 0
    {
        return Err(keys.refuse(format!("a mixture of {experts} experts is not supported")));
    }
    let hidden = keys.usize("embedding_length")?;
    let layers = keys.usize("block_count")?;
    if layers == 0 || layers > MAX_LAYERS {
        return Err(keys.refuse(format!("{} is {layers}", keys.key("block_count"))));
    }
    let widths = Widths::read(&keys, layers)?;
    let head_dim = head_dim(&keys, hidden, &widths)?;
    let vocab = file.info(names::EMBEDDING)?.shape[0];
    if let Some(stated) = keys.opt_usize("vocab_size")?
        && stated != vocab
    {
        return Err(keys.refuse(format!(
            "{} is {stated}, but {} has {vocab} rows",
            keys.key("vocab_size"),
            names::EMBEDDING
        )));
    }
    let context = keys.usize("context_length")?;
    let eps = keys.key("attention.layer_norm_rms_epsilon");
    let biases = Biases::of(file, layers);
    let model_type = match architecture {
        Architecture::Llama | Architecture::Deci if biases.qkv && !biases.any_o => "qwen2",
        Architecture::Llama | Architecture::Deci => "llama",
        Architecture::Qwen2 => "qwen2",
        Architecture::Qwen3 => "qwen3",
    };
    let mut config = Config::new(Map::new());
    let class = match model_type {
        "qwen2" => "Qwen2ForCausalLM",
        "qwen3" => "Qwen3ForCausalLM",
        _ => "LlamaForCausalLM",
    };
    config.set("architectures", json!([class]));
    config.set("model_type", model_type);
    config.set("hidden_act", "silu");
    config.set("hidden_size", hidden);
    config.set("num_hidden_layers", layers);
    widths.set(&mut config);
    config.set("head_dim", head_dim);
    config.set("vocab_size", vocab);
    config.set("max_position_embeddings", context);
    config.set(
        "rms_norm_eps",
        keys.metadata.required(&eps, Metadata::get_f64)?,
    );
    let theta = keys.opt_f64("rope.freq_base")?.unwrap_or(10_000.0);
    config.set("rope_theta", theta);
    if let Some(rule) = rotation(file, &keys, theta, head_dim, context)? {
        config.set("rope_scaling", rule);
    }
    if model_type != "qwen2" {
        config.set("attention_bias", biases.qkv && biases.o);
    }
    if model_type == "llama" {
        config.set("mlp_bias", biases.mlp);
    }
    config.set("tie_word_embeddings", !file.contains(names::HEAD));
    let token = |key: &str| -> Result<Option<usize>> {
        let found = keys
            .metadata
            .get_usize(&format!("tokenizer.ggml.{key}_token_id"))?;
        // Some writers put the largest number where there is no such token.
        Ok(found.filter(|&id| id < vocab))
    };
    if let Some(bos) = token("bos")? {
        config.set("bos_token_id", bos);
    }
    let mut ends: Vec<usize> = Vec::new();
    for end in [token("eos")?, token("eot")?].into_iter().flatten() {
        if !ends.contains(&end) {
            ends.push(end);
        }
    }
    match ends[..] {
        [] => {}
        [end] => config.set("eos_token_id", end),
        _ => config.set("eos_token_id", ends),
    }
    Ok(config)
}

/// Widths of every layer.
struct Widths {
    heads: Vec<usize>,
    kv_heads: Vec<usize>,
    neurons: Vec<usize>,
}

impl Widths {
    fn read(keys: &Keys<'_>, layers: usize) -> Result<Self> {
        let heads = keys.layers("attention.head_count", layers)?;
        let kv_heads = keys.opt_layers("attention.head_count_kv", layers)?;
        let mut kv_heads = kv_heads.unwrap_or_else(|| heads.clone());
        for (layer, (&heads, kv_heads)) in heads.iter().zip(&mut kv_heads).enumerate() {
            if heads == 0 {
                *kv_heads = 0;
            } else if *kv_heads == 0 {
                return Err(keys.refuse(format!(
                    "layer {layer} has a linear in the place of attention, which is not supported"
                )));
            }
        }
        Ok(Self {
            heads,
            kv_heads,
            neurons: keys.layers("feed_forward_length", layers)?,
        })
    }

    fn set(&self, config: &mut Config) {
        let lists = [&self.heads, &self.kv_heads, &self.neurons];
        let fields = [
            "num_attention_heads",
            "num_key_value_heads",
            "intermediate_size",
        ];
        let uniform = lists
            .iter()
            .all(|list| list[0] > 0 && list.iter().all(|width| *width == list[0]));
        if uniform {
            for (field, list) in fields.into_iter().zip(lists) {
                config.set(field, list[0]);
            }
            return;
        }
        let of = |(field, list): (&str, &Vec<usize>)| (field.to_string(), json!(list));
        let lists: Map<String, Value> = fields.into_iter().zip(lists).map(of).collect();
        config.set(WIDTHS_KEY, Value::Object(lists));
    }
}

fn head_dim(keys: &Keys<'_>, hidden: usize, widths: &Widths) -> Result<usize> {
    let (key, value) = ("attention.key_length", "attention.value_length");
    let first = widths.heads[0];
    let divided = hidden
        .checked_div(first)
        .filter(|_| first > 0 && hidden.is_multiple_of(first));
    let stated = keys.opt_usize(key)?;
    let Some(head_dim) = stated.or(divided).filter(|&width| width > 0) else {
        return Err(keys.refuse(format!(
            "{} is missing, and {hidden} channels do not divide into {first} heads",
            keys.key(key)
        )));
    };
    for key in [value, "rope.dimension_count"] {
        let found = keys.opt_usize(key)?;
        // Without a length of its own, a value is as wide as what the heads divide.
        if let Some(found) = found.filter(|&found| found != head_dim) {
            return Err(keys.refuse(format!(
                "{} is {found}, expected {head_dim}, the width of a head",
                keys.key(key)
            )));
        }
    }
    Ok(head_dim)
}

/// Which linears have biases in the file.
struct Biases {
    /// q, k and v of every layer that has them.
    qkv: bool,
    /// o of every layer.
    o: bool,
    /// o of any layer.
    any_o: bool,
    /// gate, up and down of every layer.
    mlp: bool,
}

impl Biases {
    fn of(file: &Gguf, layers: usize) -> Self {
        let has = |layer: usize, of: LinearName, kind: &str| {
            file.contains(&names::in_block(
                layer,
                &format!("{}.{kind}", names::linear(of)),
            ))
        };
        // A layer without the weight needs no bias, but at least one must have one.
        let all = |of: &[LinearName]| {
            of.iter().all(|&of| {
                let mut with = (0..layers)
                    .filter(|&layer| has(layer, of, "weight"))
                    .peekable();
                with.peek().is_some() && with.all(|layer| has(layer, of, "bias"))
            })
        };
        Self {
            qkv: all(&[LinearName::Q, LinearName::K, LinearName::V]),
            o: all(&[LinearName::O]),
            any_o: (0..layers).any(|layer| has(layer, LinearName::O, "bias")),
            mlp: all(&[LinearName::Gate, LinearName::Up, LinearName::Down]),
        }
    }
}

/// The scaling rule of the rotation, if any: that of the metadata, or the factors of a tensor.
fn rotation(
    file: &Gguf,
    keys: &Keys<'_>,
    theta: f64,
    head_dim: usize,
    context: usize,
) -> Result<Option<Value>> {
    let kind = keys.metadata.get_str(&keys.key("rope.scaling.type"))?;
    let factor = match keys.opt_f64("rope.scaling.factor")? {
        Some(factor) => Some(factor),
        None => keys.opt_f64("rope.scale_linear")?,
    };
    let stated = match (kind, factor) {
        (Some("none"), _) | (None, None) => None,
        (Some("linear") | None, Some(factor)) if factor > 0.0 => {
            (factor != 1.0).then(|| json!({"rope_type": "linear", "factor": factor}))
        }
        (Some("yarn"), Some(factor)) if factor > 0.0 => Some(yarn(keys, factor, context)?),
        (kind, factor) => {
            return Err(keys.refuse(format!(
                "{} {:?} with a factor of {factor:?} is not supported",
                keys.key("rope.scaling.type"),
                kind.unwrap_or_default()
            )));
        }
    };
    if !file.contains(names::ROPE_FACTORS) {
        return Ok(stated);
    }
    if let Some(stated) = stated {
        return Err(keys.refuse(format!(
            "both {} and the rule {stated} scale the rotation",
            names::ROPE_FACTORS
        )));
    }
    file.expect_shape(names::ROPE_FACTORS, &[head_dim / 2])?;
    let factors = file.floats(names::ROPE_FACTORS)?;
    if let Some(factor) = factors.iter().find(|factor| **factor <= 0.0) {
        return Err(keys.refuse(format!(
            "{} holds a factor of {factor}",
            names::ROPE_FACTORS
        )));
    }
    let factors: Vec<f64> = factors.into_iter().map(f64::from).collect();
    if factors.iter().all(|&factor| factor == 1.0) {
        return Ok(None);
    }
    Ok(Some(llama3(&factors, theta, head_dim).unwrap_or_else(
        || {
            // Any factors at all, in the one rule that lists them.
            json!({
                "rope_type": "longrope",
                "short_factor": factors,
                "long_factor": factors,
                "attention_factor": 1.0,
                "original_max_position_embeddings": context,
            })
        },
    )))
}

fn yarn(keys: &Keys<'_>, factor: f64, context: usize) -> Result<Value> {
    for (key, neutral) in [("yarn_ext_factor", 1.0), ("yarn_log_multiplier", 0.0)] {
        let key = format!("rope.scaling.{key}");
        if let Some(found) = keys.opt_f64(&key)?.filter(|&found| found != neutral) {
            return Err(keys.refuse(format!("{} of {found} is not supported", keys.key(&key))));
        }
    }
    let mut attention = 1.0;
    for key in ["attn_factor", "yarn_attn_factor"] {
        attention *= keys.opt_f64(&format!("rope.scaling.{key}"))?.unwrap_or(1.0);
    }
    let original = keys.opt_usize("rope.scaling.original_context_length")?;
    let mut rule = json!({
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": original.unwrap_or(context),
        "attention_factor": attention * (1.0 + 0.1 * factor.max(1.0).ln()),
    });
    for beta in ["beta_fast", "beta_slow"] {
        if let Some(value) = keys.opt_f64(&format!("rope.scaling.yarn_{beta}"))? {
            rule[beta] = json!(value);
        }
    }
    Ok(rule)
}

/// The rule of Llama 3.1 that gives these factors, if there is one.
///
/// Between its two ends the rule keeps the share (c·f/2π − low)/(high − low) of a frequency f, with c the original context.
/// That leaves one of low, high and c free; low is 1 in all published models.
fn llama3(factors: &[f64], theta: f64, head_dim: usize) -> Option<Value> {
    let frequency = |i: usize| theta.powf(-(2.0 * i as f64) / head_dim as f64);
    let factor = factors.iter().copied().fold(1.0, f64::max);
    // The share as a linear function of the frequency, from the two factors farthest apart between the ends.
    let share = |i: usize| (1.0 / factors[i] - 1.0 / factor) / (1.0 - 1.0 / factor);
    let between = |&i: &usize| factors[i] > 1.0 && factors[i] < factor;
    let mut inner = (0..factors.len()).filter(between);
    let (first, last) = (inner.next()?, inner.next_back()?);
    let slope = (share(first) - share(last)) / (frequency(first) - frequency(last));
    let offset = share(first) - slope * frequency(first);
    let low = 1.0;
    let spread = -low / offset;
    let high = ((low + spread) * 1e3).round() / 1e3;
    let original = (slope * (high - low) * std::f64::consts::TAU).round();
    let reproduced = |(i, &expected): (usize, &f64)| {
        let turns = original * frequency(i) / std::f64::consts::TAU;
        let keep = ((turns - low) / (high - low)).clamp(0.0, 1.0);
        let found = 1.0 / (keep + (1.0 - keep) / factor);
        (found / expected - 1.0).abs() <= RULE_TOLERANCE
    };
    let fits = high > low && original > 0.0 && factors.iter().enumerate().all(reproduced);
    fits.then(|| {
        json!({
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": original,
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rule_of_llama_3_is_found_from_its_factors() {
        let (theta, head_dim) = (500_000.0f64, 128);
        for (factor, original) in [(8.0, 8192.0), (32.0, 8192.0), (16.0, 4096.0)] {
            let of = |i: usize| {
                let frequency = theta.powf(-(2.0 * i as f64) / head_dim as f64);
                let turns: f64 = original * frequency / std::f64::consts::TAU;
                let keep = ((turns - 1.0) / 3.0).clamp(0.0, 1.0);
                f64::from((1.0 / (keep + (1.0 - keep) / factor)) as f32)
            };
            let factors: Vec<f64> = (0..head_dim / 2).map(of).collect();
            let rule = llama3(&factors, theta, head_dim).unwrap();
            assert_eq!(rule["factor"], factor);
            assert_eq!(rule["high_freq_factor"], 4.0);
            assert_eq!(rule["original_max_position_embeddings"], original);
            let mut others = factors.clone();
            others[20] *= 1.01;
            assert!(llama3(&others, theta, head_dim).is_none());
        }
        assert!(llama3(&[1.0, 2.0, 8.0], theta, 6).is_none());
        assert!(llama3(&[2.0, 2.0], theta, 4).is_none());
    }
}
