//! GGUF: a decoder as one file that llama.cpp opens.
//!
//! Any decoder that causal-lm opens can be exported: dense, pruned, or with low-rank factors merged
//! in. What the file says is in `metadata`, which tensors it holds in `tensors`, the
//! vocabulary in `tokenizer`; candle writes the container.
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
use candle_core::quantized::{GgmlDType, QTensor, gguf_file};
use causal_lm::config::QkNorm;
use causal_lm::{Decoder, Progress};
use std::io::{BufWriter, Write};
use std::path::Path;
use tensor_io::atomic::PendingFile;

/// How matrices are stored; vectors (norms and biases) are always f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Precision {
    /// 32-bit floats.
    F32,
    /// 16-bit floats.
    F16,
    /// bfloat16.
    Bf16,
    /// 8 bits and a scale for each 32 values of a row; f16 for matrices whose rows are no multiple
    /// of 32 long.
    Q8_0,
}

impl Precision {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::F32, Self::F16, Self::Bf16, Self::Q8_0];

    /// The name in file names and flags.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::Q8_0 => "q8_0",
        }
    }

    /// How a matrix with rows of `width` values is stored.
    fn of_rows(self, width: usize) -> GgmlDType {
        match self {
            Self::F32 => GgmlDType::F32,
            Self::Bf16 => GgmlDType::BF16,
            Self::Q8_0 if width.is_multiple_of(GgmlDType::Q8_0.block_size()) => GgmlDType::Q8_0,
            Self::F16 | Self::Q8_0 => GgmlDType::F16,
        }
    }

    /// `general.file_type`.
    fn file_type(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Q8_0 => 7,
            Self::Bf16 => 32,
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
/// candle writes the container from finished tensors, so that memory is as large as the file.
///
/// # Errors
/// [`Error::Export`] for what the format, or llama.cpp, cannot represent, [`Error::ExportFile`] for a tokenizer that it
/// does not know, [`Error::Cancelled`], and what writing reports. A failed run leaves `dst` as it was.
pub fn export(
    decoder: &Decoder<'_>,
    precision: Precision,
    dst: impl AsRef<Path>,
    progress: &dyn Progress,
) -> Result<Exported> {
    let dst = dst.as_ref();
    let architecture = Architecture::of(decoder)?;
    let metadata = metadata::metadata(decoder, architecture, precision)?;
    let mut parameters = 0;
    let mut tensors: Vec<(String, QTensor)> = Vec::new();
    let outputs = tensors::tensors(decoder, architecture)?;
    progress.begin("GGUF", outputs.len() as u64);
    for tensor in outputs {
        let values = tensor.load(decoder)?;
        let dims = values.dims();
        let dtype = match dims {
            [_, width] => precision.of_rows(*width),
            _ => GgmlDType::F32,
        };
        parameters += values.elem_count() as u64;
        tensors.push((tensor.name, QTensor::quantize(&values, dtype)?));
        progress.advance(1)?;
    }
    let metadata: Vec<_> = metadata.iter().map(|(k, v)| (k.as_str(), v)).collect();
    let tensors: Vec<_> = tensors.iter().map(|(k, v)| (k.as_str(), v)).collect();
    let mut file = PendingFile::create(dst)?;
    let mut buffer = BufWriter::new(file.as_file_mut());
    gguf_file::write(&mut buffer, &metadata, &tensors)?;
    buffer.flush().map_err(|reason| Error::ExportFile {
        path: dst.into(),
        reason: reason.to_string(),
    })?;
    drop(buffer);
    let bytes = file.persist()?;
    Ok(Exported { parameters, bytes })
}

/// Architectures that this export knows.
const EXPORTED: [&str; 4] = ["llama", "mistral", "qwen2", "qwen3"];

/// What a file declares itself to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Architecture {
    Llama,
    Deci,
    Qwen3,
}

impl Architecture {
    fn of(decoder: &Decoder<'_>) -> Result<Self> {
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
            (false, true) => Ok(Self::Llama),
            (false, false) => Ok(Self::Deci),
            (true, true) => Ok(Self::Qwen3),
            (true, false) => Err(unsupported(
                "Qwen3 with different widths in its layers",
                "the architecture that takes a width for each layer has no norms of q and k; export equal widths",
            )),
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Deci => "deci",
            Self::Qwen3 => "qwen3",
        }
    }

    /// Whether rotations pair neighbouring channels, not the halves of a head.
    fn rotates_neighbours(self) -> bool {
        matches!(self, Self::Llama | Self::Deci)
    }
}

fn unsupported(what: impl Into<String>, reason: impl Into<String>) -> Error {
    Error::Export {
        format: "GGUF",
        what: what.into(),
        reason: reason.into(),
    }
}
