//! GGUF: a decoder as one file that llama.cpp opens.
//!
//! Any decoder that causal-lm opens can be exported: dense, pruned, or with low-rank factors merged
//! in. What the file says is in `metadata`, which tensors it holds in `tensors`, the
//! vocabulary in `tokenizer`.
//!
//! | model | architecture in the file | read by |
//! |---|---|---|
//! | Llama, Mistral, Qwen2 with equal widths | `llama` | every llama.cpp with GGUF |
//! | the same with different widths | `deci`: lists for heads, KV heads and neurons | llama.cpp since December 2024 (pull request 10669) |
//! | Qwen3 with equal widths | `qwen3` | llama.cpp since April 2025 |
//!
//! `llama` and `deci` rotate neighbouring channels where Hugging Face rotates the two halves of a
//! head, so that the rows of q and k are reordered. Mistral's sliding window is not in the format:
//! the context length is limited to it, within which it changes nothing.

mod metadata;
mod tensors;
mod tokenizer;

use crate::{Error, Result};
use causal_lm::config::QkNorm;
use causal_lm::gguf::Architecture;
use causal_lm::{Decoder, Progress};
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

    /// The type of a matrix with rows of `width` values: as llama.cpp, a smaller block of at least as many bits where the
    /// block does not divide the row, and 16-bit floats where none does.
    pub fn of_rows(self, width: usize) -> BlockType {
        let smaller = match self.0 {
            BlockType::Q2_K | BlockType::Q3_K => BlockType::Q4_0,
            BlockType::Q4_K => BlockType::Q5_0,
            BlockType::Q5_K => BlockType::Q5_1,
            BlockType::Q6_K => BlockType::Q8_0,
            other => other,
        };
        let fits = |ty: &BlockType| width.is_multiple_of(ty.block_len());
        let fitting = [self.0, smaller].into_iter().find(fits);
        fitting.unwrap_or(BlockType::F16)
    }

    /// `general.file_type`.
    fn file_type(self) -> u32 {
        match self.0 {
            BlockType::F32 => 0,
            BlockType::F16 => 1,
            BlockType::BF16 => 32,
            BlockType::Q4_0 => 2,
            BlockType::Q4_1 => 3,
            BlockType::Q5_0 => 8,
            BlockType::Q5_1 => 9,
            BlockType::Q2_K => 10,
            BlockType::Q3_K => 11,
            BlockType::Q4_K => 14,
            BlockType::Q5_K => 16,
            BlockType::Q6_K => 18,
            _ => 7,
        }
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
    precision: Precision,
    dst: impl AsRef<Path>,
    progress: &dyn Progress,
) -> Result<Exported> {
    let dst = dst.as_ref();
    let architecture = architecture(decoder)?;
    let metadata = metadata::metadata(decoder, architecture, precision)?;
    let outputs = tensors::tensors(decoder, architecture)?;
    let mut parameters = 0;
    let mut specs = Vec::new();
    let mut types = Vec::new();
    for output in &outputs {
        let shape = output.shape(decoder)?;
        let ty = match shape[..] {
            [_, width] => precision.of_rows(width),
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

/// Model types that this export knows.
const EXPORTED: [&str; 4] = ["llama", "mistral", "qwen2", "qwen3"];

/// What the file declares itself to be.
fn architecture(decoder: &Decoder<'_>) -> Result<Architecture> {
    let config = decoder.config();
    if !EXPORTED.contains(&config.model_type) {
        return Err(unsupported(
            config.model_type,
            format!("this export knows {}", EXPORTED.join(", ")),
        ));
    }
    let whole = |w: &causal_lm::Widths| w.heads > 0 && w.neurons > 0;
    let uniform = config
        .widths
        .iter()
        .all(|w| whole(w) && *w == config.widths[0]);
    match (config.qk_norm != QkNorm::None, uniform) {
        (false, true) => Ok(Architecture::Llama),
        (false, false) => Ok(Architecture::Deci),
        (true, true) => Ok(Architecture::Qwen3),
        (true, false) => Err(unsupported(
            "Qwen3 with different widths in its layers",
            "the architecture that takes a width for each layer has no norms of q and k; export equal widths",
        )),
    }
}

fn unsupported(what: impl Into<String>, reason: impl Into<String>) -> Error {
    Error::Export {
        format: "GGUF",
        what: what.into(),
        reason: reason.into(),
    }
}
