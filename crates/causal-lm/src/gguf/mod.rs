//! GGUF files as checkpoints: opened under the names of Hugging Face, so that a decoder runs from them as from a folder.
//!
//! The metadata become a config, tensors get the names and the order of rows that Hugging Face has, and blocks are decoded
//! when they are asked for ([`open`]); the bytes of the blocks themselves stay reachable ([`GgufTensors::packed`]). The
//! tokenizer is rebuilt from the metadata (`tokenizer`).
//!
//! | architecture in the file | model type | rows of q and k |
//! |---|---|---|
//! | `llama` | llama (and Mistral, SmolLM, Qwen2 in this form), mixtral | rotated channels are neighbours |
//! | `deci` | llama with widths for each layer | the same |
//! | `granite`, `granitemoe`, `smollm3`, `mistral3` | granite (without rotation granitemoehybrid), granitemoe, smollm3, ministral3 | the same |
//! | `qwen2`, `qwen3`, `qwen2moe`, `qwen3moe`, `olmoe` | the same | as in Hugging Face |
//! | `gemma2`, `gemma3`, `gemma4` | gemma2, gemma3_text, gemma4_text: norms hold what they multiply with | the same |
//! | `phi3`, `glm4`, `olmo2`, `gptneox` | phi3, glm4, olmo2 or olmo3, gpt_neox | the same |
//!
//! Which tensors of a file are which is in [`layout`], which exports use too.

mod config;
mod families;
pub mod layout;
pub mod names;
mod order;
mod places;
mod rotation;
mod tensors;
pub(crate) mod tokenizer;

use std::path::Path;

use tensor_io::gguf::{Gguf, GgufError, Metadata};
use tensor_io::{Checkpoint, Error};

use crate::Result;
pub use names::Architecture;
pub use order::Order;
pub use tensors::GgufTensors;
pub use tokenizer::{STRIP_NOTHING, TokenKind, strips_behind_tokens};

/// Opens a GGUF file, or any part of a split one, as a checkpoint. Nothing but the header is read.
///
/// # Errors
/// What [`Gguf::open`] refuses; a file that is no model, an architecture that is not supported, missing keys and tensors
/// without a place in the model.
pub fn open(path: impl AsRef<Path>) -> Result<Checkpoint> {
    from_file(Gguf::open(path)?)
}

/// The checkpoint of a GGUF file that is open already.
///
/// # Errors
/// As [`open`].
pub fn from_file(file: Gguf) -> Result<Checkpoint> {
    let architecture = architecture(&file)?;
    let config = config::config(&file, architecture)?;
    let path = file.path().to_path_buf();
    let (specs, tensors) = places::find(file, architecture, &config)?;
    Ok(Checkpoint::from_source(
        path,
        config,
        specs,
        Box::new(tensors),
    )?)
}

/// Whether `path` is a file that begins as GGUF files do.
pub fn is_gguf(path: &Path) -> bool {
    let mut magic = [0; 4];
    let read = std::fs::File::open(path)
        .and_then(|mut file| std::io::Read::read_exact(&mut file, &mut magic));
    path.is_file() && read.is_ok() && magic == tensor_io::gguf::MAGIC
}

/// The number whose inverse square root multiplies attention logits in llama.cpp's Gemma 2 and 3, which files do not state:
/// the width of a head, or in the largest models the hidden size over the heads. `widths` are hidden size, heads and head.
pub fn attention_width(
    architecture: Architecture,
    layers: usize,
    widths: (usize, usize, usize),
) -> f64 {
    let (hidden, heads, head_dim) = widths;
    let largest = match architecture {
        Architecture::Gemma2 => layers == 46,
        _ => layers == 62,
    };
    match largest {
        true => (hidden / heads.max(1)) as f64,
        false => head_dim as f64,
    }
}

fn architecture(file: &Gguf) -> Result<Architecture> {
    let metadata = file.metadata();
    if let Some(kind) = metadata.get_str("general.type")?
        && kind != "model"
    {
        return Err(content(
            &metadata,
            format!("general.type is {kind:?}, expected \"model\""),
        ));
    }
    let name = metadata.required("general.architecture", Metadata::get_str)?;
    Architecture::named(name).ok_or_else(|| {
        let known: Vec<&str> = Architecture::ALL.iter().map(|known| known.name()).collect();
        let known = known.join(", ");
        content(
            &metadata,
            format!("architecture {name:?} is not supported (supported: {known})"),
        )
    })
}

/// An error about what a well-formed file says.
pub(crate) fn content(metadata: &Metadata<'_>, what: impl Into<String>) -> crate::Error {
    // Names in a damaged file may hold line breaks.
    let escape = |c: char| match c.is_control() {
        true => c.escape_default().to_string(),
        false => c.to_string(),
    };
    let what = what.into().chars().map(escape).collect();
    Error::into(metadata.error(GgufError::Content(what)))
}
