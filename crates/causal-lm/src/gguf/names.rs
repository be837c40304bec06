//! Names in GGUF files, and the order of rows that comes with them.

use crate::LinearName;
use crate::names::{LLAMA, Names};

/// Embedding.
pub const EMBEDDING: &str = "token_embd.weight";
/// Norm before the head.
pub const FINAL_NORM: &str = "output_norm.weight";
/// Output head; absent where it is tied to the embedding.
pub const HEAD: &str = "output.weight";
/// What each frequency of the rotation is divided by.
pub const ROPE_FACTORS: &str = "rope_freqs.weight";

/// `general.architecture`: how a file names its keys, and how it orders the rows of q and k.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Architecture {
    /// Llama and what is stored in its form.
    Llama,
    /// The same with widths for each layer.
    Deci,
    /// Qwen2.
    Qwen2,
    /// Qwen3.
    Qwen3,
}

impl Architecture {
    /// All that are supported.
    pub const ALL: [Self; 4] = [Self::Llama, Self::Deci, Self::Qwen2, Self::Qwen3];

    /// Its name in files, which is also the prefix of its keys.
    pub fn name(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Deci => "deci",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
        }
    }

    /// The one of this name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|known| known.name() == name)
    }

    /// Whether rotations pair neighbouring channels of a head, not its halves.
    pub fn rotates_neighbours(self) -> bool {
        matches!(self, Self::Llama | Self::Deci)
    }
}

/// A linear within its block, before `.weight` and `.bias`.
pub fn linear(name: LinearName) -> &'static str {
    match name {
        LinearName::Q => "attn_q",
        LinearName::K => "attn_k",
        LinearName::V => "attn_v",
        LinearName::O => "attn_output",
        LinearName::Gate => "ffn_gate",
        LinearName::Up => "ffn_up",
        LinearName::Down => "ffn_down",
        LinearName::SharedGate => "ffn_gate_shexp",
        LinearName::SharedUp => "ffn_up_shexp",
        LinearName::SharedDown => "ffn_down_shexp",
    }
}

/// Name of a tensor of block `layer`.
pub fn in_block(layer: usize, part: &str) -> String {
    format!("blk.{layer}.{part}")
}

/// Norms of a block: their names in GGUF files and in Hugging Face.
pub const NORMS: [(&str, &str); 4] = [
    ("attn_norm.weight", "input_layernorm.weight"),
    ("ffn_norm.weight", "post_attention_layernorm.weight"),
    ("attn_q_norm.weight", "self_attn.q_norm.weight"),
    ("attn_k_norm.weight", "self_attn.k_norm.weight"),
];

/// Where a tensor of a GGUF file belongs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// The tensor of this name in Hugging Face.
    Tensor(String),
    /// The weight or bias of q or k, by this name.
    Rotated(String),
    /// Part of the rotation, which the config says.
    Rotation,
    /// Frequencies that old files carry and nothing reads.
    Ignored,
}

/// The place of the tensor `name`; `None` if it has none.
pub(crate) fn place(name: &str) -> Option<Place> {
    let names = Names::new(&LLAMA);
    match name {
        EMBEDDING => return Some(Place::Tensor(names.embedding())),
        FINAL_NORM => return Some(Place::Tensor(names.final_norm_weight())),
        HEAD => return Some(Place::Tensor(names.head().into())),
        ROPE_FACTORS => return Some(Place::Rotation),
        _ => {}
    }
    let (layer, part) = name.strip_prefix("blk.")?.split_once('.')?;
    let layer: usize = layer.parse().ok()?;
    if part == "attn_rot_embd.weight" {
        return Some(Place::Ignored);
    }
    if let Some((_, path)) = NORMS.iter().find(|(norm, _)| *norm == part) {
        return Some(Place::Tensor(names.block(layer, path)));
    }
    let (module, kind) = part.rsplit_once('.')?;
    let of = LinearName::ALL
        .into_iter()
        .find(|&of| linear(of) == module)?;
    let stored = names.module_of(of)?;
    let name = match kind {
        "weight" => names.weight(layer, stored),
        "bias" => names.bias(layer, stored),
        _ => return None,
    };
    Some(match of {
        LinearName::Q | LinearName::K => Place::Rotated(name),
        _ => Place::Tensor(name),
    })
}

/// For each row of q or k in the order of Hugging Face, where halves of a head rotate together, its row where neighbours
/// do. `head_dim` is even and divides `rows`.
pub fn neighbours_of_halves(rows: usize, head_dim: usize) -> Vec<usize> {
    let half = head_dim / 2;
    let neighbour = |row: usize| {
        let (head, within) = (row / head_dim, row % head_dim);
        head * head_dim + 2 * (within % half) + within / half
    };
    (0..rows).map(neighbour).collect()
}

/// The inverse: for each row where neighbours rotate together, its row in the order of Hugging Face.
pub fn halves_of_neighbours(rows: usize, head_dim: usize) -> Vec<usize> {
    let half = head_dim / 2;
    let in_halves = |row: usize| {
        let (head, within) = (row / head_dim, row % head_dim);
        head * head_dim + within / 2 + within % 2 * half
    };
    (0..rows).map(in_halves).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_two_orders_of_rows_undo_each_other() {
        assert_eq!(halves_of_neighbours(6, 6), [0, 3, 1, 4, 2, 5]);
        for (rows, head_dim) in [(12, 6), (64, 16), (4, 2), (0, 8)] {
            let there = neighbours_of_halves(rows, head_dim);
            let back = halves_of_neighbours(rows, head_dim);
            assert!((0..rows).all(|row| back[there[row]] == row && there[back[row]] == row));
        }
    }

    #[test]
    fn every_tensor_of_a_block_has_a_place_and_others_have_none() {
        let place = |name: &str| super::place(name);
        let tensor = |name: &str| Some(Place::Tensor(name.into()));
        assert_eq!(
            place("token_embd.weight"),
            tensor("model.embed_tokens.weight")
        );
        assert_eq!(
            place("blk.12.ffn_norm.weight"),
            tensor("model.layers.12.post_attention_layernorm.weight")
        );
        assert_eq!(
            place("blk.0.attn_output.bias"),
            tensor("model.layers.0.self_attn.o_proj.bias")
        );
        assert_eq!(
            place("blk.3.attn_k.weight"),
            Some(Place::Rotated(
                "model.layers.3.self_attn.k_proj.weight".into()
            ))
        );
        assert_eq!(place("rope_freqs.weight"), Some(Place::Rotation));
        for none in [
            "output.bias",
            "blk.0.ffn_gate_inp.weight",
            "blk.x.attn_q.weight",
            "blk.0.attn_q.scale",
            "rope_freqs",
        ] {
            assert_eq!(place(none), None, "{none}");
        }
    }
}
