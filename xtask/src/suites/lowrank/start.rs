//! The compressed models that repairs start from: what a compressor makes, or a given one.

use std::path::Path;

use anyhow::{Context, Result};
use candle_core::DType;
use causal_lm::Decoder;
use lowrank_eora::compress::Compressor;
use lowrank_eora::repair::{CompressedModel, Format, LayerId, Source};
use tensor_io::Checkpoint;

use super::super::perplexity::file_name;
use super::config::Config;
use super::gguf::InGguf;
use crate::settings::Settings;

/// A model that another tool compressed.
pub(crate) struct GivenModel<'a> {
    pub(super) source: CompressedModel<'a>,
    pub(super) checkpoint: &'a Checkpoint,
    /// The decoder of the model itself, where its tensors are readable as they are: what it quantised besides linears
    /// is then measured too.
    pub(super) decoder: Option<Decoder<'a>>,
    /// Bytes of everything but the linears.
    pub(super) rest_bytes: u64,
}

impl<'a> GivenModel<'a> {
    pub(super) fn open(settings: &Settings, checkpoint: &'a Checkpoint) -> Result<Self> {
        let source = CompressedModel::open(checkpoint)?;
        let decoder = match source.format() {
            Format::Dense | Format::Gguf => Some(open(settings, checkpoint)?),
            _ => None,
        };
        let mut rest_bytes = 0;
        for name in checkpoint.names() {
            let module = name.rsplit_once('.').map_or(name, |(module, _)| module);
            if LayerId::parse(module).is_none() {
                rest_bytes += match checkpoint.source() {
                    Some(source) => source.stored(name)?.len(),
                    None => checkpoint.info(name)?.bytes,
                } as u64;
            }
        }
        Ok(Self {
            source,
            checkpoint,
            decoder,
            rest_bytes,
        })
    }

    pub(super) fn is_gguf(&self) -> bool {
        matches!(self.source.format(), Format::Gguf)
    }
}

/// A compressed model that repairs start from.
pub(super) struct Start<'a> {
    /// The compressor's name, or the file's.
    pub(super) name: String,
    pub(super) source: &'a dyn Source,
    /// What spends bytes in the same way, to compare with at other sizes.
    pub(super) alike: Option<Compressor>,
    /// The given model that it is, or is compared with.
    pub(super) given: Option<&'a GivenModel<'a>>,
    /// Whether the linears are the given model's.
    pub(super) is_given: bool,
    /// How a GGUF file holds it, where that is how it is measured.
    pub(super) in_gguf: Option<InGguf>,
}

impl<'a> Start<'a> {
    /// What `compressor` makes, as `source` makes it.
    pub(super) fn compressor(
        compressor: &Compressor,
        source: &'a dyn Source,
        in_gguf: Option<InGguf>,
    ) -> Self {
        Self {
            name: compressor.to_string(),
            source,
            in_gguf,
            alike: Some(*compressor),
            given: None,
            is_given: false,
        }
    }

    pub(super) fn given(
        config: &Config,
        given: &'a GivenModel<'a>,
        in_gguf: Option<InGguf>,
    ) -> Self {
        let path = config.compressed.as_deref().unwrap_or(Path::new(""));
        Self {
            name: file_name(path),
            source: &given.source,
            alike: given.source.alike(),
            given: Some(given),
            is_given: true,
            in_gguf,
        }
    }

    /// The same compressor for another source of the same weights.
    pub(super) fn with_source<'b>(&'b self, source: &'b dyn Source) -> Start<'b> {
        Start {
            name: self.name.clone(),
            source,
            alike: self.alike,
            given: self.given,
            is_given: self.is_given,
            in_gguf: self.in_gguf.clone(),
        }
    }
}

/// Types of the tensors of each start that is stored in GGUF blocks, by its name.
pub(super) fn types<'s>(starts: &'s [Start<'_>]) -> impl Iterator<Item = (&'s str, String)> {
    starts.iter().filter_map(|start| {
        let described = start.in_gguf.as_ref()?.described()?;
        Some((start.name.as_str(), described))
    })
}

/// A decoder that computes in f32 on every device: W_c + B A rounded to bf16 would lose what B A adds.
pub(super) fn open<'a>(settings: &Settings, checkpoint: &'a Checkpoint) -> Result<Decoder<'a>> {
    Decoder::new(checkpoint, DType::F32, &settings.device.open()?)
        .with_context(|| checkpoint.dir().display().to_string())
}
