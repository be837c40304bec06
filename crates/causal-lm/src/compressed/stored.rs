//! Tensors of a checkpoint as plain vectors, with their shapes.

use candle_core::{DType, Device};
use tensor_io::{Checkpoint, Dtype, Error, Result};

/// An error about a tensor that does not fit the others.
pub(super) fn refuse<T>(
    checkpoint: &Checkpoint,
    tensor: &str,
    reason: impl Into<String>,
) -> Result<T> {
    Err(Error::Decode {
        file: checkpoint.dir().to_path_buf(),
        tensor: tensor.to_string(),
        reason: reason.into(),
    })
}

/// Rows and columns of a shape.
pub(super) fn matrix(checkpoint: &Checkpoint, tensor: &str, shape: &[usize]) -> Result<[usize; 2]> {
    match shape {
        &[rows, cols] => Ok([rows, cols]),
        _ => refuse(
            checkpoint,
            tensor,
            format!("expected a matrix, found shape {shape:?}"),
        ),
    }
}

/// A float tensor of any width.
pub(super) fn floats(checkpoint: &Checkpoint, name: &str) -> Result<(Vec<f64>, Vec<usize>)> {
    let shape = checkpoint.info(name)?.shape.clone();
    let tensor = checkpoint.tensor_as(name, DType::F64, &Device::Cpu)?;
    let values = tensor.flatten_all().and_then(|tensor| tensor.to_vec1());
    let values = values.map_err(|source| Error::Tensor {
        tensor: name.to_string(),
        source,
    })?;
    Ok((values, shape))
}

/// A matrix of 32-bit words.
pub(super) fn words(checkpoint: &Checkpoint, name: &str) -> Result<(Vec<u32>, [usize; 2])> {
    let info = checkpoint.info(name)?;
    if !matches!(info.dtype, Dtype::I32 | Dtype::U32) {
        return refuse(
            checkpoint,
            name,
            format!("expected int32, found {:?}", info.dtype),
        );
    }
    let shape = matrix(checkpoint, name, &info.shape)?;
    let bytes = checkpoint.bytes(name)?;
    let (words, _) = bytes.as_chunks::<4>();
    Ok((
        words.iter().map(|&w| u32::from_le_bytes(w)).collect(),
        shape,
    ))
}

/// Integers of any width, flattened.
pub(super) fn integers(checkpoint: &Checkpoint, name: &str) -> Result<Vec<i64>> {
    let info = checkpoint.info(name)?;
    let bytes = checkpoint.bytes(name)?;
    match info.dtype {
        Dtype::I64 => {
            let (values, _) = bytes.as_chunks::<8>();
            Ok(values.iter().map(|&v| i64::from_le_bytes(v)).collect())
        }
        Dtype::I32 => {
            let (values, _) = bytes.as_chunks::<4>();
            Ok(values
                .iter()
                .map(|&v| i32::from_le_bytes(v).into())
                .collect())
        }
        Dtype::I8 => Ok(bytes.iter().map(|&v| i64::from(v.cast_signed())).collect()),
        other => refuse(
            checkpoint,
            name,
            format!("expected int8, int32 or int64, found {other:?}"),
        ),
    }
}

/// The group of each of `inputs` inputs, checked against the number of groups.
pub(super) fn group_index(
    checkpoint: &Checkpoint,
    name: &str,
    values: &[i64],
    inputs: usize,
    groups: usize,
) -> Result<Vec<u32>> {
    if values.len() != inputs {
        return refuse(
            checkpoint,
            name,
            format!("expected {inputs} entries, found {}", values.len()),
        );
    }
    match values
        .iter()
        .find(|&&group| !(0..groups as i64).contains(&group))
    {
        Some(group) => refuse(
            checkpoint,
            name,
            format!("names group {group}, but there are {groups}"),
        ),
        None => Ok(values.iter().map(|&group| group as u32).collect()),
    }
}

/// Inputs per group, from the number of groups and what the configuration says.
pub(super) fn group_width(
    checkpoint: &Checkpoint,
    name: &str,
    inputs: usize,
    groups: usize,
    configured: Option<usize>,
) -> Result<usize> {
    match configured {
        Some(width) if width > 0 && inputs.div_ceil(width) == groups => Ok(width),
        _ if groups == 1 => Ok(inputs.max(1)),
        _ if groups > 0 && inputs.is_multiple_of(groups) => Ok(inputs / groups),
        _ => refuse(
            checkpoint,
            name,
            format!("{groups} groups do not go with {inputs} inputs (group_size {configured:?})"),
        ),
    }
}

/// Two sizes, stored as integers.
pub(super) fn shape(checkpoint: &Checkpoint, name: &str) -> Result<[usize; 2]> {
    let sizes = integers(checkpoint, name)?;
    let size = |size: i64| usize::try_from(size).ok();
    match sizes[..] {
        [m, n] => match (size(m), size(n)) {
            (Some(m), Some(n)) if m.checked_mul(n).is_some() => Ok([m, n]),
            _ => refuse(checkpoint, name, format!("{m} × {n} is no shape")),
        },
        _ => refuse(
            checkpoint,
            name,
            format!("expected two numbers, found {sizes:?}"),
        ),
    }
}
