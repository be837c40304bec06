//! The tensors of a GGUF file: llama.cpp's names, and the order of rows that its rotation expects.

use super::unsupported;
use crate::Result;
use candle_core::{DType, Device};
use causal_lm::gguf::names::{self as stored_names, halves_of_neighbours, in_block};
use causal_lm::gguf::{Architecture, GgufTensors};
use causal_lm::{Decoder, LinearName};
use packed::{BlockType, QuantRows, quantise};

/// A tensor of the file.
#[derive(Debug)]
pub(super) struct Output {
    pub(super) name: String,
    source: Source,
}

#[derive(Debug)]
enum Source {
    /// A tensor of the checkpoint.
    Copy(String),
    /// The rows of q or k, each head's halves interleaved.
    Interleaved(String),
    /// Zeros that stand for a half that is gone.
    Zeros(Vec<usize>),
    /// Factors that frequencies are divided by.
    RopeFactors(Vec<f32>),
}

/// All tensors in the order of the data.
///
/// A half that is gone is written as one unit of zeros, which gives the same output: `deci` takes a
/// layer without an MLP for one without attention too, and has no bias for a layer without
/// attention.
pub(super) fn tensors(decoder: &Decoder<'_>, architecture: Architecture) -> Result<Vec<Output>> {
    let config = decoder.config();
    let (checkpoint, names) = (decoder.checkpoint(), config.names);
    let copy = |name: String, source: String| Output {
        name,
        source: Source::Copy(source),
    };
    let mut outputs = vec![copy(stored_names::EMBEDDING.into(), names.embedding())];
    if let Some(factors) = super::metadata::rope_factors(decoder)? {
        outputs.push(Output {
            name: stored_names::ROPE_FACTORS.into(),
            source: Source::RopeFactors(factors),
        });
    }
    for layer in 0..config.layers() {
        let inside = |part: &str| in_block(layer, part);
        for (part, path) in stored_names::NORMS {
            let source = names.block(layer, path);
            if checkpoint.contains(&source) {
                outputs.push(copy(inside(part), source));
            }
        }
        for linear in LinearName::ALL {
            let Some(module) = names.module_of(linear) else {
                continue;
            };
            let part = stored_names::linear(linear);
            let rotated = matches!(linear, LinearName::Q | LinearName::K)
                && architecture.rotates_neighbours();
            let stored = names.weight(layer, module);
            let weight = match config.linear_shape(layer, linear) {
                None => Source::Zeros(stand_in(decoder, linear).to_vec()),
                Some(_) if rotated => Source::Interleaved(stored),
                Some(_) => Source::Copy(stored),
            };
            outputs.push(Output {
                name: inside(&format!("{part}.weight")),
                source: weight,
            });
            let bias = names.bias(layer, module);
            if !checkpoint.contains(&bias) {
                continue;
            }
            if architecture == Architecture::Qwen3 {
                return Err(unsupported(
                    bias,
                    "llama.cpp's qwen3 has no biases; compensate by least squares",
                ));
            }
            let source = match rotated {
                true => Source::Interleaved(bias),
                false => Source::Copy(bias),
            };
            outputs.push(Output {
                name: inside(&format!("{part}.bias")),
                source,
            });
        }
    }
    outputs.push(copy(
        stored_names::FINAL_NORM.into(),
        names.final_norm_weight(),
    ));
    if !config.tied {
        outputs.push(copy(stored_names::HEAD.into(), names.head().into()));
    }
    Ok(outputs)
}

/// Shape of a linear of the one unit that stands for a half that is gone.
fn stand_in(decoder: &Decoder<'_>, linear: LinearName) -> [usize; 2] {
    let (hidden, head_dim) = (decoder.config().hidden, decoder.config().head_dim(0));
    match linear {
        LinearName::Q | LinearName::K | LinearName::V => [head_dim, hidden],
        LinearName::O => [hidden, head_dim],
        LinearName::Gate | LinearName::Up => [1, hidden],
        _ => [hidden, 1],
    }
}

impl Output {
    /// Its shape.
    pub(super) fn shape(&self, decoder: &Decoder<'_>) -> Result<Vec<usize>> {
        Ok(match &self.source {
            Source::Copy(name) | Source::Interleaved(name) => {
                decoder.checkpoint().info(name)?.shape.clone()
            }
            Source::Zeros(shape) => shape.clone(),
            Source::RopeFactors(factors) => vec![factors.len()],
        })
    }

    /// Its bytes in the type `ty`.
    pub(super) fn bytes(&self, decoder: &Decoder<'_>, ty: BlockType) -> Result<Vec<u8>> {
        let (name, interleaved) = match &self.source {
            Source::Copy(name) => (name, false),
            Source::Interleaved(name) => (name, true),
            Source::Zeros(shape) => {
                let width = shape.last().copied().unwrap_or(1);
                let zeros = vec![0.0; shape.iter().product()];
                return Ok(quantise(ty, &zeros, width, None)?.into_bytes());
            }
            Source::RopeFactors(factors) => {
                return Ok(quantise(ty, factors, factors.len(), None)?.into_bytes());
            }
        };
        let checkpoint = decoder.checkpoint();
        let rows = match stored_blocks(decoder, name, ty)? {
            Some(rows) => rows,
            None => {
                let values = checkpoint.tensor_as(name, DType::F32, &Device::Cpu)?;
                let width = values.dims().last().copied().unwrap_or(1);
                let values = values.flatten_all()?.to_vec1::<f32>()?;
                quantise(ty, &values, width, None)?
            }
        };
        checkpoint.release([name.as_str()]);
        Ok(match interleaved {
            true => interleave(
                rows,
                checkpoint.info(name)?.shape.len(),
                decoder.config().head_dim(0),
            )?,
            false => rows.into_bytes(),
        })
    }
}

/// The blocks of a tensor of a GGUF file, if they are of this type.
fn stored_blocks<'a>(
    decoder: &Decoder<'a>,
    name: &str,
    ty: BlockType,
) -> Result<Option<QuantRows<'a>>> {
    let source = decoder.checkpoint().source();
    let tensors = source.and_then(|source| source.as_any().downcast_ref::<GgufTensors>());
    match tensors {
        Some(tensors) if tensors.block_type(name) == Some(ty) => Ok(tensors.packed(name)?),
        _ => Ok(None),
    }
}

/// Rows `i` and `i + head_dim/2` of each head become rows `2i` and `2i + 1`; of a vector, its values.
fn interleave(rows: QuantRows<'_>, dims: usize, head_dim: usize) -> Result<Vec<u8>> {
    let rows = match dims {
        1 => QuantRows::new(
            rows.block_type(),
            rows.rows() * rows.cols(),
            1,
            rows.into_bytes(),
        )?,
        _ => rows,
    };
    let order = halves_of_neighbours(rows.rows(), head_dim);
    Ok(rows.select(&order)?.into_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn channels_that_rotate_together_become_neighbours() {
        let values: Vec<f32> = (0..12).map(|i| i as f32).collect();
        for (dims, width) in [(1, 12), (2, 1)] {
            let rows = quantise(BlockType::F32, &values, width, None).unwrap();
            let bytes = interleave(rows, dims, 6).unwrap();
            let order = QuantRows::new(BlockType::F32, 1, 12, bytes)
                .unwrap()
                .dequantise();
            assert_eq!(order, [0., 3., 1., 4., 2., 5., 6., 9., 7., 10., 8., 11.]);
        }
    }
}
