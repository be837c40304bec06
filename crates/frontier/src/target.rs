//! Targets: which runtime is to load the result, and what it can store.

use crate::treatment::Format;
use crate::{Error, Result};
use causal_lm::Decoder;
use lowrank_eora::compress::Mix;
use prune_structured::gguf;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// The runtime that loads the result.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Target {
    /// causal-lm, which multiplies with every weight as it is stored: a folder whose linears differ in width, and in GPTQ's
    /// bits and groups or GGUF's block types, and a PEFT adapter whose ranks differ.
    #[default]
    Here,
    /// llama.cpp: a GGUF file, and a LoRA in another one. Widths may differ by block where the model is a Llama, Mistral
    /// or Qwen2.
    Gguf,
    /// vLLM: a GPTQ folder of symmetric grids with one group size, the same widths in all blocks, and a PEFT adapter of
    /// one rank.
    Vllm,
}

/// Names of [`Target`]s.
pub const TARGETS: [&str; 3] = ["here", "gguf", "vllm"];

/// What `here` chooses from: 8.2, 6.6, 5.5, 4.6, 4.2, 3.3 and 2.6 bits per weight. Groups have no 5 and 6 bits, and other bits
/// in groups go into rows that are no whole blocks of the K types.
const HERE: [&str; 7] = [
    "gptq-int8-g128",
    "gptq-q6_k",
    "gptq-q5_k",
    "gptq-int4-g32",
    "gptq-int4-g128",
    "gptq-int3-g64",
    "gptq-int2-g32",
];
/// Block types for llama.cpp.
const GGUF: [&str; 6] = [
    "q8_0",
    "gptq-q6_k",
    "gptq-q5_k",
    "gptq-q4_k",
    "gptq-q3_k",
    "gptq-q2_k",
];
/// What vLLM's GPTQ kernels serve.
const VLLM: [&str; 2] = ["gptq-int8-g128-sym", "gptq-int4-g128-sym"];

impl Target {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Here => TARGETS[0],
            Self::Gguf => TARGETS[1],
            Self::Vllm => TARGETS[2],
        }
    }

    /// The formats that it chooses from by default, with that of the model first, most bits first.
    pub fn formats(self) -> Vec<Format> {
        let names: &[&str] = match self {
            Self::Here => &HERE,
            Self::Gguf => &GGUF,
            Self::Vllm => &VLLM,
        };
        let quantised = names.iter().map(|name| name.parse());
        let quantised = quantised.map(|format| format.expect("the name of a compressor"));
        std::iter::once(Format::Stored).chain(quantised).collect()
    }

    /// The mixes of block types that llama.cpp's quantiser offers, with codes by GPTQ, most bits first; none where a target
    /// does not store them.
    pub(crate) fn mixes(self, decoder: &Decoder<'_>) -> Vec<Format> {
        // Where experts are, the types of a mix depend on their number.
        if self == Self::Vllm || has_experts(decoder) {
            return Vec::new();
        }
        let format = |mix: &Mix| format!("gptq-{}", mix.name()).parse();
        let formats = Mix::ALL.iter().rev().map(format);
        let formats = formats.map(|format| format.expect("the name of a compressor"));
        formats.collect()
    }

    /// Whether it stores this format at all.
    ///
    /// # Errors
    /// [`Error::Format`] with the reason.
    pub fn check(self, format: Format) -> Result<()> {
        let Format::Quantised(compressor) = format else {
            return Ok(());
        };
        let refuse = |reason| {
            Err(Error::Format {
                target: self.name(),
                format: format.to_string(),
                reason,
            })
        };
        match (self, compressor.blocks.is_some()) {
            _ if format.is_mix() => {
                refuse("a mix gives each linear a type of its own; name the types")
            }
            _ if compressor.prune.is_some() => refuse("single weights are not pruned here"),
            (Self::Gguf, false) => refuse("it stores GGUF block types"),
            (Self::Vllm, true) => refuse("it stores groups of integers, as GPTQ does"),
            (Self::Vllm, false) if !format.to_string().contains("-sym") => {
                refuse("its kernels take symmetric grids (suffix -sym)")
            }
            (Self::Vllm, false) if !format.has_bits(&[4, 8]) => {
                refuse("its kernels take 4 and 8 bits")
            }
            _ => Ok(()),
        }
    }

    /// Whether it stores models of this architecture.
    ///
    /// # Errors
    /// [`Error::Experts`] for mixtures and [`Target::Vllm`]; causal-lm's error for mixtures whose router rows share experts.
    pub fn check_model(self, decoder: &Decoder<'_>) -> Result<()> {
        decoder
            .config()
            .refuse_expert_map("dividing a budget over it")?;
        match self == Self::Vllm && has_experts(decoder) {
            false => Ok(()),
            true => Err(Error::Experts {
                target: self.name(),
                model_type: decoder.config().model_type,
                reason: "no export of quantised experts was checked against it; use `here` or `gguf`",
            }),
        }
    }

    /// Whether all blocks must have the same widths.
    pub fn needs_equal_widths(self, decoder: &Decoder<'_>) -> bool {
        match self {
            Self::Here => false,
            Self::Vllm => true,
            Self::Gguf => !gguf::takes_widths_by_block(decoder),
        }
    }

    /// Whether every block must have all its heads.
    pub fn keeps_heads(self, decoder: &Decoder<'_>) -> bool {
        self == Self::Gguf && gguf::keeps_heads(decoder)
    }

    /// Whether all linears must have the same rank.
    pub fn needs_equal_ranks(self) -> bool {
        self == Self::Vllm
    }

    /// Whether it stores the embedding and the head in other formats than the model's.
    pub fn quantises_matrices(self) -> bool {
        self != Self::Vllm
    }
}

fn has_experts(decoder: &Decoder<'_>) -> bool {
    decoder.config().mixtures.iter().any(Option::is_some)
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Target {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        let all = [Self::Here, Self::Gguf, Self::Vllm];
        let found = all.into_iter().find(|target| target.name() == name);
        found.ok_or_else(|| Error::Name {
            what: "target",
            name: name.to_string(),
            expected: "here, gguf or vllm",
        })
    }
}
