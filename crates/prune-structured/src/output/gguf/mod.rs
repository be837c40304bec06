//! GGUF: a decoder as one file that llama.cpp opens.
//!
//! Any decoder that causal-lm opens can be exported: dense, pruned, or with low-rank factors merged
//! in. What the file says is in `metadata`, which tensors it holds in `tensors`, the
//! vocabulary in `tokenizer`.
//!
//! | model | architecture in the file | order of q and k |
//! |---|---|---|
//! | Llama, Mistral, Qwen2 with equal widths; Mixtral | `llama` | neighbours |
//! | Llama, Mistral, Qwen2 with different widths | `deci`: lists for heads, KV heads and neurons | neighbours |
//! | Granite, SmolLM3, Ministral 3, Granite's mixtures | `granite`, `smollm3`, `mistral3`, `granitemoe` | neighbours |
//! | Qwen3, mixtures of Qwen2 and Qwen3, OLMoE | `qwen3`, `qwen2moe`, `qwen3moe`, `olmoe` | as they are |
//! | Gemma 2, 3 and 4 | `gemma2`, `gemma3`, `gemma4`: norms are stored as they multiply | as they are |
//! | Phi-3, OLMo 2 and 3, GPT-NeoX, GLM-4 | `phi3`, `olmo2`, `gptneox`, `glm4` | as they are |
//!
//! Architectures of neighbours rotate neighbouring channels where Hugging Face rotates the two halves of a head, so that
//! the rows of q and k are reordered. Where the sliding window is not in the format, the context length is limited to it,
//! within which it changes nothing. What a graph of llama.cpp takes for granted and a model has otherwise is refused
//! (`check`), among it numbers of experts that differ by layer: a file states one.
//!
//! Of Phi-3 with factors for long sequences llama.cpp takes those by the context that it is run with, transformers by the
//! length of the text: run it with the original context for short texts.

mod check;
mod metadata;
mod rotation;
mod splits;
mod tensors;
mod tokenizer;

use crate::{Error, Result};
use causal_lm::{Decoder, Progress, Widths};
use packed::BlockType;
use std::path::Path;
use tensor_io::gguf::{BlockLayout, TensorSpec, Writer};

/// How matrices are stored; vectors (norms and biases) are always f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Precision(BlockType);

impl Precision {
    /// 32-bit floats.
    pub const F32: Self = Self(BlockType::F32);
    /// 16-bit floats.
    pub const F16: Self = Self(BlockType::F16);
    /// bfloat16.
    #[allow(non_upper_case_globals, reason = "the name that callers know")]
    pub const Bf16: Self = Self(BlockType::BF16);
    /// 8 bits and a scale for each 32 values of a row.
    pub const Q8_0: Self = Self(BlockType::Q8_0);

    /// All of them: floats, and every block type that llama.cpp quantises to.
    pub const ALL: [Self; 13] = [
        Self::F32,
        Self::F16,
        Self::Bf16,
        Self::Q8_0,
        Self(BlockType::Q5_1),
        Self(BlockType::Q5_0),
        Self(BlockType::Q4_1),
        Self(BlockType::Q4_0),
        Self(BlockType::Q6_K),
        Self(BlockType::Q5_K),
        Self(BlockType::Q4_K),
        Self(BlockType::Q3_K),
        Self(BlockType::Q2_K),
    ];

    /// The name in file names and flags.
    pub fn name(self) -> &'static str {
        match self.0 {
            BlockType::F32 => "f32",
            BlockType::F16 => "f16",
            BlockType::BF16 => "bf16",
            BlockType::Q5_1 => "q5_1",
            BlockType::Q5_0 => "q5_0",
            BlockType::Q4_1 => "q4_1",
            BlockType::Q4_0 => "q4_0",
            BlockType::Q6_K => "q6_k",
            BlockType::Q5_K => "q5_k",
            BlockType::Q4_K => "q4_k",
            BlockType::Q3_K => "q3_k",
            BlockType::Q2_K => "q2_k",
            _ => "q8_0",
        }
    }

    /// The type that matrices have whose rows are long enough.
    pub fn block_type(self) -> BlockType {
        self.0
    }
}

/// How a decoder is exported; made from a [`Precision`] alone where nothing else is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ExportOptions {
    /// How matrices are stored.
    pub precision: Precision,
    /// What was done to the model, written as strings under `prune.` and the name of each.
    pub provenance: Vec<(String, String)>,
}

impl From<Precision> for ExportOptions {
    fn from(precision: Precision) -> Self {
        Self {
            precision,
            provenance: Vec::new(),
        }
    }
}

impl ExportOptions {
    /// With one more thing that was done: `with_provenance("ratio", 0.2)`.
    pub fn with_provenance(mut self, name: &str, value: impl ToString) -> Self {
        self.provenance.push((name.into(), value.to_string()));
        self
    }
}

/// What an export wrote.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exported {
    /// Elements of all tensors.
    pub parameters: u64,
    /// Size of the file.
    pub bytes: u64,
}

/// Whether llama.cpp takes a model only with as many heads as make up its channels, so that none can be removed.
pub fn keeps_heads(decoder: &Decoder<'_>) -> bool {
    causal_lm::gguf::Architecture::of(decoder.config()).is_some_and(check::has_square_projections)
}

/// Whether blocks may differ in width in a file of this decoder.
pub fn takes_widths_by_block(decoder: &Decoder<'_>) -> bool {
    let config = decoder.config();
    let mixed = config.mixtures.iter().any(Option::is_some);
    let found = causal_lm::gguf::Architecture::of(config);
    !mixed && found.is_some_and(check::takes_widths_by_block)
}

/// Whether a model could be exported if its layers had these widths, those that it has or those that a plan keeps.
///
/// # Errors
/// [`Error::Export`] and [`Error::ExportFile`] as for [`export`].
pub fn check(decoder: &Decoder<'_>, widths: &[Widths]) -> Result<()> {
    let mut config = decoder.config().clone();
    config.widths = widths.to_vec();
    let architecture = check::architecture(decoder, &config)?;
    rotation::metadata(decoder, architecture)?;
    tokenizer::metadata(decoder, String::new()).map(drop)
}

/// Writes `decoder` as the GGUF file `dst`, replacing an older one. The tokenizer comes from the decoder's folder; a
/// step of `progress` is a tensor.
///
/// One tensor is in memory at a time. Blocks of a GGUF file that are wanted in the type that they have are copied bit for
/// bit.
///
/// # Errors
/// [`Error::Export`] for what the format, or llama.cpp, cannot represent, [`Error::ExportFile`] for a tokenizer that it
/// does not know and for values beyond the range of the type, [`Error::Cancelled`], and what writing reports. A failed
/// run leaves `dst` as it was.
pub fn export(
    decoder: &Decoder<'_>,
    options: impl Into<ExportOptions>,
    dst: impl AsRef<Path>,
    progress: &dyn Progress,
) -> Result<Exported> {
    let (options, dst) = (options.into(), dst.as_ref());
    let precision = options.precision;
    let architecture = check::architecture(decoder, decoder.config())?;
    let metadata = metadata::metadata(decoder, architecture, &options)?;
    let outputs = tensors::tensors(decoder, architecture)?;
    let mut parameters = 0;
    let mut specs = Vec::new();
    let mut types = Vec::new();
    for output in &outputs {
        let shape = output.shape.clone();
        let ty = match shape.last() {
            Some(&width) if !output.float => precision.0.for_rows(width),
            _ => BlockType::F32,
        };
        parameters += shape.iter().product::<usize>() as u64;
        let layout = BlockLayout::named(ty.name()).expect("the container knows every block type");
        specs.push(TensorSpec::new(&output.name, layout, shape));
        types.push(ty);
    }
    progress.begin("GGUF", outputs.len() as u64);
    let mut writer = Writer::create(dst, &metadata, &specs)?;
    for (output, ty) in outputs.iter().zip(types) {
        let bytes = output.bytes(decoder, ty).map_err(|error| match error {
            Error::Packed(reason) => Error::ExportFile {
                path: dst.into(),
                reason: format!("tensor {}: {reason}", output.name),
            },
            other => other,
        })?;
        writer.write(&output.name, &bytes)?;
        progress.advance(1)?;
    }
    let bytes = writer.finish()?;
    Ok(Exported { parameters, bytes })
}

fn unsupported(what: impl Into<String>, reason: impl Into<String>) -> Error {
    Error::Export {
        format: "GGUF",
        what: what.into(),
        reason: reason.into(),
    }
}
