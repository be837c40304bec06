//! Names of the tensors in a decoder checkpoint, in one place.

use std::fmt;

/// Embedding, `[vocab, hidden]`.
pub const EMBEDDING: &str = "model.embed_tokens.weight";
/// Norm before the head, `[hidden]`.
pub const FINAL_NORM: &str = "model.norm.weight";
/// Output head, `[vocab, hidden]`; absent or unused when tied to the embedding.
pub const HEAD: &str = "lm_head.weight";

/// The linears of a decoder block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum LinearName {
    /// Query projection, `[heads * head_dim, hidden]`.
    Q,
    /// Key projection, `[kv_heads * head_dim, hidden]`.
    K,
    /// Value projection, `[kv_heads * head_dim, hidden]`.
    V,
    /// Attention output, `[hidden, heads * head_dim]`.
    O,
    /// Gate of the MLP, `[neurons, hidden]`.
    Gate,
    /// Up projection of the MLP, `[neurons, hidden]`.
    Up,
    /// Down projection of the MLP, `[hidden, neurons]`.
    Down,
}

impl LinearName {
    /// All of them, in the order of the data.
    pub const ALL: [Self; 7] = [
        Self::Q,
        Self::K,
        Self::V,
        Self::O,
        Self::Gate,
        Self::Up,
        Self::Down,
    ];

    /// The module's path within its block.
    pub fn path(self) -> &'static str {
        match self {
            Self::Q => "self_attn.q_proj",
            Self::K => "self_attn.k_proj",
            Self::V => "self_attn.v_proj",
            Self::O => "self_attn.o_proj",
            Self::Gate => "mlp.gate_proj",
            Self::Up => "mlp.up_proj",
            Self::Down => "mlp.down_proj",
        }
    }

    /// Whether it writes to the residual stream: o_proj and down_proj.
    pub fn is_output(self) -> bool {
        matches!(self, Self::O | Self::Down)
    }

    /// Name of the weight in block `layer`.
    pub fn weight(self, layer: usize) -> String {
        block(layer, &format!("{}.weight", self.path()))
    }

    /// Name of the bias in block `layer`.
    pub fn bias(self, layer: usize) -> String {
        block(layer, &format!("{}.bias", self.path()))
    }
}

impl fmt::Display for LinearName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(
            self.path()
                .rsplit('.')
                .next()
                .expect("rsplit yields at least one part"),
        )
    }
}

/// Name of a tensor of block `layer`.
pub fn block(layer: usize, path: &str) -> String {
    format!("model.layers.{layer}.{path}")
}

/// Norm before attention.
pub(crate) const INPUT_NORM: &str = "input_layernorm.weight";
/// Norm before the MLP.
pub(crate) const POST_NORM: &str = "post_attention_layernorm.weight";
/// Norm of each query head (Qwen3).
pub(crate) const Q_NORM: &str = "self_attn.q_norm.weight";
/// Norm of each key head (Qwen3).
pub(crate) const K_NORM: &str = "self_attn.k_norm.weight";

/// Block and path of a tensor name, if it belongs to a block.
pub fn parse_block(name: &str) -> Option<(usize, &str)> {
    let (layer, path) = name.strip_prefix("model.layers.")?.split_once('.')?;
    Some((layer.parse().ok()?, path))
}
