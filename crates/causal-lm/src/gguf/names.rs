//! Names in GGUF files.

use crate::{LinearName, ModelConfig};

/// Embedding.
pub const EMBEDDING: &str = "token_embd.weight";
/// Norm before the head.
pub const FINAL_NORM: &str = "output_norm.weight";
/// Output head; absent where it is tied to the embedding.
pub const HEAD: &str = "output.weight";
/// Router of a block's experts, always in 32-bit floats.
pub const ROUTER: &str = "ffn_gate_inp.weight";
/// What each frequency of the rotation is divided by.
pub const ROPE_FACTORS: &str = "rope_freqs.weight";
/// The same for sequences within the first training context, where longer ones have others.
pub const SHORT_FACTORS: &str = "rope_factors_short.weight";
/// The same for longer sequences.
pub const LONG_FACTORS: &str = "rope_factors_long.weight";

/// `general.architecture`: how a file names its keys, which tensors it has, and how it orders the rows of q and k.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Architecture {
    /// Llama and what is stored in its form, Mixtral among it.
    Llama,
    /// The same with widths for each layer.
    Deci,
    /// Qwen2.
    Qwen2,
    /// Qwen3.
    Qwen3,
    /// Qwen2's mixtures.
    Qwen2Moe,
    /// Qwen3's mixtures.
    Qwen3Moe,
    /// OLMoE.
    Olmoe,
    /// Granite without experts.
    Granite,
    /// Granite 3's mixtures.
    GraniteMoe,
    /// Gemma 2.
    Gemma2,
    /// The text part of Gemma 3.
    Gemma3,
    /// The dense text part of Gemma 4.
    Gemma4,
    /// Phi-3.
    Phi3,
    /// OLMo 2 and OLMo 3.
    Olmo2,
    /// SmolLM3.
    SmolLm3,
    /// GPT-NeoX and Pythia.
    GptNeox,
    /// Ministral 3.
    Mistral3,
    /// GLM-4.
    Glm4,
}

impl Architecture {
    /// All that are supported.
    pub const ALL: [Self; 18] = [
        Self::Llama,
        Self::Deci,
        Self::Qwen2,
        Self::Qwen3,
        Self::Qwen2Moe,
        Self::Qwen3Moe,
        Self::Olmoe,
        Self::Granite,
        Self::GraniteMoe,
        Self::Gemma2,
        Self::Gemma3,
        Self::Gemma4,
        Self::Phi3,
        Self::Olmo2,
        Self::SmolLm3,
        Self::GptNeox,
        Self::Mistral3,
        Self::Glm4,
    ];

    /// Its name in files, which is also the prefix of its keys.
    pub fn name(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Deci => "deci",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
            Self::Qwen2Moe => "qwen2moe",
            Self::Qwen3Moe => "qwen3moe",
            Self::Olmoe => "olmoe",
            Self::Granite => "granite",
            Self::GraniteMoe => "granitemoe",
            Self::Gemma2 => "gemma2",
            Self::Gemma3 => "gemma3",
            Self::Gemma4 => "gemma4",
            Self::Phi3 => "phi3",
            Self::Olmo2 => "olmo2",
            Self::SmolLm3 => "smollm3",
            Self::GptNeox => "gptneox",
            Self::Mistral3 => "mistral3",
            Self::Glm4 => "glm4",
        }
    }

    /// The one of this name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|known| known.name() == name)
    }

    /// The one that models of this type are exported as; `None` where there is none. Of models in Llama's form those with
    /// different widths are `deci`.
    pub fn of(config: &ModelConfig) -> Option<Self> {
        let equal = config
            .widths
            .iter()
            .all(|widths| *widths == config.widths[0] && widths.heads > 0 && widths.neurons > 0);
        Some(match config.model_type {
            "llama" | "mistral" | "qwen2" => match equal {
                true => Self::Llama,
                false => Self::Deci,
            },
            "mixtral" => Self::Llama,
            "qwen3" => Self::Qwen3,
            "qwen2_moe" => Self::Qwen2Moe,
            "qwen3_moe" => Self::Qwen3Moe,
            "olmoe" => Self::Olmoe,
            "granite" | "granitemoehybrid" => Self::Granite,
            "granitemoe" => Self::GraniteMoe,
            "gemma2" => Self::Gemma2,
            "gemma3_text" => Self::Gemma3,
            "gemma4_text" | "gemma4_unified_text" => Self::Gemma4,
            "phi3" => Self::Phi3,
            "olmo2" | "olmo3" => Self::Olmo2,
            "smollm3" => Self::SmolLm3,
            "gpt_neox" => Self::GptNeox,
            "ministral3" => Self::Mistral3,
            "glm4" => Self::Glm4,
            _ => return None,
        })
    }

    /// Whether rotations pair neighbouring channels of a head where Hugging Face pairs its halves, so that rows of q and k
    /// are reordered.
    pub fn rotates_neighbours(self) -> bool {
        matches!(
            self,
            Self::Llama
                | Self::Deci
                | Self::Granite
                | Self::GraniteMoe
                | Self::SmolLm3
                | Self::Mistral3
        )
    }

    /// Whether a gate and an up projection that are stored stacked are two tensors of the file.
    pub(crate) fn splits_gate_and_up(self) -> bool {
        matches!(self, Self::Granite)
    }
}

/// A linear within its block, before `.weight` and `.bias`.
pub fn linear(name: LinearName) -> &'static str {
    match name {
        LinearName::Q => "attn_q",
        LinearName::K => "attn_k",
        LinearName::V => "attn_v",
        LinearName::O => "attn_output",
        LinearName::DeltaQkv => "attn_qkv",
        LinearName::DeltaZ => "attn_gate",
        LinearName::DeltaB => "ssm_beta",
        LinearName::DeltaA => "ssm_alpha",
        LinearName::DeltaOut => "ssm_out",
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
