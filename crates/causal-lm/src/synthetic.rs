//! Checkpoints made from a config alone: for benchmarks, memory measurements and tests.

use crate::config::ModelConfig;
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::path::Path;
use tensor_io::{CheckpointWriter, Config, TensorSpec, WriteOptions, Written};

/// Most values of a tensor, which is made as a whole: 32 GiB in f32.
const MOST_VALUES: usize = 1 << 33;

/// Writes a checkpoint whose tensors `make` provides, one at a time.
///
/// # Errors
/// A config that is not a supported model, [`Error::TooLarge`], and what making and writing the tensors report.
pub fn write(
    config: &Config,
    dtype: DType,
    dst: impl AsRef<Path>,
    options: &WriteOptions,
    mut make: impl FnMut(&str, &[usize]) -> Result<Tensor>,
) -> Result<Written> {
    let tensors = ModelConfig::new(config)?.tensors();
    for (name, shape) in &tensors {
        values(name, shape)?;
    }
    let specs = tensors
        .iter()
        .map(|(name, shape)| TensorSpec::new(name, dtype, shape.clone()))
        .collect();
    let mut writer = CheckpointWriter::create(dst, config, specs, options)?;
    for (name, shape) in &tensors {
        writer.write_tensor(name, &make(name, shape)?)?;
    }
    Ok(writer.finish()?)
}

/// The number of values of a tensor.
fn values(name: &str, shape: &[usize]) -> Result<usize> {
    let count = shape
        .iter()
        .try_fold(1usize, |count, &side| count.checked_mul(side));
    let count = count.filter(|count| *count <= MOST_VALUES);
    count.ok_or_else(|| too_large(name, shape))
}

fn too_large(name: &str, shape: &[usize]) -> Error {
    Error::TooLarge {
        tensor: name.to_string(),
        shape: shape.to_vec(),
        most: MOST_VALUES,
    }
}

/// Random weights at the scale of a trained model, so that activations neither vanish nor grow:
/// norms near 1, biases near 0, the embedding uniform in ±1 and linears in ±√(3 / inputs).
pub fn random(seed: u64) -> impl FnMut(&str, &[usize]) -> Result<Tensor> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    move |name, shape| {
        let inputs = shape.last().copied().unwrap_or(1) as f32;
        let (centre, spread) = match name {
            n if n.ends_with("norm.weight") => (1.0, 0.2),
            n if n.ends_with(".bias") => (0.0, 0.3),
            n if n.contains("embed") => (0.0, 1.0),
            _ => (0.0, (3.0 / inputs).sqrt()),
        };
        let count = values(name, shape)?;
        let mut values: Vec<f32> = Vec::new();
        let room = values.try_reserve_exact(count);
        room.map_err(|_| too_large(name, shape))?;
        values.extend((0..count).map(|_| centre + spread * (2.0 * rng.random::<f32>() - 1.0)));
        Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
    }
}
