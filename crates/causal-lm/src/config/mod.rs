//! A decoder's dimensions and switches, read from `config.json` once and checked.
//!
//! All supported architectures are one decoder with different switches, and [`ModelConfig`] is these switches as plain
//! data. A file of `families` reads the config of one architecture, defaults that the files leave to the reader
//! included, so that nothing after this module asks for a `model_type`.
//!
//! Stock configs give one width for all layers. A pruned checkpoint may give each layer its own through [`WIDTHS_KEY`]:
//! `{"num_attention_heads": [..], "num_key_value_heads": [..], "intermediate_size": [..]}` with one entry per layer, where
//! 0 means that the sublayer is absent. A mixture lists `num_experts` and `expert_size` too, 0 for layers without experts, and
//! where router rows share experts or stand for constants `expert_map`, a list of ids for each layer ([`ExpertMap`]).

mod block_configs;
mod expert_map;
mod families;
mod fields;
mod shapes;

pub use expert_map::{EXPERT_MAP, ExpertMap};
pub(crate) use shapes::LAYER_SCALAR;

use crate::names::Names;
use crate::rope::{QueryScale, Rope};
use crate::{Error, Result};
use families::FAMILIES;
use fields::Fields;
use tensor_io::Config;

/// Config field that holds per-layer widths.
pub const WIDTHS_KEY: &str = "per_layer_widths";

/// Names of the supported architectures, as `model_type` in `config.json` has them.
pub fn model_types() -> impl Iterator<Item = &'static str> {
    let families = FAMILIES.iter().map(|family| family.model_type);
    families.chain([block_configs::MODEL_TYPE])
}

/// A config whose widths by layer are in [`WIDTHS_KEY`]: that of a Nemotron-NAS folder becomes one of a Llama, others stay as
/// they are.
///
/// # Errors
/// [`Error::InvalidConfig`] and [`Error::UnsupportedOption`] for block configs that cannot be read.
pub fn in_own_form(config: &Config) -> Result<Config> {
    block_configs::as_llama(config)
}

/// The class of stock transformers that loads a `model_type`.
pub(crate) fn stock_class(model_type: &str) -> Option<&'static str> {
    let family = FAMILIES
        .iter()
        .find(|family| family.model_type == model_type);
    family.map(|family| family.stock.class)
}

/// Which linears carry a bias, by the config.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Biases {
    /// q_proj, k_proj and v_proj.
    pub qkv: bool,
    /// o_proj.
    pub o: bool,
    /// gate_proj, up_proj and down_proj.
    pub mlp: bool,
}

/// Widths of one decoder block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Widths {
    /// Query heads; 0 when the block has no attention.
    pub heads: usize,
    /// Key/value heads; 0 when the block has no attention.
    pub kv_heads: usize,
    /// MLP neurons; 0 when the block has no MLP.
    pub neurons: usize,
}

/// Experts of one block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mixture {
    /// Experts that are stored. The router chooses among them, unless the block has an [`ExpertMap`].
    pub experts: usize,
    /// Neurons of each.
    pub width: usize,
    /// Experts that are chosen for a token.
    pub chosen: usize,
    /// Whether the gates of a token are divided by their sum.
    pub normalise: bool,
    /// Neurons of the expert that every token passes through; 0 where there is none.
    pub shared: usize,
}

/// Attention of one block, apart from its widths.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionConfig {
    /// Width of one head.
    pub head_dim: usize,
    /// Positions that a query sees, itself included; `None` for all before it.
    pub sliding_window: Option<usize>,
    /// Which of [`ModelConfig::ropes`] rotates queries and keys; `None` where positions are not encoded.
    pub rotation: Option<usize>,
    /// Factor on q·k.
    pub scale: f64,
    /// Logits are squeezed into ± this.
    pub softcap: Option<f64>,
    /// Whether values are the keys before norm and rotation, and there is no v_proj.
    pub value_is_key: bool,
    /// Whether q_proj also projects a gate for the heads' outputs.
    pub gated: bool,
    /// Queries, keys and values are clamped to ± this, behind their norms and before rotation.
    pub clip: Option<f64>,
}

/// The delta net that stands in the place of a block's attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeltaNetConfig {
    /// Heads of queries and keys.
    pub key_heads: usize,
    /// Heads of values, a multiple of them: value head `h` has the query and key `h / (value_heads / key_heads)`.
    pub value_heads: usize,
    /// Width of a query and of a key.
    pub key_dim: usize,
    /// Width of a value.
    pub value_dim: usize,
    /// Tokens that the convolution before the heads sees, the newest included.
    pub kernel: usize,
}

impl DeltaNetConfig {
    /// Width of all queries, which is that of all keys.
    pub fn keys(&self) -> usize {
        self.key_heads * self.key_dim
    }

    /// Width of all values.
    pub fn values(&self) -> usize {
        self.value_heads * self.value_dim
    }

    /// Channels of the convolution: queries, keys and values.
    pub fn channels(&self) -> usize {
        2 * self.keys() + self.values()
    }

    /// Numbers that a sequence carries from token to token: a matrix for each value head, and what the convolution still sees.
    pub fn state(&self) -> usize {
        self.key_dim * self.values() + (self.kernel - 1) * self.channels()
    }
}

/// What norms compute.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct NormConfig {
    /// RMS norm or layer norm.
    pub kind: NormKind,
    /// Added to the mean square or variance.
    pub eps: f64,
    /// Added to the stored weights.
    pub offset: f64,
}

/// Kinds of norms.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormKind {
    /// `x / rms(x) · weight`.
    Rms,
    /// `(x − mean) / std · weight + bias`.
    Layer,
}

/// Norms of queries and keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QkNorm {
    /// None.
    None,
    /// Each head by itself.
    Heads,
    /// All heads together: removing one changes the others.
    Projection,
}

/// The activation of an MLP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `x σ(x)`.
    Silu,
    /// GELU in its tanh form.
    GeluTanh,
    /// GELU by the error function.
    GeluErf,
}

/// What stock transformers needs to load a model whose widths were changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stock {
    /// Its class.
    pub class: &'static str,
    /// The config field of the MLP's width.
    pub neurons: &'static str,
    /// The config field that gives biases to q, k, v and o, where there is one.
    pub attention_bias: Option<&'static str>,
    /// The config field that gives biases to gate, up and down, where there is one.
    pub mlp_bias: Option<&'static str>,
    /// Which numbers of heads its config class accepts.
    pub heads: StockHeads,
    /// The config fields of the number of experts: readers of different age know different ones.
    pub experts: &'static [&'static str],
    /// The config field of an expert's width.
    pub expert_width: &'static str,
    /// The config field that counts blocks beside the decoder which share its widths, such as those that predict several tokens.
    pub extra_blocks: Option<&'static str>,
}

/// Numbers of heads that a config class of transformers accepts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StockHeads {
    /// Any, with an explicit `head_dim`.
    Any,
    /// Divisors of the hidden size.
    Divisors,
    /// Only the original one: widths are computed from the hidden size.
    Fixed,
}

/// A decoder's dimensions and switches.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct ModelConfig {
    /// Architecture, as `model_type` in the decoder's config.
    pub model_type: &'static str,
    /// Whether the config is the text part of one for several modalities.
    pub nested: bool,
    /// Loading with stock transformers.
    pub stock: Stock,
    /// Names of the tensors.
    pub names: Names,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Rows of the embedding.
    pub vocab: usize,
    /// Widths of every block. A block with experts has no MLP beside them.
    pub widths: Vec<Widths>,
    /// Experts of every block that has some.
    pub mixtures: Vec<Option<Mixture>>,
    /// What router rows stand for, of every block where they are not the stored experts one by one.
    pub expert_maps: Vec<Option<ExpertMap>>,
    /// Attention of every block.
    pub attention: Vec<AttentionConfig>,
    /// The delta net of every block that has one in the place of attention; such a block has no heads of attention.
    pub delta_nets: Vec<Option<DeltaNetConfig>>,
    /// Every norm but those of heads without a weight.
    pub norm: NormConfig,
    /// Norms of queries and keys.
    pub qk_norm: QkNorm,
    /// Whether values are normalised, head by head and without a weight.
    pub v_norm: bool,
    /// Rotary position embeddings, one for each kind of layer.
    pub ropes: Vec<Rope>,
    /// Factor on queries that grows with the position.
    pub query_scale: Option<QueryScale>,
    /// Activation of the MLPs.
    pub activation: Activation,
    /// Whether MLPs have a gate beside the up projection.
    pub gated_mlp: bool,
    /// Whether attention and MLP read the same input.
    pub parallel: bool,
    /// Factor on what each half adds to the residual stream.
    pub residual_scale: f64,
    /// Whether a stored number multiplies the output of each block.
    pub layer_scalar: bool,
    /// Factor on embeddings.
    pub embedding_scale: f64,
    /// Factor on logits.
    pub logit_scale: f64,
    /// Logits of the vocabulary are squeezed into ± this.
    pub logit_softcap: Option<f64>,
    /// Where biases are.
    pub biases: Biases,
    /// Whether the head is the embedding.
    pub tied: bool,
    /// Longest position the model was made for.
    pub max_positions: usize,
    /// Begin-of-sequence token.
    pub bos: Option<u32>,
    /// End-of-sequence tokens.
    pub eos: Vec<u32>,
}

impl ModelConfig {
    /// Reads and checks a config.
    ///
    /// # Errors
    /// [`Error::UnsupportedModel`] and [`Error::UnsupportedOption`] for what is not implemented,
    /// [`Error::InvalidConfig`] for values that contradict each other, and the config's own error
    /// for a missing or mistyped field.
    pub fn new(config: &Config) -> Result<Self> {
        let fields = Fields::new(&in_own_form(config)?)?;
        let model_type = fields.text.str("model_type")?;
        let family = FAMILIES
            .iter()
            .find(|family| family.model_type == model_type)
            .ok_or_else(|| Error::UnsupportedModel {
                found: model_type.into(),
            })?;
        fields.refuse_unsupported()?;
        let mut model = fields.base(family)?;
        (family.read)(&fields, &mut model)?;
        model.check()?;
        Ok(model)
    }

    /// Number of decoder blocks.
    pub fn layers(&self) -> usize {
        self.widths.len()
    }

    /// Rows of a block's router: one for each stored expert, unless the block has a map; 0 without experts.
    pub fn router_rows(&self, layer: usize) -> usize {
        let mapped = self.expert_maps.get(layer).and_then(Option::as_ref);
        let experts = self.mixtures.get(layer).copied().flatten();
        mapped.map_or(
            experts.map_or(0, |mixture| mixture.experts),
            ExpertMap::rows,
        )
    }

    /// Whether router rows of some block share experts or stand for constants.
    pub fn has_expert_map(&self) -> bool {
        self.expert_maps.iter().any(Option::is_some)
    }

    /// Refuses a model with such rows on behalf of what takes every row for a stored expert of its own.
    ///
    /// # Errors
    /// [`Error::ExpertMap`] with the first layer that has some.
    pub fn refuse_expert_map(&self, what: &'static str) -> Result<()> {
        match self.expert_maps.iter().position(Option::is_some) {
            Some(layer) => Err(Error::ExpertMap { layer, what }),
            None => Ok(()),
        }
    }

    /// Longest sequence that is rotated by the frequencies of short ones, where longer ones have others.
    pub fn short_context(&self) -> Option<usize> {
        let long = self.ropes.iter().filter_map(|rope| rope.long.as_ref());
        long.map(|long| long.original).min()
    }

    /// Width of a head of block `layer`.
    pub fn head_dim(&self, layer: usize) -> usize {
        self.attention[layer].head_dim
    }

    /// Whether it computes what Llama does, up to widths, biases and scaled rotation: no norms but those before both
    /// halves, no factors, no caps, no windows, whole heads rotated in every layer.
    pub fn is_plain_llama(&self) -> bool {
        *self.names.table() == crate::names::LLAMA
            && self.mixtures.iter().all(Option::is_none)
            && self.is_plain()
    }

    /// Whether it is a plain Llama with experts in place of every MLP, which is what Mixtral is without a window.
    pub fn is_plain_mixtral(&self) -> bool {
        *self.names.table() == crate::names::MIXTRAL
            && self.mixtures.iter().all(Option::is_some)
            && self.is_plain()
    }

    fn is_plain(&self) -> bool {
        let plain = |attention: &AttentionConfig| {
            let usual = 1.0 / (attention.head_dim as f64).sqrt();
            *attention
                == AttentionConfig {
                    head_dim: self.head_dim(0),
                    sliding_window: None,
                    rotation: Some(0),
                    scale: usual,
                    softcap: None,
                    value_is_key: false,
                    gated: false,
                    clip: None,
                }
        };
        let factors = [self.residual_scale, self.embedding_scale, self.logit_scale];
        !self.nested
            && !self.has_expert_map()
            && self.attention.iter().all(plain)
            && self.ropes.len() == 1
            && self.ropes[0].turned() == self.head_dim(0)
            && self.ropes[0].pairs == crate::rope::Pairs::Halves
            && self.norm.kind == NormKind::Rms
            && self.norm.offset == 0.0
            && self.qk_norm == QkNorm::None
            && self.query_scale.is_none()
            && self.activation == Activation::Silu
            && factors == [1.0; 3]
            && self.logit_softcap.is_none()
    }

    fn check(&self) -> Result<()> {
        for (layer, w) in self.widths.iter().enumerate() {
            let grouped =
                w.kv_heads > 0 && w.heads >= w.kv_heads && w.heads.is_multiple_of(w.kv_heads);
            if !(grouped || w.heads == 0 && w.kv_heads == 0) {
                return Err(invalid(
                    "num_key_value_heads",
                    format!(
                        "layer {layer}: {} query heads cannot share {} key/value heads",
                        w.heads, w.kv_heads
                    ),
                ));
            }
        }
        for (layer, mixture) in self.mixtures.iter().enumerate() {
            let Some(mixture) = mixture else { continue };
            let rows = self.router_rows(layer);
            if mixture.chosen == 0 || mixture.chosen > rows {
                return Err(invalid(
                    "num_experts_per_tok",
                    format!("{} of the {rows} experts of layer {layer}", mixture.chosen),
                ));
            }
        }
        for attention in &self.attention {
            let head_dim = attention.head_dim;
            if head_dim == 0 || !head_dim.is_multiple_of(2) {
                return Err(invalid(
                    "head_dim",
                    format!("{head_dim}, but RoPE rotates pairs: an even width is needed"),
                ));
            }
            if attention.sliding_window == Some(0) {
                return Err(invalid(
                    "sliding_window",
                    "0, but a query must see at least itself",
                ));
            }
            if !(attention.scale.is_finite() && attention.scale > 0.0) {
                return Err(invalid(
                    "attention scale",
                    format!("{}, but it must be positive", attention.scale),
                ));
            }
        }
        for (field, cap) in [
            ("clip_qkv", self.attention.first().and_then(|a| a.clip)),
            (
                "attn_logit_softcapping",
                self.attention.first().and_then(|a| a.softcap),
            ),
            ("final_logit_softcapping", self.logit_softcap),
        ] {
            if cap.is_some_and(|cap| cap.is_nan() || cap <= 0.0) {
                return Err(invalid(field, "it must be positive"));
            }
        }
        Ok(())
    }
}

fn invalid(field: &'static str, reason: impl Into<String>) -> Error {
    Error::InvalidConfig {
        field,
        reason: reason.into(),
    }
}
