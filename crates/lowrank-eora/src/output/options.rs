//! What is written as a checkpoint, and how.

use crate::format::gptq;
use candle_core::DType;
use tensor_io::WriteOptions;

/// Which weights are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Weights {
    /// W_c, on top of which the adapter goes.
    Compressed,
    /// W_c + B A, rounded to the stored dtype.
    Merged,
    /// W_c' of the merge by requantisation; the repair must have asked for it.
    Requantised,
}

/// How they are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Layout {
    /// As floats: pruned weights as zeros, quantised ones as the nearest values of the dtype.
    Dense {
        /// Dtype of all floats; `None` keeps that of the dense checkpoint.
        dtype: Option<DType>,
    },
    /// Packed as GPTQ. Pruned weights are stored as the code of zero.
    Gptq {
        /// Convention for zero points.
        version: gptq::Version,
    },
    /// Packed as compressed-tensors' `pack-quantized`, which llm-compressor and vLLM use.
    CompressedTensors,
}

impl Layout {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Dense { .. } => "floats",
            Self::Gptq { .. } => "gptq",
            Self::CompressedTensors => "compressed-tensors",
        }
    }
}

/// How a checkpoint is written.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct CheckpointOptions {
    /// Which weights.
    pub weights: Weights,
    /// How they are stored.
    pub layout: Layout,
    /// Size of files, and whether a checkpoint that is there is replaced.
    pub write: WriteOptions,
}

impl CheckpointOptions {
    /// These weights in this layout, in files of the usual size; an existing checkpoint is not replaced.
    pub fn new(weights: Weights, layout: Layout) -> Self {
        Self {
            weights,
            layout,
            write: WriteOptions::default(),
        }
    }

    /// Size of files, and whether a checkpoint that is there is replaced.
    pub fn with_write(self, write: WriteOptions) -> Self {
        Self { write, ..self }
    }
}
