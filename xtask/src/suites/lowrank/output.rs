//! What can be written of a repaired model.

use std::fmt::{self, Display, Formatter};

use clap::ValueEnum;
use lowrank_eora::output::Layout;
use lowrank_eora::output::gptq::Version;

/// Something to write.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// LoRA adapter folder for PEFT and vLLM; names the compressed model as its base, which must be saved too
    Adapter,
    /// Compressed model with weights as floats
    Compressed,
    /// Compressed model packed as GPTQ
    Gptq,
    /// The same with zero points stored unchanged (checkpoint_format gptq_v2)
    #[value(alias = "gptq_v2")]
    GptqV2,
    /// Compressed model packed as compressed-tensors, for vLLM
    CompressedTensors,
    /// Compressed model as a GGUF file, for llama.cpp
    Gguf,
    /// Low-rank factors as a GGUF file, for llama.cpp on the GGUF model
    LoraGguf,
    /// Mean squares of the inputs of every linear, for quantisers of llama.cpp
    Imatrix,
    /// The same in the older form (.dat)
    ImatrixDat,
    /// Dense model with the factors merged into the weights
    Merged,
    /// The merged model packed as GPTQ again; needs --requantise
    Requantised,
    /// Inputs and expected outputs of each linear, to check a runtime with
    Probe,
}

impl Display for Output {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let value = self.to_possible_value();
        f.write_str(value.as_ref().map_or("", |value| value.get_name()))
    }
}

impl Output {
    /// The file or folder within that of a cell.
    pub(super) fn file_name(self) -> String {
        match self {
            Self::LoraGguf => "lora.gguf".into(),
            Self::Gguf => "model.gguf".into(),
            Self::Imatrix => "imatrix.gguf".into(),
            Self::ImatrixDat => "imatrix.dat".into(),
            Self::Probe => "probe.safetensors".into(),
            folder => folder.to_string(),
        }
    }

    /// Whether it consists of factors, or of weights with factors in them.
    pub(super) fn needs_factors(self) -> bool {
        matches!(
            self,
            Self::Adapter | Self::LoraGguf | Self::Merged | Self::Requantised
        )
    }

    /// Whether it needs the codes that a compressor made.
    pub(super) fn is_of_the_compressor(self) -> bool {
        matches!(
            self,
            Self::Gptq | Self::GptqV2 | Self::CompressedTensors | Self::Gguf
        )
    }

    /// Outputs of which one has to be written beside this one.
    pub(super) fn bases(self) -> &'static [Output] {
        match self {
            Self::Adapter => &[
                Self::Gptq,
                Self::GptqV2,
                Self::CompressedTensors,
                Self::Compressed,
            ],
            Self::LoraGguf => &[Self::Gguf],
            _ => &[],
        }
    }

    /// How a folder of this kind stores its linears.
    pub(super) fn layout(self) -> Option<Layout> {
        let gptq = |version| Some(Layout::Gptq { version });
        match self {
            Self::Gptq => gptq(Version::V1),
            Self::GptqV2 | Self::Requantised => gptq(Version::V2),
            Self::CompressedTensors => Some(Layout::CompressedTensors),
            Self::Compressed | Self::Merged => Some(Layout::Dense { dtype: None }),
            Self::Adapter
            | Self::Gguf
            | Self::LoraGguf
            | Self::Imatrix
            | Self::ImatrixDat
            | Self::Probe => None,
        }
    }
}
