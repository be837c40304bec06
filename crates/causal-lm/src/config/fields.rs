//! Reading fields that most architectures have.

use super::families::Family;
use super::{
    Activation, AttentionConfig, Biases, ModelConfig, NormConfig, NormKind, QkNorm, WIDTHS_KEY,
    Widths, invalid,
};
use crate::names::Names;
use crate::rope::{self, Pairs, Rope};
use crate::{Error, Result};
use serde_json::Value;
use tensor_io::Config;

/// An architecture of several modalities whose text part is a decoder.
pub(crate) struct Whole {
    model_type: &'static str,
    /// The decoder's `model_type` where it has none of its own.
    text: &'static str,
    /// Whether the head is the embedding where the config does not say.
    tied: bool,
}

const NESTED: &[Whole] = &[
    whole("gemma3", "gemma3_text", true),
    whole("mistral3", "mistral", true),
    whole("qwen3_5", "qwen3_5_text", false),
    whole("gemma4", "gemma4_text", true),
    whole("gemma4_unified", "gemma4_unified_text", true),
];

const fn whole(model_type: &'static str, text: &'static str, tied: bool) -> Whole {
    Whole {
        model_type,
        text,
        tied,
    }
}

/// A config: the whole, and the part that is about the decoder.
pub(crate) struct Fields {
    pub(crate) root: Config,
    pub(crate) text: Config,
    /// What the decoder is a part of.
    pub(crate) nested: Option<&'static Whole>,
}

/// Largest width, vocabulary or number of heads: the product of two fits an index, and published models stay far below.
const LARGEST: usize = 1 << 24;
/// Most layers.
const MOST_LAYERS: usize = 1 << 16;
/// Most experts of a layer: published models have hundreds.
pub(crate) const MOST_EXPERTS: usize = 1 << 12;

/// Kinds of attention in `layer_types`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Full,
    Sliding,
}

impl Kind {
    /// Its name in `rope_parameters`.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Full => "full_attention",
            Self::Sliding => "sliding_attention",
        }
    }
}

impl Fields {
    pub(crate) fn new(config: &Config) -> Result<Self> {
        let model_type = config.str("model_type")?;
        let nested = NESTED.iter().find(|whole| whole.model_type == model_type);
        let nested = nested.filter(|_| config.get("text_config").is_some());
        let mut text = match nested {
            Some(_) => config.section("text_config")?,
            None => config.clone(),
        };
        if let Some(whole) = nested
            && text.get("model_type").is_none()
        {
            text.set("model_type", whole.text);
        }
        Ok(Self {
            root: config.clone(),
            text,
            nested,
        })
    }

    /// Options of any architecture that change the function and are not implemented.
    pub(crate) fn refuse_unsupported(&self) -> Result<()> {
        let refuse = |field, value: String, supported| {
            Err(Error::UnsupportedOption {
                field,
                value,
                supported,
            })
        };
        // "vision" is about tokens of pictures alone.
        if let Some(value) = self.text.get("use_bidirectional_attention")
            && !matches!(value, Value::Bool(false))
            && value.as_str() != Some("vision")
        {
            return refuse(
                "use_bidirectional_attention",
                value.to_string(),
                "decoders, whose attention is causal",
            );
        }
        for config in [&self.root, &self.text] {
            let Some(quantised) = config.opt_section("quantization_config")? else {
                continue;
            };
            let method = quantised.opt_str("quant_method")?.unwrap_or_default();
            if matches!(method, "fp8" | "mxfp4") {
                return refuse(
                    "quantization_config.quant_method",
                    method.into(),
                    "floats of 16 or 32 bits; use the BF16 weights",
                );
            }
        }
        Ok(())
    }

    /// A positive count that must be there.
    pub(crate) fn positive(&self, field: &'static str) -> Result<usize> {
        nonzero(field, self.text.usize(field)?)
    }

    /// Experts of a layer, under the first of `names` that is there, or the architecture's own number.
    pub(crate) fn experts_or(&self, names: [&'static str; 2], default: usize) -> Result<usize> {
        for field in names {
            if let Some(experts) = self.text.opt_usize(field)? {
                return at_most(field, experts, MOST_EXPERTS);
            }
        }
        Ok(default)
    }

    /// A positive count, or the architecture's own.
    pub(crate) fn positive_or(&self, field: &'static str, default: Option<usize>) -> Result<usize> {
        match (self.text.opt_usize(field)?, default) {
            (Some(value), _) => nonzero(field, value),
            (None, Some(default)) => Ok(default),
            (None, None) => self.positive(field),
        }
    }

    pub(crate) fn number_or(&self, field: &str, default: f64) -> Result<f64> {
        Ok(self.text.opt_f64(field)?.unwrap_or(default))
    }

    pub(crate) fn flag_or(&self, field: &str, default: bool) -> Result<bool> {
        Ok(self.text.opt_bool(field)?.unwrap_or(default))
    }

    /// A decoder like Llama with the family's defaults, of which its own function changes what is different.
    pub(crate) fn base(&self, family: &Family) -> Result<ModelConfig> {
        let defaults = &family.defaults;
        let sizes = defaults.sizes;
        let hidden = self.positive_or("hidden_size", sizes.map(|sizes| sizes.hidden))?;
        let layers = at_most(
            "num_hidden_layers",
            self.positive_or("num_hidden_layers", sizes.map(|sizes| sizes.layers))?,
            MOST_LAYERS,
        )?;
        let head_dim = match (self.text.opt_usize("head_dim")?, defaults.head_dim) {
            (Some(head_dim), _) | (None, Some(head_dim)) => head_dim,
            (None, None) => hidden / self.positive_or("num_attention_heads", defaults.heads)?,
        };
        at_most("head_dim", head_dim, LARGEST)?;
        let positions = sizes.map(|sizes| sizes.positions);
        let max_positions = self.positive_or("max_position_embeddings", positions)?;
        let attention = AttentionConfig {
            head_dim,
            sliding_window: None,
            rotation: Some(0),
            scale: 1.0 / (head_dim as f64).sqrt(),
            softcap: None,
            value_is_key: false,
            gated: false,
            clip: None,
        };
        let names = Names::new(family.names);
        Ok(ModelConfig {
            model_type: family.model_type,
            nested: self.nested.is_some(),
            stock: family.stock,
            names: match self.nested {
                Some(_) => names.nested(),
                None => names,
            },
            hidden,
            vocab: self.positive_or("vocab_size", defaults.vocab)?,
            widths: self.widths(layers, family)?,
            mixtures: vec![None; layers],
            expert_maps: vec![None; layers],
            attention: vec![attention; layers],
            delta_nets: vec![None; layers],
            norm: NormConfig {
                kind: NormKind::Rms,
                eps: self.epsilon(defaults.eps)?,
                offset: 0.0,
            },
            qk_norm: QkNorm::None,
            v_norm: false,
            ropes: vec![],
            query_scale: None,
            activation: self.activation(defaults.activation.0, defaults.activation.1)?,
            gated_mlp: true,
            parallel: false,
            residual_scale: 1.0,
            layer_scalar: false,
            embedding_scale: 1.0,
            logit_scale: 1.0,
            logit_softcap: None,
            biases: Biases::default(),
            tied: match self.nested {
                Some(whole) => {
                    let tied = self.root.opt_bool("tie_word_embeddings")?;
                    tied.unwrap_or(whole.tied)
                }
                None => self.flag_or("tie_word_embeddings", defaults.tied)?,
            },
            max_positions,
            bos: self.token("bos_token_id")?,
            eos: self.eos_tokens()?,
        })
    }

    /// What the rotation of a family is where the config leaves it open.
    pub(crate) fn rope_defaults(&self, model: &ModelConfig, theta: f64) -> rope::Defaults {
        rope::Defaults {
            theta,
            partial: None,
            pairs: Pairs::Halves,
            head_dim: model.attention[0].head_dim,
            max_positions: model.max_positions,
        }
    }

    /// One rotation for all layers.
    pub(crate) fn rope(&self, model: &ModelConfig, theta: f64) -> Result<Vec<Rope>> {
        Ok(vec![Rope::read(
            &self.text,
            self.rope_defaults(model, theta),
        )?])
    }

    /// Every `period`-th layer is full and the others slide in `window`, where the config does not list them; each kind has a
    /// rotation. `rope_theta` and `rope_scaling` at the top are those of full layers, the base of the others is in the field
    /// `sliding_theta` where the family has one.
    pub(crate) fn alternate(
        &self,
        model: &mut ModelConfig,
        (window, period): (Option<usize>, usize),
        [full, sliding]: [rope::Defaults; 2],
        sliding_theta: Option<&str>,
    ) -> Result<()> {
        let kinds = self.kinds(model.layers(), |layer| {
            match (layer + 1).is_multiple_of(period) {
                true => Kind::Full,
                false => Kind::Sliding,
            }
        })?;
        let of_full = rope::KindFields {
            name: Kind::Full.name(),
            theta: Some("rope_theta"),
            is_scaled: true,
        };
        let of_sliding = rope::KindFields {
            name: Kind::Sliding.name(),
            theta: sliding_theta,
            is_scaled: false,
        };
        let full = Rope::read_kind(&self.text, of_full, full)?;
        let sliding = Rope::read_kind(&self.text, of_sliding, sliding)?;
        self.rotate(model, &kinds, [Some(full), Some(sliding)]);
        for (attention, kind) in model.attention.iter_mut().zip(kinds) {
            attention.sliding_window = window.filter(|_| kind == Kind::Sliding);
        }
        Ok(())
    }

    /// A rotation for full and one for sliding layers; those without one are not rotated.
    pub(crate) fn rotate(
        &self,
        model: &mut ModelConfig,
        kinds: &[Kind],
        [full, sliding]: [Option<Rope>; 2],
    ) {
        let mut place = |rope: Option<Rope>| {
            rope.map(|rope| {
                model.ropes.push(rope);
                model.ropes.len() - 1
            })
        };
        let (full, sliding) = (place(full), place(sliding));
        for (attention, kind) in model.attention.iter_mut().zip(kinds) {
            attention.rotation = match kind {
                Kind::Full => full,
                Kind::Sliding => sliding,
            };
        }
    }

    /// What norms add to the mean square, or the family's own.
    fn epsilon(&self, (field, default): (&'static str, f64)) -> Result<f64> {
        match self.number_or(field, default)? {
            eps if eps.is_finite() && eps >= 0.0 => Ok(eps),
            eps => Err(invalid(
                field,
                format!("{eps}, but a number of at least 0 is needed"),
            )),
        }
    }

    fn activation(&self, field: &'static str, default: Activation) -> Result<Activation> {
        match self.text.opt_str(field)? {
            None => Ok(default),
            Some("silu" | "swish") => Ok(Activation::Silu),
            Some("gelu_pytorch_tanh" | "gelu_new") => Ok(Activation::GeluTanh),
            Some("gelu") => Ok(Activation::GeluErf),
            Some(other) => Err(Error::UnsupportedOption {
                field,
                value: other.into(),
                supported: "silu, gelu, gelu_pytorch_tanh, gelu_new",
            }),
        }
    }

    fn widths(&self, layers: usize, family: &Family) -> Result<Vec<Widths>> {
        let Some(lists) = self.text.opt_section(WIDTHS_KEY)? else {
            let heads = self.positive_or("num_attention_heads", family.defaults.heads)?;
            let kv_heads = self.text.opt_usize("num_key_value_heads")?;
            let kv_heads = kv_heads
                .map(|heads| at_most("num_key_value_heads", heads, LARGEST))
                .transpose()?;
            let uniform = Widths {
                heads,
                kv_heads: kv_heads.or(family.defaults.kv_heads).unwrap_or(heads),
                neurons: self.positive_or(
                    family.stock.neurons,
                    family.defaults.sizes.map(|sizes| sizes.neurons),
                )?,
            };
            return Ok(vec![uniform; layers]);
        };
        let list = |field: &str| -> Result<Vec<usize>> {
            let values = lists.usizes(field)?;
            if values.len() != layers {
                return Err(invalid(
                    WIDTHS_KEY,
                    format!("{field} has {} entries for {layers} layers", values.len()),
                ));
            }
            check_widths(&values)?;
            Ok(values)
        };
        let heads = list("num_attention_heads")?;
        let kv_heads = list("num_key_value_heads")?;
        let neurons = list("intermediate_size")?;
        Ok((0..layers)
            .map(|l| Widths {
                heads: heads[l],
                kv_heads: kv_heads[l],
                neurons: neurons[l],
            })
            .collect())
    }

    /// The window of sliding layers; an absent field is the architecture's own, null is none.
    pub(crate) fn window(&self, absent: Option<usize>) -> Result<Option<usize>> {
        match self.text.raw().get("sliding_window") {
            None => Ok(absent),
            Some(_) => Ok(self.text.opt_usize("sliding_window")?),
        }
    }

    /// The kind of each layer: `layer_types` where the config has it, else by a rule.
    pub(crate) fn kinds(&self, layers: usize, rule: impl Fn(usize) -> Kind) -> Result<Vec<Kind>> {
        let kind = |name: &str| match name {
            "full_attention" | "attention" => Some(Kind::Full),
            "sliding_attention" => Some(Kind::Sliding),
            _ => None,
        };
        self.layer_types(layers, rule, kind, "full_attention, sliding_attention")
    }

    /// The same of an architecture with kinds of its own, by their names, of which `supported` lists the usual ones.
    pub(crate) fn layer_types<K>(
        &self,
        layers: usize,
        rule: impl Fn(usize) -> K,
        kind: impl Fn(&str) -> Option<K>,
        supported: &'static str,
    ) -> Result<Vec<K>> {
        let Some(types) = self.text.get("layer_types") else {
            return Ok((0..layers).map(rule).collect());
        };
        let list = types
            .as_array()
            .filter(|list| list.len() == layers)
            .ok_or_else(|| {
                invalid(
                    "layer_types",
                    format!("must be a list of {layers} entries, one for each layer"),
                )
            })?;
        let found = list.iter().map(|name| {
            name.as_str()
                .and_then(&kind)
                .ok_or_else(|| Error::UnsupportedOption {
                    field: "layer_types",
                    value: name.to_string(),
                    supported,
                })
        });
        found.collect()
    }

    /// A token id of the text part, or of the whole.
    fn token(&self, field: &'static str) -> Result<Option<u32>> {
        let id = match self.text.opt_usize(field)? {
            Some(id) => Some(id),
            None => self.root.opt_usize(field)?,
        };
        id.map(|id| u32::try_from(id).map_err(|_| not_a_token_id(field, id)))
            .transpose()
    }

    /// `eos_token_id` is a number or a list of numbers.
    fn eos_tokens(&self) -> Result<Vec<u32>> {
        const FIELD: &str = "eos_token_id";
        let value = self.text.get(FIELD).or(self.root.get(FIELD));
        match value {
            Some(Value::Array(ids)) => ids
                .iter()
                .map(|id| {
                    let number = id.as_u64().and_then(|id| u32::try_from(id).ok());
                    number.ok_or_else(|| not_a_token_id(FIELD, id))
                })
                .collect(),
            _ => Ok(self.token(FIELD)?.into_iter().collect()),
        }
    }
}

fn not_a_token_id(field: &'static str, found: impl std::fmt::Display) -> Error {
    invalid(
        field,
        format!("{found} is not a token id, a number below 2^32"),
    )
}

fn nonzero(field: &'static str, value: usize) -> Result<usize> {
    match value {
        0 => Err(invalid(field, "0, but at least 1 is needed")),
        value => at_most(field, value, LARGEST),
    }
}

/// A width that models have.
pub(crate) fn width(field: &'static str, value: usize) -> Result<usize> {
    at_most(field, value, LARGEST)
}

/// Refuses widths of layers that no model has.
pub(crate) fn check_widths(widths: &[usize]) -> Result<()> {
    let mut widths = widths.iter();
    widths.try_for_each(|&width| at_most(WIDTHS_KEY, width, LARGEST).map(drop))
}

/// Refuses numbers of experts of layers that no model has.
pub(crate) fn check_experts(experts: &[usize]) -> Result<()> {
    let mut experts = experts.iter();
    experts.try_for_each(|&experts| at_most(WIDTHS_KEY, experts, MOST_EXPERTS).map(drop))
}

/// Refuses a size that no model has, before anything is allocated for it or multiplied with it.
fn at_most(field: &'static str, value: usize, largest: usize) -> Result<usize> {
    match value <= largest {
        true => Ok(value),
        false => Err(invalid(
            field,
            format!("{value}, but at most {largest} is possible"),
        )),
    }
}
