//! Weights that are multiplied as they are stored: blocks of GGUF files, groups of GPTQ and compressed-tensors, floats of 16
//! bits, each with factors of low rank where an adapter has some.

use std::borrow::Cow;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use half::{bf16, f16};
use packed::{BlockType, Context, LowRank, Matrix, QuantRows, Team};
use tensor_io::{Checkpoint, Dtype, SharedBytes};

use crate::adapter::{Adapted, Factors};
use crate::compressed::{CompressedTensors, Format};
use crate::gguf::GgufTensors;
use crate::weights::DenseReason;
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

/// A weight as it is stored, or why it has to be a tensor.
pub(crate) enum Stored<T> {
    Packed(T),
    Dense(DenseReason),
}

impl<T> Stored<T> {
    pub(crate) fn map<U>(self, f: impl FnOnce(T) -> U) -> Stored<U> {
        match self {
            Self::Packed(stored) => Stored::Packed(f(stored)),
            Self::Dense(reason) => Stored::Dense(reason),
        }
    }
}

/// The rows of the weight `name`, all or those of `runs` one after the other, as they are stored.
pub(crate) fn load(
    checkpoint: &Checkpoint,
    name: &str,
    runs: Option<&[Range<usize>]>,
) -> Result<Stored<packed::Linear>> {
    let source = checkpoint.source().map(|source| source.as_any());
    if let Some(adapted) = source.and_then(|source| source.downcast_ref::<Adapted>()) {
        let linear = match load(&adapted.base, name, runs)? {
            Stored::Packed(linear) => linear,
            dense => return Ok(dense),
        };
        let Some(factors) = adapted.adapter.factors(name)? else {
            return Ok(Stored::Packed(linear));
        };
        let low_rank = low_rank(&factors, runs).map_err(packed_error(name))?;
        let linear = linear.with_low_rank(low_rank).map_err(packed_error(name))?;
        return Ok(Stored::Packed(linear));
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
            Some(rows) => Stored::Packed(matrix(name, rows, runs)?),
            None => groups(folder, name, runs)?,
        }
    } else {
        halves(checkpoint, name, runs)?
    };
    Ok(matrix.map(packed::Linear::from))
}

/// What the weight `name` is stored as, if in fewer bits than floats have.
pub(crate) fn quantised(checkpoint: &Checkpoint, name: &str) -> Option<String> {
    let source = checkpoint.source()?.as_any();
    if let Some(adapted) = source.downcast_ref::<Adapted>() {
        return quantised(&adapted.base, name);
    }
    if let Some(file) = source.downcast_ref::<GgufTensors>() {
        return file.quantised(name).map(|ty| ty.to_string());
    }
    let folder = source.downcast_ref::<CompressedTensors>()?;
    if let Some(ty) = folder.block_type(name) {
        return ty.is_quantised().then(|| ty.to_string());
    }
    match folder.format() {
        Format::Gptq { .. } | Format::PackQuantized { .. } if folder.is_compressed(name) => {
            Some(folder.format().to_string())
        }
        _ => None,
    }
}

/// The rows that `runs` name, one after the other.
fn rows_of(runs: &[Range<usize>]) -> Vec<usize> {
    runs.iter().cloned().flatten().collect()
}

/// Blocks and 16-bit floats of a GGUF file, these as part of the mapped file where they are in their order.
fn blocks(file: &GgufTensors, name: &str, runs: Option<&[Range<usize>]>) -> Result<Stored<Matrix>> {
    match file.block_type(name) {
        None => return Ok(Stored::Dense(DenseReason::Mixed)),
        Some(BlockType::F32) => return Ok(Stored::Dense(DenseReason::Floats)),
        Some(_) => {}
    }
    if let Some(floats) = file.in_place(name, runs)? {
        let matrix = Matrix::dense(floats.ty, floats.rows, floats.cols, floats.bytes);
        return Ok(Stored::Packed(matrix.map_err(packed_error(name))?));
    }
    let rows = match runs {
        None => file.packed(name)?,
        Some(runs) => file.packed_rows(name, runs)?,
    };
    let Some(rows) = rows else {
        return Ok(Stored::Dense(DenseReason::Mixed));
    };
    let matrix = Matrix::from_rows(&rows).map_err(packed_error(name))?;
    Ok(Stored::Packed(matrix))
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
) -> Result<Stored<Matrix>> {
    let Some(groups) = folder.groups(name)? else {
        return Ok(Stored::Dense(DenseReason::Sparse));
    };
    let rows = runs.map(rows_of);
    match groups.packed(rows.as_deref()) {
        Ok(groups) => Ok(Stored::Packed(Matrix::from_groups(&groups))),
        Err(packed::Error::GroupWidth(width)) => Ok(Stored::Dense(DenseReason::GroupWidth(width))),
        Err(packed::Error::GroupIndex) => Ok(Stored::Dense(DenseReason::GroupIndex)),
        Err(packed::Error::GroupScale { .. }) => Ok(Stored::Dense(DenseReason::Scales)),
        Err(error) => Err(packed_error(name)(error)),
    }
}

/// 16-bit floats of a folder, part of the mapped file where the rows are neighbours.
fn halves(
    checkpoint: &Checkpoint,
    name: &str,
    runs: Option<&[Range<usize>]>,
) -> Result<Stored<Matrix>> {
    let info = checkpoint.info(name)?;
    let ty = match info.dtype {
        Dtype::F16 => BlockType::F16,
        Dtype::BF16 => BlockType::BF16,
        _ => return Ok(Stored::Dense(DenseReason::Floats)),
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
    Ok(Stored::Packed(matrix))
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
    let Factors { a, b, rank, scale } = factors;
    let b = match runs {
        None => Cow::Borrowed(b),
        Some(runs) => {
            let row = |row: usize| b[row * rank..][..*rank].iter().copied();
            Cow::Owned(rows_of(runs).into_iter().flat_map(row).collect())
        }
    };
    let matrix = |values: &[f32], cols: usize| {
        let (ty, bytes) = narrowest(values);
        Matrix::dense(ty, values.len() / cols.max(1), cols, Arc::new(bytes))
    };
    LowRank::new(&matrix(a, a.len() / rank)?, &matrix(&b, *rank)?, *scale)
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
            scale: 0.3,
        };
        let exact = low_rank(&factors, None).unwrap();
        let factors = Factors {
            a: vec![0.1; 64],
            b: vec![0.3; 32],
            rank: 2,
            scale: 1.0,
        };
        assert!(2 * exact.bytes() <= low_rank(&factors, None).unwrap().bytes());
    }
}
