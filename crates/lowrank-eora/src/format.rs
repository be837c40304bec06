//! How compressed weights are stored: GPTQ and compressed-tensors.
//!
//! [`QuantisedCheckpoint`] finds out from `config.json` how a published checkpoint stores its linears and gives back their
//! weights, exactly scale · (code − zero), so that any such model can be repaired. [`gptq`] also writes: it turns
//! [`Quantised`] weights into the tensors and the configuration that GPTQ runtimes load. Pruned weights are written dense
//! with exact zeros: runtimes have dropped the sparse formats, which are only read here.

mod bits;
pub mod compressed_tensors;
pub mod gguf;
pub mod gptq;
mod sparse;
mod stored;
#[cfg(test)]
mod tests;

use std::fmt::{self, Display, Formatter};

use candle_core::{DType, Device, Tensor};
use causal_lm::gguf::GgufTensors;
use faer::Mat;
use packed::{BlockType, QuantRows};
use tensor_io::{Checkpoint, Config};

use crate::compress::{Quantised, Rows};
use crate::{Error, Result};

/// How the linears of a checkpoint are stored.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Format {
    /// As floats.
    Dense,
    /// As GPTQ's `qweight`, `qzeros`, `scales` and `g_idx`.
    Gptq {
        /// Which convention for zero points.
        version: gptq::Version,
        /// Bits per weight, unless a module's tensors say otherwise.
        bits: usize,
        /// Inputs per group, unless a module's tensors say otherwise; None for one group per output.
        group_size: Option<usize>,
    },
    /// As compressed-tensors' `weight_packed`, `weight_scale`, `weight_zero_point` and `weight_g_idx`.
    PackQuantized {
        /// Bits per weight.
        bits: usize,
        /// Inputs per group; None for one group per output.
        group_size: Option<usize>,
        /// Whether zero points are all zero, and not stored.
        symmetric: bool,
    },
    /// As blocks of a GGUF file.
    Gguf,
    /// As the values that are not zero and a bit for every weight: compressed-tensors' `sparse-bitmask` and
    /// `sparse-24-bitmask`.
    SparseBitmask,
}

impl Display for Format {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let (name, bits, group_size) = match self {
            Self::Dense => return f.write_str("dense"),
            Self::SparseBitmask => return f.write_str("compressed-tensors sparse bitmask"),
            Self::Gguf => return f.write_str("GGUF"),
            Self::Gptq {
                version,
                bits,
                group_size,
            } => (version.name(), bits, group_size),
            Self::PackQuantized {
                bits, group_size, ..
            } => ("compressed-tensors pack-quantized", bits, group_size),
        };
        match group_size {
            Some(width) => write!(f, "{name}, {bits} bits, groups of {width}"),
            None => write!(f, "{name}, {bits} bits, one group per output"),
        }
    }
}

/// A checkpoint whose linears may be stored compressed.
#[derive(Debug)]
pub struct QuantisedCheckpoint<'a> {
    checkpoint: &'a Checkpoint,
    format: Format,
}

impl<'a> QuantisedCheckpoint<'a> {
    /// Finds out how the linears are stored: from `quantization_config` (or `compression_config`) in `config.json`, else from
    /// AutoGPTQ's `quantize_config.json` beside it; dense if there is neither.
    ///
    /// # Errors
    /// [`Error::UnsupportedFormat`]; [`Error::Checkpoint`] for a field of another kind than expected.
    pub fn open(checkpoint: &'a Checkpoint) -> Result<Self> {
        if gguf_tensors(checkpoint).is_some() {
            let format = Format::Gguf;
            return Ok(Self { checkpoint, format });
        }
        let config = checkpoint.config();
        let section = match config.opt_section("quantization_config")? {
            Some(section) => Some(section),
            None => match config.opt_section("compression_config")? {
                Some(section) => Some(section),
                None => {
                    let beside = checkpoint.dir().join(gptq::CONFIG_FILE);
                    match beside.is_file() {
                        true => Some(gptq::from_file(Config::read(beside)?)),
                        false => None,
                    }
                }
            },
        };
        let format = match section {
            None => Format::Dense,
            Some(section) => detect(&section).map_err(|found| match found {
                Found::Unknown(found) => Error::UnsupportedFormat {
                    path: checkpoint.dir().to_path_buf(),
                    found,
                },
                Found::Malformed(error) => error.into(),
            })?,
        };
        Ok(Self { checkpoint, format })
    }

    /// How the linears are stored.
    pub fn format(&self) -> &Format {
        &self.format
    }

    /// Paths of the modules whose weight is stored compressed (`model.layers.0.mlp.up_proj`), in the order of the files.
    pub fn modules(&self) -> Vec<&'a str> {
        let suffix = match self.format {
            Format::Dense => return Vec::new(),
            Format::Gguf => ".weight",
            Format::Gptq { .. } => ".qweight",
            Format::PackQuantized { .. } => ".weight_packed",
            Format::SparseBitmask => ".bitmask",
        };
        let names = self.checkpoint.names();
        names
            .filter(|name| self.format != Format::Gguf || self.blocks_of(name).is_some())
            .filter_map(|name| name.strip_suffix(suffix))
            .map(|module| module.strip_suffix(".weight").unwrap_or(module))
            .collect()
    }

    /// The stored form of a module's weight; None if it is not quantised.
    ///
    /// # Errors
    /// [`Error::StoredTensor`] for tensors that do not fit each other, [`Error::Checkpoint`] for those that are missing.
    pub fn quantised(&self, module: &str) -> Result<Option<Quantised>> {
        match self.format {
            Format::Gptq {
                version,
                bits,
                group_size,
            } if self.has(module, "qweight") => {
                gptq::read(self.checkpoint, module, version, bits, group_size).map(Some)
            }
            Format::PackQuantized {
                bits,
                group_size,
                symmetric,
            } if self.has(module, "weight_packed") => {
                compressed_tensors::read(self.checkpoint, module, bits, group_size, symmetric)
                    .map(Some)
            }
            _ => Ok(None),
        }
    }

    /// The blocks of a module's weight, rows in the order of Hugging Face; None if it is not in blocks.
    ///
    /// # Errors
    /// Blocks whose scales are not finite.
    pub fn blocks(&self, module: &str) -> Result<Option<QuantRows<'static>>> {
        let name = format!("{module}.weight");
        let Some(tensors) =
            gguf_tensors(self.checkpoint).filter(|_| self.blocks_of(&name).is_some())
        else {
            return Ok(None);
        };
        Ok(tensors.packed(&name)?.map(QuantRows::into_owned))
    }

    /// The block type of a tensor, where it has one.
    pub(crate) fn blocks_of(&self, name: &str) -> Option<BlockType> {
        let ty = gguf_tensors(self.checkpoint)?.block_type(name)?;
        ty.is_quantised().then_some(ty)
    }

    /// A module's weight, `m × n`, as a reader computing without rounding gets it.
    ///
    /// # Errors
    /// As [`QuantisedCheckpoint::quantised`].
    pub fn weight(&self, module: &str) -> Result<Mat<f64>> {
        if let Some(quantised) = self.quantised(module)? {
            return Ok(quantised.dequantise());
        }
        if self.format == Format::SparseBitmask
            && let Some(prefix) = sparse::prefix(self.checkpoint, module)
        {
            return sparse::read(self.checkpoint, &prefix);
        }
        let name = format!("{module}.weight");
        let (values, shape) = stored::floats(self.checkpoint, &name)?;
        let [rows, cols] = stored::matrix(&name, &shape)?;
        Ok(Rows::new(values, rows, cols).to_mat())
    }

    /// As [`QuantisedCheckpoint::weight`], as a tensor `[m, n]` rounded to `dtype`.
    ///
    /// # Errors
    /// As [`QuantisedCheckpoint::quantised`], and [`Error::Candle`].
    pub fn tensor(&self, module: &str, dtype: DType, device: &Device) -> Result<Tensor> {
        let rows = Rows::read(self.weight(module)?.as_ref(), "stored weight")?;
        rows.to_tensor(dtype, device)
    }

    fn has(&self, module: &str, tensor: &str) -> bool {
        self.checkpoint.contains(&format!("{module}.{tensor}"))
    }
}

/// The GGUF file behind a checkpoint, if it is one.
pub(crate) fn gguf_tensors(checkpoint: &Checkpoint) -> Option<&GgufTensors> {
    checkpoint.source()?.as_any().downcast_ref()
}

/// Why a configuration does not lead to a format.
enum Found {
    /// It names another one.
    Unknown(String),
    /// It cannot be read.
    Malformed(tensor_io::Error),
}

impl From<tensor_io::Error> for Found {
    fn from(error: tensor_io::Error) -> Self {
        Self::Malformed(error)
    }
}

fn detect(section: &Config) -> std::result::Result<Format, Found> {
    match section.opt_str("quant_method")? {
        Some("gptq") => gptq::detect(section),
        // Older compressed-tensors configurations do not name themselves.
        Some("compressed-tensors" | "sparseml") | None => compressed_tensors::detect(section),
        Some(other) => Err(Found::Unknown(format!("quant_method `{other}`"))),
    }
}
