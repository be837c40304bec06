//! The tensors of a GGUF file under the names and in the order of Hugging Face.

use std::any::Any;
use std::borrow::Cow;
use std::collections::HashMap;

use packed::{BlockType, QuantRows};
use rayon::prelude::*;
use tensor_io::gguf::Gguf;
use tensor_io::{Config, Dtype, Error, TensorSource, TensorSpec};

use super::names::{self, Place, neighbours_of_halves};
use super::{Architecture, content, tokenizer};
use crate::Result;
use crate::names::{LLAMA, Names};

/// Values that a thread decodes at once.
const TASK: usize = 1 << 14;

/// The tensors of a GGUF file: decoded to floats for a checkpoint, or as the blocks that the file holds.
#[derive(Debug)]
pub struct GgufTensors {
    file: Gguf,
    architecture: Architecture,
    stored: HashMap<String, Stored>,
}

/// What stands behind a tensor of the checkpoint.
#[derive(Debug)]
enum Stored {
    /// A tensor of the file.
    Tensor {
        name: String,
        ty: BlockType,
        rows: usize,
        cols: usize,
        /// For each row its row in the file, where they differ.
        order: Option<Vec<usize>>,
    },
    /// The norm before a half that its block does not have: ones, which nothing reads.
    Ones(usize),
}

/// Finds the place of every tensor of `file`.
pub(super) fn map(
    file: Gguf,
    architecture: Architecture,
    config: &Config,
) -> Result<(Vec<TensorSpec>, GgufTensors)> {
    let metadata = file.metadata();
    let head_dim = config.usize("head_dim")?;
    let hidden = config.usize("hidden_size")?;
    let layers = config.usize("num_hidden_layers")?;
    let mut specs = Vec::new();
    let mut stored = HashMap::new();
    for info in file.tensors() {
        let (name, rotated) = match names::place(&info.name) {
            Some(Place::Tensor(name)) => (name, false),
            Some(Place::Rotated(name)) => (name, architecture.rotates_neighbours()),
            Some(Place::Rotation | Place::Ignored) => continue,
            None => {
                return Err(content(
                    &metadata,
                    format!(
                        "tensor `{}` has no place in a {} model; reading on would ignore it",
                        info.name,
                        architecture.name()
                    ),
                ));
            }
        };
        let Some(ty) = BlockType::from_id(info.layout.id) else {
            return Err(content(
                &metadata,
                format!(
                    "tensor `{}`: type {} is not supported",
                    info.name, info.layout.name
                ),
            ));
        };
        // A vector of q or k has one value for each row of the matrix.
        let (rows, cols) = match (rotated, info.shape.len()) {
            (true, 1) => (info.elements(), 1),
            _ => (info.elements() / info.width(), info.width()),
        };
        let whole_heads =
            head_dim > 0 && head_dim.is_multiple_of(2) && rows.is_multiple_of(head_dim);
        if rotated && !(whole_heads && (info.shape.len() == 2 || !ty.is_quantised())) {
            return Err(content(
                &metadata,
                format!(
                    "tensor `{}`: {rows} rows are no heads of {head_dim}",
                    info.name
                ),
            ));
        }
        let dtype = match ty {
            BlockType::F16 => Dtype::F16,
            BlockType::BF16 => Dtype::BF16,
            _ => Dtype::F32,
        };
        specs.push(TensorSpec::new(&name, dtype, info.shape.clone()));
        let tensor = Stored::Tensor {
            name: info.name.clone(),
            ty,
            rows,
            cols,
            order: rotated.then(|| neighbours_of_halves(rows, head_dim)),
        };
        stored.insert(name, tensor);
    }
    for layer in 0..layers {
        for (attention, norm) in [(true, LLAMA.attention_before), (false, LLAMA.mlp_before)] {
            let Some(norm) = norm else { continue };
            let norm = Names::new(&LLAMA).block(layer, &format!("{norm}.weight"));
            if !stored.contains_key(&norm) && has_no_half(config, layer, attention) {
                specs.push(TensorSpec::new(&norm, Dtype::F32, [hidden]));
                stored.insert(norm, Stored::Ones(hidden));
            }
        }
    }
    let tensors = GgufTensors {
        file,
        architecture,
        stored,
    };
    Ok((specs, tensors))
}

/// Whether the config gives block `layer` no attention, or no MLP.
fn has_no_half(config: &Config, layer: usize, attention: bool) -> bool {
    let field = match attention {
        true => "num_attention_heads",
        false => "intermediate_size",
    };
    let list = config
        .get(crate::config::WIDTHS_KEY)
        .map(|lists| &lists[field][layer]);
    list.is_some_and(|width| width.as_u64() == Some(0))
}

impl GgufTensors {
    /// The file.
    pub fn file(&self) -> &Gguf {
        &self.file
    }

    /// What the file says it is.
    pub fn architecture(&self) -> Architecture {
        self.architecture
    }

    /// Type of the tensor that the checkpoint has under `name`; `None` if there is none in the file.
    pub fn block_type(&self, name: &str) -> Option<BlockType> {
        match self.stored.get(name) {
            Some(Stored::Tensor { ty, .. }) => Some(*ty),
            Some(Stored::Ones(_)) | None => None,
        }
    }

    /// The blocks of the tensor that the checkpoint has under `name`, bit for bit, rows in the order of Hugging Face; `None`
    /// if there is none in the file.
    ///
    /// # Errors
    /// Scales that are not finite, by row and block.
    pub fn packed(&self, name: &str) -> Result<Option<QuantRows<'_>>> {
        match self.stored.get(name) {
            Some(stored @ Stored::Tensor { .. }) => Ok(self.matrix(stored)?),
            Some(Stored::Ones(_)) | None => Ok(None),
        }
    }

    fn get(&self, name: &str) -> tensor_io::Result<&Stored> {
        self.stored.get(name).ok_or_else(|| Error::UnknownTensor {
            file: self.file.path().to_path_buf(),
            tensor: name.to_string(),
        })
    }

    /// All rows of a tensor in their order, checked.
    fn matrix(&self, stored: &Stored) -> tensor_io::Result<Option<QuantRows<'_>>> {
        let Stored::Tensor {
            name,
            ty,
            rows,
            cols,
            order,
        } = stored
        else {
            return Ok(None);
        };
        let decode = |error: packed::Error| self.decode(name, &error);
        let stored = QuantRows::new(*ty, *rows, *cols, self.file.bytes(name)?).map_err(decode)?;
        stored.check().map_err(decode)?;
        Ok(Some(match order {
            None => stored,
            Some(order) => stored.select(order).map_err(decode)?,
        }))
    }

    fn decode(&self, tensor: &str, error: &packed::Error) -> Error {
        Error::Decode {
            file: self.file.path().to_path_buf(),
            tensor: tensor.to_string(),
            reason: error.to_string(),
        }
    }
}

impl TensorSource for GgufTensors {
    fn bytes(&self, name: &str) -> tensor_io::Result<Cow<'_, [u8]>> {
        let stored = self.get(name)?;
        let tensor = match stored {
            Stored::Ones(count) => return Ok(Cow::Owned(1f32.to_le_bytes().repeat(*count))),
            Stored::Tensor {
                name,
                ty,
                order: None,
                ..
            } if !ty.is_quantised() => {
                return Ok(Cow::Borrowed(self.file.bytes(name)?));
            }
            Stored::Tensor { name, .. } => name,
        };
        let Some(matrix) = self.matrix(stored)? else {
            return Ok(Cow::Borrowed(&[]));
        };
        if !matrix.block_type().is_quantised() {
            return Ok(Cow::Owned(matrix.into_bytes()));
        }
        let (rows, cols) = (matrix.rows(), matrix.cols());
        let rows_at_once = (TASK / cols).max(1);
        let mut bytes = vec![0; rows * cols * size_of::<f32>()];
        bytes
            .par_chunks_mut(rows_at_once * cols * size_of::<f32>())
            .enumerate()
            .try_for_each(|(task, bytes)| {
                let first = task * rows_at_once;
                let mut values = vec![0f32; bytes.len() / size_of::<f32>()];
                let range = first..first + values.len() / cols;
                matrix.dequantise_rows(range, &mut values)?;
                for (bytes, value) in bytes.chunks_exact_mut(size_of::<f32>()).zip(values) {
                    bytes.copy_from_slice(&value.to_le_bytes());
                }
                Ok(())
            })
            .map_err(|error| self.decode(tensor, &error))?;
        Ok(Cow::Owned(bytes))
    }

    fn rows(&self, name: &str, rows: &[usize]) -> tensor_io::Result<Vec<u8>> {
        let Stored::Tensor {
            name,
            ty,
            rows: count,
            cols,
            order,
        } = self.get(name)?
        else {
            return Ok(1f32.to_le_bytes().repeat(rows.len()));
        };
        let decode = |error: packed::Error| self.decode(name, &error);
        let matrix = QuantRows::new(*ty, *count, *cols, self.file.bytes(name)?).map_err(decode)?;
        let mut bytes = Vec::new();
        let mut values = vec![0f32; *cols];
        for &row in rows {
            let row = order.as_ref().map_or(row, |order| order[row]);
            if !ty.is_quantised() {
                bytes.extend_from_slice(matrix.row(row));
                continue;
            }
            let one = matrix.slice(row..row + 1).map_err(decode)?;
            one.check().map_err(|_| {
                let reason = format!("row {row}: a scale is not finite");
                Error::Decode {
                    file: self.file.path().to_path_buf(),
                    tensor: name.clone(),
                    reason,
                }
            })?;
            one.dequantise_rows(0..1, &mut values).map_err(decode)?;
            bytes.extend(values.iter().flat_map(|value| value.to_le_bytes()));
        }
        Ok(bytes)
    }

    fn stored(&self, name: &str) -> tensor_io::Result<Cow<'_, [u8]>> {
        match self.get(name)? {
            Stored::Ones(_) => Ok(Cow::Borrowed(&[])),
            Stored::Tensor { name, .. } => Ok(Cow::Borrowed(self.file.bytes(name)?)),
        }
    }

    fn total_bytes(&self) -> u64 {
        self.file.total_bytes()
    }

    fn release(&self, name: &str) {
        if let Some(Stored::Tensor { name, .. }) = self.stored.get(name) {
            self.file.release([name.as_str()]);
        }
    }

    fn files(&self) -> tensor_io::Result<Vec<(String, Vec<u8>)>> {
        tokenizer::files(&self.file)
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
