//! The fields of `config.json` that a decoder needs, read once and checked.
//!
//! Llama, Mistral, Qwen2 and Qwen3 are one architecture with different switches. The switches
//! that the files leave to the reader's defaults (biases, head_dim, sliding windows) are resolved
//! here, so that nothing after this module asks for the `model_type` again.
//!
//! Stock configs give one width for all layers. A pruned checkpoint may give each layer its own
//! through [`WIDTHS_KEY`]: `{"num_attention_heads": [..], "num_key_value_heads": [..],
//! "intermediate_size": [..]}` with one entry per layer, where 0 means that the sublayer is absent.

use crate::names::{self, LinearName};
use crate::rope::Rope;
use crate::{Error, Result};
use tensor_io::Config;

/// Config field that holds per-layer widths.
pub const WIDTHS_KEY: &str = "per_layer_widths";

/// The supported values of `model_type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ModelType {
    /// LLaMA 1–3 and everything published in its layout.
    Llama,
    /// Mistral: Llama with an optional sliding window.
    Mistral,
    /// Qwen2 and Qwen2.5: biases on q, k and v.
    Qwen2,
    /// Qwen3: RMS norms on the heads of q and k.
    Qwen3,
}

impl ModelType {
    /// The name in `config.json`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Mistral => "mistral",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
        }
    }

    fn from_name(name: &str) -> Result<Self> {
        [Self::Llama, Self::Mistral, Self::Qwen2, Self::Qwen3]
            .into_iter()
            .find(|kind| kind.name() == name)
            .ok_or_else(|| Error::UnsupportedModel { found: name.into() })
    }
}

/// Which linears carry a bias, by the config.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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

/// A decoder's dimensions and switches.
#[derive(Clone, Debug)]
pub struct ModelConfig {
    /// Architecture.
    pub model_type: ModelType,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Rows of the embedding.
    pub vocab: usize,
    /// Width of one head.
    pub head_dim: usize,
    /// One entry per decoder block.
    pub widths: Vec<Widths>,
    /// Sliding window of each block; `None` attends to everything before.
    pub sliding_window: Vec<Option<usize>>,
    /// Epsilon of every RMS norm.
    pub rms_eps: f64,
    /// Rotary position embedding.
    pub rope: Rope,
    /// Where biases are.
    pub biases: Biases,
    /// Whether q and k are normalised per head (Qwen3).
    pub qk_norm: bool,
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
        let model_type = ModelType::from_name(config.str("model_type")?)?;
        let activation = config.opt_str("hidden_act")?.unwrap_or("silu");
        if !matches!(activation, "silu" | "swish") {
            return Err(Error::UnsupportedOption {
                field: "hidden_act",
                value: activation.into(),
                supported: "silu",
            });
        }
        let hidden = positive(config, "hidden_size")?;
        let layers = positive(config, "num_hidden_layers")?;
        let widths = widths(config, layers)?;
        let head_dim = match config.opt_usize("head_dim")? {
            Some(head_dim) => head_dim,
            None if model_type == ModelType::Qwen3 => 128,
            None => hidden / positive(config, "num_attention_heads")?,
        };
        if head_dim == 0 || !head_dim.is_multiple_of(2) {
            return Err(invalid(
                "head_dim",
                format!("{head_dim}, but RoPE rotates pairs: an even width is needed"),
            ));
        }
        let max_positions = positive(config, "max_position_embeddings")?;
        let attention_bias = config.opt_bool("attention_bias")?.unwrap_or(false);
        let mlp_bias = config.opt_bool("mlp_bias")?.unwrap_or(false);
        let biases = match model_type {
            ModelType::Llama => Biases {
                qkv: attention_bias,
                o: attention_bias,
                mlp: mlp_bias,
            },
            ModelType::Mistral => Biases {
                qkv: false,
                o: false,
                mlp: false,
            },
            ModelType::Qwen2 => Biases {
                qkv: true,
                o: false,
                mlp: false,
            },
            ModelType::Qwen3 => Biases {
                qkv: attention_bias,
                o: attention_bias,
                mlp: false,
            },
        };
        Ok(Self {
            model_type,
            hidden,
            vocab: positive(config, "vocab_size")?,
            head_dim,
            widths,
            sliding_window: sliding_windows(config, model_type, layers)?,
            rms_eps: config.opt_f64("rms_norm_eps")?.unwrap_or(1e-6),
            rope: Rope::from_config(config, head_dim, max_positions)?,
            biases,
            qk_norm: model_type == ModelType::Qwen3,
            tied: config.opt_bool("tie_word_embeddings")?.unwrap_or(false),
            max_positions,
            bos: token_id(config, "bos_token_id")?,
            eos: eos_tokens(config)?,
        })
    }

    /// Shape of a block's linear, `[out, in]`; `None` where the block has no such half.
    pub fn linear_shape(&self, layer: usize, name: LinearName) -> Option<[usize; 2]> {
        let Self {
            hidden, head_dim, ..
        } = *self;
        let Widths {
            heads,
            kv_heads,
            neurons,
        } = self.widths[layer];
        let shape = match name {
            LinearName::Q => [heads * head_dim, hidden],
            LinearName::K | LinearName::V => [kv_heads * head_dim, hidden],
            LinearName::O => [hidden, heads * head_dim],
            LinearName::Gate | LinearName::Up => [neurons, hidden],
            LinearName::Down => [hidden, neurons],
        };
        (shape[0] > 0 && shape[1] > 0).then_some(shape)
    }

    /// Whether the architecture gives this linear a bias.
    pub fn has_bias(&self, name: LinearName) -> bool {
        match name {
            LinearName::Q | LinearName::K | LinearName::V => self.biases.qkv,
            LinearName::O => self.biases.o,
            LinearName::Gate | LinearName::Up | LinearName::Down => self.biases.mlp,
        }
    }

    /// Name and shape of every tensor of the model, in the order of the data.
    pub fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let Self {
            hidden,
            vocab,
            head_dim,
            ..
        } = *self;
        let mut tensors = vec![(names::EMBEDDING.into(), vec![vocab, hidden])];
        for layer in 0..self.layers() {
            let mut add = |path: &str, shape| tensors.push((names::block(layer, path), shape));
            add(names::INPUT_NORM, vec![hidden]);
            if self.qk_norm && self.widths[layer].heads > 0 {
                add(names::Q_NORM, vec![head_dim]);
                add(names::K_NORM, vec![head_dim]);
            }
            add(names::POST_NORM, vec![hidden]);
            for name in LinearName::ALL {
                let shape = self.linear_shape(layer, name);
                if let Some(shape) = shape {
                    tensors.push((name.weight(layer), shape.to_vec()));
                }
                // The bias of an output projection stays when all its inputs are gone.
                let rows = shape
                    .map(|[rows, _]| rows)
                    .or(name.is_output().then_some(hidden));
                if let Some(rows) = rows.filter(|_| self.has_bias(name)) {
                    tensors.push((name.bias(layer), vec![rows]));
                }
            }
        }
        tensors.push((names::FINAL_NORM.into(), vec![hidden]));
        if !self.tied {
            tensors.push((names::HEAD.into(), vec![vocab, hidden]));
        }
        tensors
    }

    /// Number of decoder blocks.
    pub fn layers(&self) -> usize {
        self.widths.len()
    }
}

fn invalid(field: &'static str, reason: impl Into<String>) -> Error {
    Error::InvalidConfig {
        field,
        reason: reason.into(),
    }
}

fn positive(config: &Config, field: &'static str) -> Result<usize> {
    match config.usize(field)? {
        0 => Err(invalid(field, "0, but at least 1 is needed")),
        value => Ok(value),
    }
}

fn widths(config: &Config, layers: usize) -> Result<Vec<Widths>> {
    let widths: Vec<Widths> = match config.opt_section(WIDTHS_KEY)? {
        None => {
            let heads = positive(config, "num_attention_heads")?;
            let uniform = Widths {
                heads,
                kv_heads: config.opt_usize("num_key_value_heads")?.unwrap_or(heads),
                neurons: positive(config, "intermediate_size")?,
            };
            vec![uniform; layers]
        }
        Some(lists) => {
            let list = |field: &str| -> Result<Vec<usize>> {
                let values = lists.usizes(field)?;
                if values.len() != layers {
                    return Err(invalid(
                        WIDTHS_KEY,
                        format!("{field} has {} entries for {layers} layers", values.len()),
                    ));
                }
                Ok(values)
            };
            let heads = list("num_attention_heads")?;
            let kv_heads = list("num_key_value_heads")?;
            let neurons = list("intermediate_size")?;
            (0..layers)
                .map(|l| Widths {
                    heads: heads[l],
                    kv_heads: kv_heads[l],
                    neurons: neurons[l],
                })
                .collect()
        }
    };
    for (layer, w) in widths.iter().enumerate() {
        let grouped = w.kv_heads > 0 && w.heads >= w.kv_heads && w.heads.is_multiple_of(w.kv_heads);
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
    Ok(widths)
}

/// Mistral slides on every layer; Qwen only when `use_sliding_window` is set, and then on the
/// layers that `layer_types` or `max_window_layers` say.
fn sliding_windows(
    config: &Config,
    model_type: ModelType,
    layers: usize,
) -> Result<Vec<Option<usize>>> {
    // Both fall back to 4096 in the reference implementation when the field is absent (not null).
    let window = match config.raw().get("sliding_window") {
        None => Some(4096),
        Some(_) => config.opt_usize("sliding_window")?,
    };
    if window == Some(0) {
        return Err(invalid(
            "sliding_window",
            "0, but a query must see at least itself",
        ));
    }
    let slides: Vec<bool> = match model_type {
        ModelType::Llama => vec![false; layers],
        ModelType::Mistral => vec![true; layers],
        ModelType::Qwen2 | ModelType::Qwen3
            if !config.opt_bool("use_sliding_window")?.unwrap_or(false) =>
        {
            vec![false; layers]
        }
        ModelType::Qwen2 | ModelType::Qwen3 => {
            match config.raw().get("layer_types").filter(|v| !v.is_null()) {
                Some(types) => layer_types(types, layers)?,
                None => {
                    let full = config.opt_usize("max_window_layers")?.unwrap_or(28);
                    (0..layers).map(|layer| layer >= full).collect()
                }
            }
        }
    };
    Ok(slides
        .into_iter()
        .map(|slides| window.filter(|_| slides))
        .collect())
}

fn layer_types(types: &serde_json::Value, layers: usize) -> Result<Vec<bool>> {
    let list = types
        .as_array()
        .filter(|list| list.len() == layers)
        .ok_or_else(|| {
            invalid(
                "layer_types",
                format!("must be a list of {layers} entries, one for each layer"),
            )
        })?;
    list.iter()
        .map(|kind| match kind.as_str() {
            Some("full_attention") => Ok(false),
            Some("sliding_attention") => Ok(true),
            _ => Err(Error::UnsupportedOption {
                field: "layer_types",
                value: kind.to_string(),
                supported: "full_attention, sliding_attention",
            }),
        })
        .collect()
}

fn token_id(config: &Config, field: &'static str) -> Result<Option<u32>> {
    let id = |id: usize| u32::try_from(id).map_err(|_| not_a_token_id(field, id));
    config.opt_usize(field)?.map(id).transpose()
}

fn not_a_token_id(field: &'static str, found: impl std::fmt::Display) -> Error {
    invalid(
        field,
        format!("{found} is not a token id, a number below 2^32"),
    )
}

/// `eos_token_id` is a number or a list of numbers.
fn eos_tokens(config: &Config) -> Result<Vec<u32>> {
    match config.raw().get("eos_token_id") {
        Some(serde_json::Value::Array(ids)) => ids
            .iter()
            .map(|id| {
                let number = id.as_u64().and_then(|id| u32::try_from(id).ok());
                number.ok_or_else(|| not_a_token_id("eos_token_id", id))
            })
            .collect(),
        _ => Ok(token_id(config, "eos_token_id")?.into_iter().collect()),
    }
}
