//! What the metadata of each architecture say beyond widths: the fields of `config.json` that Hugging Face has for it.

use serde_json::{Map, Value, json};
use tensor_io::Config;
use tensor_io::gguf::{Array, Gguf, Metadata, Value as Stored};

use super::config::{Biases, Heads, Keys, Widths};
use super::{Architecture, names, rotation};
use crate::Result;

/// Experts of every block.
#[derive(Clone, Copy)]
pub(super) struct Experts {
    count: usize,
    chosen: usize,
}

/// The experts of a file; `None` for a dense model.
pub(super) fn experts(file: &Gguf, keys: &Keys<'_>) -> Result<Option<Experts>> {
    let mixture = matches!(
        keys.architecture,
        Architecture::Qwen2Moe
            | Architecture::Qwen3Moe
            | Architecture::Olmoe
            | Architecture::GraniteMoe
    );
    let count = match (keys.opt_usize("expert_count")?, mixture) {
        (None | Some(0), false) => return Ok(None),
        (None | Some(0), true) => keys.usize("expert_count")?,
        (Some(count), _) => count,
    };
    if count == 0 || !(mixture || keys.architecture == Architecture::Llama) {
        return Err(keys.refuse(format!(
            "a mixture of {count} experts is not supported in {}",
            keys.architecture.name()
        )));
    }
    let router = names::in_block(0, names::ROUTER);
    if !file.contains(&router) {
        return Err(keys.refuse(format!(
            "{} states {count} experts, but there is no `{router}`",
            keys.key("expert_count")
        )));
    }
    for (key, neutral) in [
        ("expert_weights_scale", &[0.0, 1.0][..]),
        ("expert_group_count", &[0.0, 1.0]),
        ("expert_gating_func", &[0.0, 1.0]),
    ] {
        if let Some(found) = keys.opt_f64(key)?.filter(|found| !neutral.contains(found)) {
            return Err(keys.refuse(format!("{} of {found} is not supported", keys.key(key))));
        }
    }
    Ok(Some(Experts {
        count,
        chosen: keys.usize("expert_used_count")?,
    }))
}

/// The model type of Hugging Face.
pub(super) fn model_type(
    keys: &Keys<'_>,
    biases: &Biases,
    experts: Option<Experts>,
) -> Result<&'static str> {
    Ok(match keys.architecture {
        Architecture::Llama if experts.is_some() => "mixtral",
        Architecture::Llama | Architecture::Deci if biases.qkv && !biases.any_o => "qwen2",
        Architecture::Llama | Architecture::Deci => "llama",
        Architecture::Qwen2 => "qwen2",
        Architecture::Qwen3 => "qwen3",
        Architecture::Qwen2Moe => "qwen2_moe",
        Architecture::Qwen3Moe => "qwen3_moe",
        Architecture::Olmoe => "olmoe",
        // Models of Granite 4 without rotation are of another type.
        Architecture::Granite => match flag(keys, "rope.scaling.finetuned")? {
            Some(false) => "granitemoehybrid",
            _ => "granite",
        },
        Architecture::GraniteMoe => "granitemoe",
        Architecture::Gemma2 => "gemma2",
        Architecture::Gemma3 => "gemma3_text",
        Architecture::Gemma4 => "gemma4_text",
        Architecture::Phi3 => "phi3",
        Architecture::Olmo2 => match keys.opt_usize("attention.sliding_window")? {
            Some(window) if window > 0 => "olmo3",
            _ => "olmo2",
        },
        Architecture::SmolLm3 => "smollm3",
        Architecture::GptNeox => "gpt_neox",
        Architecture::Mistral3 => "ministral3",
        Architecture::Glm4 => "glm4",
    })
}

/// Whether fewer channels than a head has may be rotated.
pub(super) fn rotates_a_part(architecture: Architecture) -> bool {
    matches!(
        architecture,
        Architecture::Phi3 | Architecture::GptNeox | Architecture::Glm4
    )
}

fn flag(keys: &Keys<'_>, key: &str) -> Result<Option<bool>> {
    Ok(keys.metadata.get_bool(&keys.key(key))?)
}

/// What is known of a file when the fields of its architecture are read.
pub(super) struct Read<'a> {
    pub(super) file: &'a Gguf,
    pub(super) keys: &'a Keys<'a>,
    pub(super) widths: &'a Widths,
    pub(super) layers: usize,
    pub(super) hidden: usize,
    pub(super) context: usize,
    pub(super) heads: Heads,
    pub(super) biases: Biases,
    pub(super) experts: Option<Experts>,
    pub(super) theta: f64,
}

impl Read<'_> {
    /// Sets base and scaling of the rotation.
    pub(super) fn rotation(&self, config: &mut Config) -> Result<()> {
        let Self {
            file,
            keys,
            context,
            theta,
            ..
        } = *self;
        let Heads { dim, turned } = self.heads;
        match keys.architecture {
            Architecture::Gemma3 | Architecture::Olmo2 if self.slides()? => {
                return self.rotations_of_two_kinds(config);
            }
            Architecture::Gemma4 => return self.proportional(config),
            Architecture::Phi3 if file.contains(names::LONG_FACTORS) => {
                return self.long_rope(config);
            }
            _ => {}
        }
        let (base, part) = match keys.architecture {
            Architecture::GptNeox => ("rotary_emb_base", "rotary_pct"),
            _ => ("rope_theta", "partial_rotary_factor"),
        };
        config.set(base, theta);
        if rotates_a_part(keys.architecture) {
            config.set(part, turned as f64 / dim as f64);
        }
        if let Some(rule) = rotation::rule(file, keys, theta, turned, context)? {
            config.set("rope_scaling", rule);
        }
        Ok(())
    }

    fn slides(&self) -> Result<bool> {
        let window = self.keys.opt_usize("attention.sliding_window")?;
        Ok(window.is_some_and(|window| window > 0))
    }

    /// Scaling is that of full layers; sliding ones may have a base of their own.
    fn rotations_of_two_kinds(&self, config: &mut Config) -> Result<()> {
        let Self {
            file, keys, theta, ..
        } = *self;
        let scaled = rotation::rule(file, keys, theta, self.heads.dim, self.context)?;
        let mut full = scaled.unwrap_or_else(|| json!({"rope_type": "default"}));
        full["rope_theta"] = json!(theta);
        let default = match keys.architecture {
            Architecture::Gemma3 => 10_000.0,
            _ => theta,
        };
        let sliding = keys.opt_f64("rope.freq_base_swa")?.unwrap_or(default);
        config.set(
            "rope_parameters",
            json!({"full_attention": full, "sliding_attention": {"rope_type": "default", "rope_theta": sliding}}),
        );
        Ok(())
    }

    /// Full layers of Gemma 4 rotate the first pairs of a head, by frequencies that one factor divides; the factors of the others
    /// are as good as infinite.
    fn proportional(&self, config: &mut Config) -> Result<()> {
        const STANDING: f32 = 1e20;
        let Self {
            file, keys, theta, ..
        } = *self;
        let dim = keys.usize("attention.key_length")?;
        file.expect_shape(names::ROPE_FACTORS, &[dim / 2])?;
        let factors = file.floats(names::ROPE_FACTORS)?;
        let common = factors.first().copied().unwrap_or(0.0);
        let turned = factors.iter().take_while(|&&factor| factor == common);
        let turned = turned.count();
        let fits = common > 0.0 && common < STANDING;
        if !fits || factors[turned..].iter().any(|factor| *factor < STANDING) {
            return Err(keys.refuse(format!(
                "{} holds other factors than one for the first pairs and the largest for the rest",
                names::ROPE_FACTORS
            )));
        }
        let sliding = keys.opt_f64("rope.freq_base_swa")?.unwrap_or(10_000.0);
        let partial = turned as f64 / (dim / 2) as f64;
        config.set(
            "rope_parameters",
            json!({
                "full_attention": {"rope_type": "proportional", "rope_theta": theta, "partial_rotary_factor": partial,
                    "factor": f64::from(common)},
                "sliding_attention": {"rope_type": "default", "rope_theta": sliding},
            }),
        );
        Ok(())
    }

    fn long_rope(&self, config: &mut Config) -> Result<()> {
        let Self {
            file,
            keys,
            theta,
            context,
            ..
        } = *self;
        let Heads { dim, turned } = self.heads;
        let mut rule = json!({"rope_type": "longrope", "rope_theta": theta});
        rule["partial_rotary_factor"] = json!(turned as f64 / dim as f64);
        for (name, field) in [
            (names::SHORT_FACTORS, "short_factor"),
            (names::LONG_FACTORS, "long_factor"),
        ] {
            file.expect_shape(name, &[turned / 2])?;
            rule[field] = json!(file.floats(name)?);
        }
        let attention = keys.opt_f64("rope.scaling.attn_factor")?.unwrap_or(1.0);
        rule["attention_factor"] = json!(attention);
        let original = keys.opt_usize("rope.scaling.original_context_length")?;
        let original = original.unwrap_or(context);
        rule["original_max_position_embeddings"] = json!(original);
        config.set("original_max_position_embeddings", original);
        config.set("rope_parameters", rule);
        Ok(())
    }

    /// Sets what the architecture has besides widths and rotation.
    pub(super) fn fields(&self, config: &mut Config) -> Result<()> {
        let Self { keys, biases, .. } = *self;
        match keys.architecture {
            Architecture::Llama | Architecture::Deci => match self.experts {
                Some(_) => self.mixture(config, &["num_local_experts"]),
                None => {
                    let type_of = config.str("model_type")?;
                    if type_of == "llama" {
                        config.set("attention_bias", biases.qkv && biases.o);
                        config.set("mlp_bias", biases.mlp);
                    }
                }
            },
            Architecture::Qwen2 => {}
            Architecture::Qwen3 => config.set("attention_bias", biases.qkv && biases.o),
            Architecture::Qwen2Moe => {
                self.mixture(config, &["num_experts"]);
                config.set("norm_topk_prob", false);
                config.set("qkv_bias", biases.qkv);
                let shared = keys.opt_usize("expert_shared_feed_forward_length")?;
                let shared = match shared {
                    Some(shared) => shared,
                    None => keys.usize("feed_forward_length")?,
                };
                config.set("shared_expert_intermediate_size", shared);
                self.expert_width(config)?;
            }
            Architecture::Qwen3Moe => {
                self.mixture(config, &["num_experts", "num_local_experts"]);
                config.set("norm_topk_prob", true);
                self.expert_width(config)?;
            }
            Architecture::Olmoe => {
                self.mixture(config, &["num_experts"]);
                config.set("norm_topk_prob", false);
            }
            Architecture::Granite | Architecture::GraniteMoe => self.granite(config)?,
            Architecture::Gemma2 | Architecture::Gemma3 | Architecture::Gemma4 => {
                self.gemma(config)?;
            }
            Architecture::Phi3 => config.set("sliding_window", Value::Null),
            Architecture::Olmo2 => {
                if let Some(kinds) = self.kinds(4)? {
                    config.set("layer_types", kinds);
                    let window = keys.usize("attention.sliding_window")?;
                    config.set("sliding_window", window);
                }
            }
            Architecture::SmolLm3 => {
                // Every fourth layer is not rotated, whatever the file says.
                let rotates = |layer: usize| usize::from(!(layer + 1).is_multiple_of(4));
                let list: Vec<usize> = (0..self.layers).map(rotates).collect();
                config.set("no_rope_layers", list);
            }
            Architecture::GptNeox => {
                config.set("hidden_act", "gelu");
                config.set("attention_bias", biases.qkv);
                let parallel = flag(keys, "use_parallel_residual")?.unwrap_or(true);
                config.set("use_parallel_residual", parallel);
            }
            Architecture::Mistral3 => self.ministral(config)?,
            Architecture::Glm4 => config.set("attention_bias", biases.qkv),
        }
        Ok(())
    }

    fn mixture(&self, config: &mut Config, counts: &[&str]) {
        let Some(Experts { count, chosen }) = self.experts else {
            return;
        };
        for &field in counts {
            config.set(field, count);
        }
        config.set("num_experts_per_tok", chosen);
    }

    fn expert_width(&self, config: &mut Config) -> Result<()> {
        let keys = self.keys;
        let width = match (keys.opt_usize("expert_feed_forward_length")?, self.experts) {
            (Some(width), _) => width,
            // What its readers assume.
            (None, Some(experts)) => keys.usize("feed_forward_length")? / experts.chosen.max(1),
            (None, None) => keys.usize("expert_feed_forward_length")?,
        };
        config.set("moe_intermediate_size", width);
        Ok(())
    }

    fn granite(&self, config: &mut Config) -> Result<()> {
        let Self { keys, biases, .. } = *self;
        // 0 stands for no factor.
        let factor = |key: &str| -> Result<Option<f64>> {
            Ok(keys.opt_f64(key)?.filter(|&factor| factor != 0.0))
        };
        let usual = 1.0 / (self.heads.dim as f64).sqrt();
        for (field, key, default) in [
            ("embedding_multiplier", "embedding_scale", 1.0),
            ("residual_multiplier", "residual_scale", 1.0),
            ("attention_multiplier", "attention.scale", usual),
            ("logits_scaling", "logit_scale", 1.0),
        ] {
            config.set(field, factor(key)?.unwrap_or(default));
        }
        config.set("attention_bias", biases.qkv && biases.o);
        if self.experts.is_some() {
            self.mixture(config, &["num_local_experts"]);
        } else if config.str("model_type")? == "granitemoehybrid" {
            config.set("num_local_experts", 0);
            let width = config.get("intermediate_size").cloned();
            config.set("shared_intermediate_size", width.unwrap_or_default());
            config.set("layer_types", vec!["full_attention"; self.layers]);
            config.set("position_embedding_type", "nope");
        } else {
            config.set("mlp_bias", biases.mlp);
        }
        Ok(())
    }

    fn gemma(&self, config: &mut Config) -> Result<()> {
        let Self { keys, .. } = *self;
        config.set("hidden_activation", "gelu_pytorch_tanh");
        let window = keys.opt_usize("attention.sliding_window")?;
        let absent = match keys.architecture {
            Architecture::Gemma3 => None,
            // What its readers assume.
            _ => Some(30.0),
        };
        let logit_cap = keys.opt_f64("final_logit_softcapping")?.or(absent);
        let logit_cap = logit_cap.filter(|&cap| cap != 0.0);
        let kinds = match keys.architecture {
            Architecture::Gemma2 => {
                let cap = keys.opt_f64("attn_logit_softcapping")?.unwrap_or(50.0);
                config.set("attn_logit_softcapping", cap);
                config.set("final_logit_softcapping", logit_cap.unwrap_or(30.0));
                config.set("sliding_window", window.unwrap_or(4096));
                // Readers know the order and ask the file for none.
                let slides = |layer: usize| layer.is_multiple_of(2);
                (0..self.layers).map(slides).map(kind).collect()
            }
            _ => {
                config.set("final_logit_softcapping", json!(logit_cap));
                config.set("sliding_window", json!(window));
                let full = || vec![kind(false); self.layers];
                self.kinds(6)?.unwrap_or_else(full)
            }
        };
        config.set("layer_types", kinds.clone());
        if keys.architecture == Architecture::Gemma4 {
            return self.gemma4(config, &kinds);
        }
        config.set("attention_bias", false);
        let width = super::attention_width(
            keys.architecture,
            self.layers,
            (self.hidden, self.widths.heads(0), self.heads.dim),
        );
        config.set("query_pre_attn_scalar", width);
        Ok(())
    }

    fn gemma4(&self, config: &mut Config, kinds: &[String]) -> Result<()> {
        let Self { file, keys, .. } = *self;
        for key in [
            "attention.shared_kv_layers",
            "embedding_length_per_layer_input",
        ] {
            if let Some(found) = keys.opt_usize(key)?.filter(|&found| found > 0) {
                return Err(keys.refuse(format!("{} of {found} is not supported", keys.key(key))));
            }
        }
        let wide = keys.usize("attention.key_length")?;
        let mut own = Map::new();
        let (mut value_is_key, mut sliding) = (false, None);
        for (layer, kind) in kinds.iter().enumerate() {
            let kv_heads = self.widths.kv_heads(layer);
            let full = kind == "full_attention" || layer + 1 == self.layers;
            if full {
                let fields = json!({"head_dim": wide, "num_key_value_heads": kv_heads});
                own.insert(layer.to_string(), fields);
                let value = names::in_block(layer, "attn_v.weight");
                value_is_key |= !file.contains(&value);
            } else {
                sliding.get_or_insert(kv_heads);
            }
        }
        if self.widths.are_equal_but_for_kv_heads() {
            let kv_heads = sliding.unwrap_or(self.widths.kv_heads(0));
            config.set("num_key_value_heads", kv_heads);
            config.set("per_layer_config", Value::Object(own));
        }
        config.set("global_head_dim", wide);
        config.set("attention_k_eq_v", value_is_key);
        config.set("attention_bias", false);
        for field in ["hidden_size_per_layer_input", "num_kv_shared_layers"] {
            config.set(field, 0);
        }
        config.set("enable_moe_block", false);
        Ok(())
    }

    fn ministral(&self, config: &mut Config) -> Result<()> {
        let keys = self.keys;
        let beta = keys.opt_f64("attention.temperature_scale")?.unwrap_or(0.0);
        let mut rule = match config.remove("rope_scaling") {
            Some(rule) => rule,
            None => json!({"rope_type": "default"}),
        };
        rule["llama_4_scaling_beta"] = json!(beta);
        if rule.get("original_max_position_embeddings").is_none() {
            let original = keys.opt_usize("rope.scaling.original_context_length")?;
            rule["original_max_position_embeddings"] = json!(original.unwrap_or(self.context));
        }
        rule["rope_theta"] = json!(self.theta);
        config.set("rope_parameters", rule);
        config.set("sliding_window", Value::Null);
        Ok(())
    }

    /// The kind of every layer: a list of those that slide, or every how many layers one is full. `None` where none slides.
    fn kinds(&self, default: usize) -> Result<Option<Vec<String>>> {
        if !self.slides()? {
            return Ok(None);
        }
        let keys = self.keys;
        let key = keys.key("attention.sliding_window_pattern");
        let slides: Vec<bool> = match keys.metadata.get(&key)? {
            Some(Stored::Array(Array::Bool(list))) if list.len() == self.layers => list,
            Some(Stored::Array(Array::Bool(list))) => {
                return Err(keys.refuse(format!(
                    "{key}: expected a list of {}, found one of {}",
                    self.layers,
                    list.len()
                )));
            }
            Some(Stored::Array(_)) => {
                let list =
                    |metadata: &Metadata<'_>, key: &str| metadata.get_usizes(key, self.layers);
                let list = keys.metadata.required(&key, list)?;
                list.into_iter().map(|slides| slides != 0).collect()
            }
            found => {
                let period = match found {
                    Some(_) => keys.metadata.required(&key, Metadata::get_usize)?,
                    None => default,
                };
                let full = |layer: usize| (layer + 1).is_multiple_of(period.max(1));
                (0..self.layers).map(|layer| !full(layer)).collect()
            }
        };
        Ok(Some(slides.into_iter().map(kind).collect()))
    }
}

/// A kind of layer in `layer_types`.
fn kind(slides: bool) -> String {
    match slides {
        true => "sliding_attention".into(),
        false => "full_attention".into(),
    }
}
