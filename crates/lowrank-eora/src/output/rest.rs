//! Embedding and output head of a model in GGUF blocks, which llama.cpp's quantiser rounds too.

use crate::compress::BlockTypes;
use crate::format::gguf_tensors;
use crate::repair::StoredWeight;
use crate::{Error, Result};
use candle_core::{DType, Device};
use causal_lm::Decoder;
use causal_lm::gguf::names::{EMBEDDING, HEAD};
use packed::{BlockType, QuantRows, quantise};
use std::ops::Range;
use tensor_io::imatrix::Imatrix;

/// Values that are rounded at once.
const AT_ONCE: usize = 1 << 24;

/// Embedding and head of `decoder` in the types that a file of `types` gives them, by the path of their module: the head
/// `Q6_K`, or `Q8_0` where its rows are no whole blocks of that or the linears are `Q8_0`; an embedding that is not the head
/// as well the type of most linears. What is in blocks already, and rows that no blocks divide, are left out. `imatrix` is
/// used where it has an entry.
///
/// # Errors
/// An entry of the importance matrix of another size, values beyond the range of a type, and what reading reports.
pub fn rest(
    decoder: &Decoder<'_>,
    types: BlockTypes,
    imatrix: Option<&Imatrix>,
) -> Result<Vec<(String, StoredWeight)>> {
    let config = decoder.config();
    let (embedding, head) = (config.names.embedding(), config.names.head());
    let mut matrices = vec![(embedding.as_str(), EMBEDDING)];
    if !config.tied {
        matrices.push((head, HEAD));
    }
    let mut rounded = Vec::new();
    for (name, in_file) in matrices {
        let info = decoder.checkpoint().info(name)?;
        let &[rows, cols] = info.shape.as_slice() else {
            continue;
        };
        let ty = match config.tied || in_file == HEAD {
            true => types.head(cols),
            false => types.embedding(cols),
        };
        let stored = gguf_tensors(decoder.checkpoint()).and_then(|file| file.block_type(name));
        if !ty.is_quantised() || stored.is_some_and(BlockType::is_quantised) {
            continue;
        }
        let module = name.trim_end_matches(".weight").to_string();
        let wrap = |source: Error| Error::Layer {
            layer: module.clone(),
            source: Box::new(source),
        };
        let importance = match imatrix.map(|imatrix| imatrix.of(in_file, cols, 1)) {
            None | Some(Ok(None)) => None,
            Some(Ok(Some(entry))) => Some(crate::compress::importance(&entry.means)),
            Some(Err(reason)) => {
                return Err(Error::Setting {
                    name: "importance matrix",
                    value: reason,
                    expected: "one of this model",
                });
            }
        };
        let matrix = Matrix {
            decoder,
            name,
            shape: [rows, cols],
        };
        let blocks = matrix.round(ty, importance.as_deref()).map_err(wrap)?;
        rounded.push((module.clone(), StoredWeight::Blocks(blocks)));
    }
    Ok(rounded)
}

/// A stored matrix.
struct Matrix<'a> {
    decoder: &'a Decoder<'a>,
    name: &'a str,
    shape: [usize; 2],
}

impl Matrix<'_> {
    fn round(&self, ty: BlockType, importance: Option<&[f32]>) -> Result<QuantRows<'static>> {
        let [rows, cols] = self.shape;
        let step = (AT_ONCE / cols.max(1)).max(1);
        let mut bytes = Vec::new();
        for first in (0..rows).step_by(step) {
            let values = self.rows(first..rows.min(first + step))?;
            bytes.extend_from_slice(quantise(ty, &values, cols, importance)?.bytes());
        }
        self.decoder.checkpoint().release([self.name]);
        Ok(QuantRows::new(ty, rows, cols, bytes)?)
    }

    fn rows(&self, rows: Range<usize>) -> Result<Vec<f32>> {
        let checkpoint = self.decoder.checkpoint();
        let tensor = checkpoint.rows_as(self.name, rows, DType::F32, &Device::Cpu)?;
        Ok(tensor.flatten_all()?.to_vec1()?)
    }
}
