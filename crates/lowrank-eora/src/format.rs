//! How compressed weights are stored: GPTQ, compressed-tensors and blocks of GGUF's types.
//!
//! [`QuantisedCheckpoint`] gives back the weights of published checkpoints, exactly scale · (code − zero), so that any such
//! model can be repaired. [`gptq`] and [`compressed_tensors`] write: they turn [`Quantised`] weights into the tensors and the
//! configuration that runtimes load. Pruned weights are written dense with exact zeros: runtimes have dropped the sparse
//! formats, which are only read.

pub mod compressed_tensors;
pub mod gguf;
pub mod gptq;
#[cfg(test)]
mod tests;

use candle_core::{DType, Device, Tensor};
pub use causal_lm::compressed::Format;
use causal_lm::compressed::{CompressedTensors, StoredGroups, blocks};
use causal_lm::gguf::GgufTensors;
use faer::Mat;
use packed::{BlockType, QuantRows};
use tensor_io::Checkpoint;

use crate::Result;
use crate::compress::{Bits, Quantised, Rows};

/// A checkpoint whose linears may be stored compressed.
#[derive(Debug)]
pub struct QuantisedCheckpoint<'a> {
    checkpoint: &'a Checkpoint,
    format: Format,
}

impl<'a> QuantisedCheckpoint<'a> {
    /// Finds out how the linears are stored, of a folder as it is ([`Checkpoint::open`]) or of what [`causal_lm::open`] gives.
    ///
    /// # Errors
    /// As [`Format::detect`].
    pub fn open(checkpoint: &'a Checkpoint) -> Result<Self> {
        let source = checkpoint.source().map(|source| source.as_any());
        if let Some(decoded) = source.and_then(|source| source.downcast_ref::<CompressedTensors>())
        {
            return Ok(Self {
                checkpoint: decoded.folder(),
                format: decoded.format().clone(),
            });
        }
        let format = match gguf_tensors(checkpoint) {
            Some(_) => Format::Gguf,
            None => Format::detect(checkpoint)?,
        };
        Ok(Self { checkpoint, format })
    }

    /// The tensors as they are stored.
    pub(crate) fn checkpoint(&self) -> &'a Checkpoint {
        self.checkpoint
    }

    /// How the linears are stored.
    pub fn format(&self) -> &Format {
        &self.format
    }

    /// Paths of the modules whose weight is stored compressed (`model.layers.0.mlp.up_proj`), in the order of the files.
    pub fn modules(&self) -> Vec<&'a str> {
        let suffix = match self.format {
            Format::Gguf => ".weight",
            Format::Gptq { .. } => ".qweight",
            Format::PackQuantized { .. } => ".weight_packed",
            Format::SparseBitmask => ".bitmask",
            // Blocks have their own names, here and beside groups.
            Format::Blocks => "",
            _ => return Vec::new(),
        };
        let module_of = |name: &'a str| -> Option<&'a str> {
            if let Some((module, _)) = blocks::module_of(name) {
                return Some(module);
            }
            if suffix.is_empty() || self.format == Format::Gguf && self.blocks_of(name).is_none() {
                return None;
            }
            let module = name.strip_suffix(suffix)?;
            Some(module.strip_suffix(".weight").unwrap_or(module))
        };
        self.checkpoint.names().filter_map(module_of).collect()
    }

    /// The stored form of a module's weight; None if it is not quantised.
    ///
    /// # Errors
    /// Tensors that are missing or do not fit each other.
    pub fn quantised(&self, module: &str) -> Result<Option<Quantised>> {
        let groups = self.format.groups(self.checkpoint, module)?;
        Ok(groups.map(Quantised::from))
    }

    /// The blocks of a module's weight, rows in the order of Hugging Face; None if it is not in blocks.
    ///
    /// # Errors
    /// Blocks whose scales are not finite.
    pub fn blocks(&self, module: &str) -> Result<Option<QuantRows<'static>>> {
        let name = format!("{module}.weight");
        let rows = match gguf_tensors(self.checkpoint) {
            Some(tensors) if self.blocks_of(&name).is_some() => tensors.packed(&name)?,
            Some(_) => None,
            None => blocks::read(self.checkpoint, module)?,
        };
        Ok(rows.map(QuantRows::into_owned))
    }

    /// The block type of a tensor, where it has one.
    pub(crate) fn blocks_of(&self, name: &str) -> Option<BlockType> {
        let ty = match gguf_tensors(self.checkpoint) {
            Some(tensors) => tensors.block_type(name)?,
            None => blocks::of(self.checkpoint, name.strip_suffix(".weight")?)?,
        };
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
        if let Some(blocks) = self.blocks(module)? {
            let values = blocks.dequantise().into_iter().map(f64::from).collect();
            return Ok(Rows::new(values, blocks.rows(), blocks.cols()).to_mat());
        }
        if let Some(sparse) = self.format.sparse(self.checkpoint, module)? {
            return Ok(Rows::new(sparse.values, sparse.rows, sparse.cols).to_mat());
        }
        let name = format!("{module}.weight");
        let tensor = self.checkpoint.tensor_as(&name, DType::F64, &Device::Cpu)?;
        let (rows, cols) = tensor.dims2()?;
        Ok(Rows::new(tensor.flatten_all()?.to_vec1()?, rows, cols).to_mat())
    }

    /// As [`QuantisedCheckpoint::weight`], as a tensor `[m, n]` rounded to `dtype`.
    ///
    /// # Errors
    /// As [`QuantisedCheckpoint::quantised`], and values beyond the range of `dtype`.
    pub fn tensor(&self, module: &str, dtype: DType, device: &Device) -> Result<Tensor> {
        let rows = Rows::read(self.weight(module)?.as_ref(), "stored weight")?;
        rows.to_tensor(dtype, device)
    }
}

/// The GGUF file behind a checkpoint, if it is one.
pub(crate) fn gguf_tensors(checkpoint: &Checkpoint) -> Option<&GgufTensors> {
    checkpoint.source()?.as_any().downcast_ref()
}

impl From<StoredGroups> for Quantised {
    fn from(groups: StoredGroups) -> Self {
        let bits = groups.bits.get() as u8;
        Self {
            bits: Bits::new(bits).expect("both types have 2, 3, 4 and 8"),
            rows: groups.rows,
            cols: groups.cols,
            group_width: groups.group_width,
            codes: groups.codes,
            scales: groups.scales,
            zeros: groups.zeros,
            offsets: Vec::new(),
            group_index: groups.group_index,
        }
    }
}
