//! Pre-tokenizers of byte-level BPE, by the names that GGUF files give them.
//!
//! The expressions are those of the models' own `tokenizer.json`; llama.cpp has them written out by hand, with the same
//! result.

use serde_json::{Value, json};

/// How a text is split before merging.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PreTokenizer {
    /// GPT-2's.
    Gpt2,
    /// GPT-4o's.
    Gpt4o,
    /// Llama 3's: up to three digits together. `merges` says whether a piece that is a token is merged all the same.
    Llama3 { merges: bool },
    /// The same with single digits.
    Qwen2,
    /// Mistral's tekken.
    Tekken,
    /// Every digit alone, the rest as GPT-2's.
    SmolLm,
}

/// Llama 3's expression.
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Qwen2's.
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// GPT-4o's: upper and lower case apart.
const GPT4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Tekken's: the same without English endings, single digits.
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

impl PreTokenizer {
    /// The one of this name; `None` for `default` and any other.
    pub(crate) fn named(name: &str) -> Option<Self> {
        Some(match name {
            "gpt-2" | "phi-2" | "mpt" | "olmo" | "jais" => Self::Gpt2,
            "gpt-4o" | "llama4" => Self::Gpt4o,
            "llama3" | "llama-v3" | "llama-bpe" | "falcon3" | "pixtral" | "lfm2" => {
                Self::Llama3 { merges: false }
            }
            "dbrx" | "smaug-bpe" => Self::Llama3 { merges: true },
            "qwen2" | "deepseek-r1-qwen" | "megrez" => Self::Qwen2,
            "tekken" => Self::Tekken,
            "smollm" | "starcoder" | "refact" | "command-r" | "codeshell" | "exaone"
            | "minerva-7b" => Self::SmolLm,
            _ => return None,
        })
    }

    /// Whether a piece that is a token stays one without merging.
    pub(crate) fn ignores_merges(self) -> bool {
        matches!(self, Self::Llama3 { merges: false } | Self::Tekken)
    }

    /// Whether texts begin with BOS where the file does not say.
    pub(crate) fn adds_bos(self) -> bool {
        self.ignores_merges()
    }

    /// As `tokenizer.json` has it.
    pub(crate) fn to_json(self) -> Value {
        let bytes = |use_regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex});
        let first = match self {
            Self::Gpt2 => return bytes(true),
            Self::SmolLm => json!({"type": "Digits", "individual_digits": true}),
            Self::Gpt4o => split(GPT4O),
            Self::Llama3 { .. } => split(LLAMA3),
            Self::Qwen2 => split(QWEN2),
            Self::Tekken => split(TEKKEN),
        };
        json!({"type": "Sequence", "pretokenizers": [first, bytes(self == Self::SmolLm)]})
    }
}

fn split(expression: &str) -> Value {
    json!({
        "type": "Split",
        "pattern": {"Regex": expression},
        "behavior": "Isolated",
        "invert": false,
    })
}
