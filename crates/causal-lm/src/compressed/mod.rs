//! Folders whose linears are stored compressed: GPTQ, compressed-tensors and blocks of GGUF's types, opened under the names of
//! the dense weights.
//!
//! [`Format::detect`] finds out from `config.json` how a checkpoint stores its linears. [`open`] gives a checkpoint that
//! decodes each weight when it is asked for, exactly scale · (code − zero); the codes themselves stay reachable
//! ([`CompressedTensors::groups`]), so that a decoder multiplies with them as they are.

pub mod bits;
pub mod blocks;
pub mod compressed_tensors;
pub mod gptq;
mod sparse;
mod stored;
mod tensors;

use std::fmt::{self, Display, Formatter};

use packed::{GroupBits, GroupParts, Groups};
use tensor_io::{Checkpoint, Config};

use crate::{Error, Result};
pub use sparse::Sparse;
pub use tensors::CompressedTensors;

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
        /// Whether the configuration says that the grid is symmetric, so that every zero point is the middle code.
        symmetric: bool,
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
    /// As blocks of the same types in a folder ([`blocks`]).
    Blocks,
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
            Self::Blocks => return f.write_str("blocks of GGUF's types"),
            Self::Gptq {
                version,
                bits,
                group_size,
                ..
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

/// Config fields that say how linears are stored.
const SECTIONS: [&str; 2] = ["quantization_config", "compression_config"];

impl Format {
    /// How the linears are stored: from `quantization_config` (or `compression_config`) in `config.json`, else from
    /// AutoGPTQ's `quantize_config.json` beside it; dense if there is neither.
    ///
    /// # Errors
    /// [`Error::UnsupportedFormat`]; [`Error::Checkpoint`] for a field of another kind than expected.
    pub fn detect(checkpoint: &Checkpoint) -> Result<Self> {
        let config = checkpoint.config();
        let mut section = None;
        for field in SECTIONS {
            if section.is_none() {
                section = config.opt_section(field)?;
            }
        }
        if section.is_none() {
            let beside = checkpoint.dir().join(gptq::CONFIG_FILE);
            if beside.is_file() {
                section = Some(gptq::from_file(Config::read(beside)?));
            }
        }
        let Some(section) = section else {
            return Ok(Self::Dense);
        };
        let found = match section.opt_str("quant_method")? {
            Some("gptq") => gptq::detect(&section),
            Some(blocks::METHOD) => Ok(Self::Blocks),
            // Older compressed-tensors configurations do not name themselves.
            Some("compressed-tensors" | "sparseml") | None => compressed_tensors::detect(&section),
            Some(other) => Err(Found::Unknown(format!("quant_method `{other}`"))),
        };
        found.map_err(|found| match found {
            Found::Unknown(found) => Error::UnsupportedFormat {
                path: checkpoint.dir().to_path_buf(),
                found,
            },
            Found::Malformed(error) => error.into(),
        })
    }
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

/// Opens a folder whose linears may be stored compressed, under the names of the dense weights.
///
/// # Errors
/// What [`Checkpoint::open`] and [`Format::detect`] report, and tensors of a module that do not fit each other.
pub fn open(dir: impl AsRef<std::path::Path>) -> Result<Checkpoint> {
    let checkpoint = Checkpoint::open(dir)?;
    match Format::detect(&checkpoint)? {
        Format::Dense => Ok(checkpoint),
        format => tensors::decoded(checkpoint, format),
    }
}

/// A weight as codes, with scale and zero for each group of each output: w = scale · (code − zero).
#[derive(Debug, Clone, PartialEq)]
pub struct StoredGroups {
    /// Bits per code.
    pub bits: GroupBits,
    /// Outputs.
    pub rows: usize,
    /// Inputs.
    pub cols: usize,
    /// Inputs in a group; the last group may have fewer.
    pub group_width: usize,
    /// Codes, row-major `[rows, cols]`.
    pub codes: Vec<u8>,
    /// Scales, row-major `[rows, groups]`.
    pub scales: Vec<f64>,
    /// Zero points, row-major `[rows, groups]`.
    pub zeros: Vec<u8>,
    /// The group of each input, `[cols]`.
    pub group_index: Vec<u32>,
}

impl StoredGroups {
    /// Groups per output.
    pub fn groups(&self) -> usize {
        self.cols.div_ceil(self.group_width.max(1))
    }

    /// Values of a row, each rounded once.
    fn row(&self, row: usize) -> impl Iterator<Item = f32> {
        let groups = self.groups();
        let codes = &self.codes[row * self.cols..][..self.cols];
        codes
            .iter()
            .zip(&self.group_index)
            .map(move |(&code, &group)| {
                let group = row * groups + group as usize;
                let centred = f64::from(code) - f64::from(self.zeros[group]);
                (self.scales[group] * centred) as f32
            })
    }

    /// The same weights to be multiplied as they are. Given `rows`, only those.
    ///
    /// # Errors
    /// [`packed::Error::GroupScale`] for a scale that is no f16 value, [`packed::Error::GroupWidth`] and
    /// [`packed::Error::GroupIndex`] for groups that no kernel serves, which can only run decoded; others for malformed ones.
    pub fn packed(&self, rows: Option<&[usize]>) -> packed::Result<Groups> {
        use half::f16;
        let groups = self.groups();
        let scale = |(at, &scale): (usize, &f64)| {
            let half = f16::from_f64(scale);
            match scale.is_nan() || half.to_f64() == scale {
                true => Ok(half),
                false => Err(packed::Error::GroupScale {
                    row: at / groups,
                    group: at % groups,
                }),
            }
        };
        let scales = self.scales.iter().enumerate();
        let scales: Vec<f16> = scales.map(scale).collect::<packed::Result<_>>()?;
        fn select<T: Copy>(all: &[T], width: usize, rows: Option<&[usize]>) -> Vec<T> {
            match rows {
                None => all.to_vec(),
                Some(rows) => {
                    let row = |&row: &usize| all[row * width..][..width].iter().copied();
                    rows.iter().flat_map(row).collect()
                }
            }
        }
        let parts = GroupParts {
            bits: self.bits,
            rows: rows.map_or(self.rows, <[usize]>::len),
            cols: self.cols,
            width: self.group_width,
            codes: select(&self.codes, self.cols, rows),
            scales: select(&scales, groups, rows),
            zeros: Some(select(&self.zeros, groups, rows)),
            group_index: Some(self.group_index.clone()),
        };
        Groups::new(parts)
    }
}

fn group_bits(bits: usize) -> Option<GroupBits> {
    GroupBits::new(u32::try_from(bits).ok()?)
}
