//! Weights that are multiplied as they are stored: blocks of GGUF files, groups of GPTQ and compressed-tensors, floats of 16
//! bits, each with factors of low rank where an adapter has some.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use half::{bf16, f16};
use packed::{BlockType, Context, LowRank, Matrix, QuantRows, Team};
use tensor_io::{Checkpoint, Dtype, SharedBytes};

use crate::adapter::{Adapted, Factors};
use crate::compressed::CompressedTensors;
use crate::gguf::GgufTensors;
use crate::{Error, Result};

/// The arithmetic of quantised weights.
pub use packed::Activations as Arithmetic;

/// How a decoder multiplies with weights that are stored in fewer than 32 bits.
#[derive(Clone, Default)]
#[non_exhaustive]
pub struct Execution {
    /// The arithmetic: f32 by default, in which results are those of the decoded weights.
    pub arithmetic: Arithmetic,
    /// The threads; those of the process by default. Results do not depend on them.
    pub team: Option<Arc<Team>>,
}

impl Execution {
    /// With this arithmetic, on the threads of the process.
    pub fn new(arithmetic: Arithmetic) -> Self {
        Self {
            arithmetic,
            ..Self::default()
        }
    }

    pub(crate) fn context(&self) -> Context<'_> {
        let context = Context::new(self.arithmetic);
        match &self.team {
            Some(team) => context.with_team(team),
            None => context,
        }
    }
}

impl fmt::Debug for Execution {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Execution")
            .field("arithmetic", &self.arithmetic)
            .field("threads", &self.team.as_ref().map(|team| team.threads()))
            .finish()
    }
}

/// An error of the products with `tensor`.
pub(crate) fn packed_error(tensor: &str) -> impl FnOnce(packed::Error) -> Error {
    move |source| Error::Packed {
        tensor: tensor.to_string(),
        source,
    }
}

/// The rows of the weight `name`, all or those of `runs` one after the other, as they are stored. `None` for a weight that is
/// to be computed as a tensor: floats of 32 bits, and codes that no kernel serves.
pub(crate) fn load(
    checkpoint: &Checkpoint,
    name: &str,
    runs: Option<&[Range<usize>]>,
) -> Result<Option<packed::Linear>> {
    let source = checkpoint.source().map(|source| source.as_any());
    if let Some(adapted) = source.and_then(|source| source.downcast_ref::<Adapted>()) {
        let Some(linear) = load(&adapted.base, name, runs)? else {
            return Ok(None);
        };
        let Some(factors) = adapted.adapter.factors.get(name) else {
            return Ok(Some(linear));
        };
        let low_rank = low_rank(factors, runs).map_err(packed_error(name))?;
        let linear = linear.with_low_rank(low_rank).map_err(packed_error(name))?;
        return Ok(Some(linear));
    }
    let matrix = if let Some(file) = source.and_then(|source| source.downcast_ref::<GgufTensors>())
    {
        blocks(file, name, runs)?
    } else if let Some(folder) =
        source.and_then(|source| source.downcast_ref::<CompressedTensors>())
    {
        if !folder.is_compressed(name) {
            return load(folder.folder(), name, runs);
        }
        match folder.blocks(name)? {
            Some(rows) => Some(matrix(name, rows, runs)?),
            None => groups(folder, name, runs)?,
        }
    } else {
        halves(checkpoint, name, runs)?
    };
    Ok(matrix.map(packed::Linear::from))
}

/// The rows that `runs` name, one after the other.
fn rows_of(runs: &[Range<usize>]) -> Vec<usize> {
    runs.iter().cloned().flatten().collect()
}

/// Blocks and 16-bit floats of a GGUF file.
fn blocks(file: &GgufTensors, name: &str, runs: Option<&[Range<usize>]>) -> Result<Option<Matrix>> {
    if matches!(file.block_type(name), None | Some(BlockType::F32)) {
        return Ok(None);
    }
    let rows = file.packed(name)?;
    rows.map(|rows| matrix(name, rows, runs)).transpose()
}

/// All rows of a weight in blocks, or those of `runs`.
fn matrix(name: &str, rows: QuantRows<'_>, runs: Option<&[Range<usize>]>) -> Result<Matrix> {
    let rows = match runs {
        None => rows,
        Some(runs) => rows.select(&rows_of(runs)).map_err(packed_error(name))?,
    };
    Matrix::from_rows(&rows).map_err(packed_error(name))
}

/// Groups of a folder.
fn groups(
    folder: &CompressedTensors,
    name: &str,
    runs: Option<&[Range<usize>]>,
) -> Result<Option<Matrix>> {
    let Some(groups) = folder.groups(name)? else {
        return Ok(None);
    };
    let rows = runs.map(rows_of);
    let packed = groups.packed(rows.as_deref());
    Ok(packed.map(|groups| Matrix::from_groups(&groups)))
}

/// 16-bit floats of a folder, part of the mapped file where the rows are neighbours.
fn halves(
    checkpoint: &Checkpoint,
    name: &str,
    runs: Option<&[Range<usize>]>,
) -> Result<Option<Matrix>> {
    let info = checkpoint.info(name)?;
    let ty = match info.dtype {
        Dtype::F16 => BlockType::F16,
        Dtype::BF16 => BlockType::BF16,
        _ => return Ok(None),
    };
    let cols = info.shape.last().copied().unwrap_or(1);
    let all = 0..info.elements().checked_div(cols).unwrap_or(0);
    let runs = runs.unwrap_or(std::slice::from_ref(&all));
    let rows = runs.iter().map(Range::len).sum();
    let bytes: SharedBytes = match runs {
        [run] => checkpoint.shared_rows(name, run.clone())?,
        runs => {
            let mut bytes = Vec::with_capacity(rows * cols * ty.block_bytes());
            for run in runs {
                let part = checkpoint.shared_rows(name, run.clone())?;
                bytes.extend_from_slice((*part).as_ref());
            }
            Arc::new(bytes)
        }
    };
    let matrix = Matrix::dense(ty, rows, cols, bytes).map_err(packed_error(name))?;
    Ok(Some(matrix))
}

/// The narrowest type of floats that holds these values exactly, and the values in it: adapters are mostly stored in 16 bits.
fn narrowest(values: &[f32]) -> (BlockType, Vec<u8>) {
    let all = |exact: fn(f32) -> bool| values.iter().all(|&value| exact(value));
    if all(|value| f16::from_f32(value).to_f32() == value) {
        let bytes = values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes());
        (BlockType::F16, bytes.collect())
    } else if all(|value| bf16::from_f32(value).to_f32() == value) {
        let bytes = values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes());
        (BlockType::BF16, bytes.collect())
    } else {
        let bytes = values.iter().flat_map(|v| v.to_le_bytes());
        (BlockType::F32, bytes.collect())
    }
}

/// Factors beside a weight of which only the rows of `runs` are there.
fn low_rank(factors: &Factors, runs: Option<&[Range<usize>]>) -> packed::Result<LowRank> {
    let Factors { a, b, rank } = factors;
    let b = match runs {
        None => b.clone(),
        Some(runs) => {
            let row = |row: usize| b[row * rank..][..*rank].iter().copied();
            rows_of(runs).into_iter().flat_map(row).collect()
        }
    };
    let matrix = |values: &[f32], cols: usize| {
        let (ty, bytes) = narrowest(values);
        Matrix::dense(ty, values.len() / cols.max(1), cols, Arc::new(bytes))
    };
    // The scale is in B.
    LowRank::new(&matrix(a, a.len() / rank)?, &matrix(&b, *rank)?, 1.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn factors_take_the_narrowest_floats_that_hold_them_exactly() {
        let third = 1.0 / 3.0;
        for (values, ty) in [
            ([0.5, -3.0, f16::from_f32(third).to_f32()], BlockType::F16),
            ([0.5, 1e30, bf16::from_f32(third).to_f32()], BlockType::F32),
            (
                [0.5, f32::MIN_POSITIVE, bf16::from_f32(1e30).to_f32()],
                BlockType::BF16,
            ),
            ([0.5, -3.0, third], BlockType::F32),
        ] {
            let (found, bytes) = narrowest(&values);
            assert_eq!(found, ty, "{values:?}");
            let matrix = Matrix::dense(found, 1, values.len(), Arc::new(bytes)).unwrap();
            assert_eq!(matrix.dequantise(), values);
        }
        let factors = Factors {
            a: vec![0.5; 64],
            b: vec![0.25; 32],
            rank: 2,
        };
        let exact = low_rank(&factors, None).unwrap();
        let factors = Factors {
            a: vec![0.1; 64],
            b: vec![0.3; 32],
            rank: 2,
        };
        assert!(2 * exact.bytes() <= low_rank(&factors, None).unwrap().bytes());
    }
}
