//! The tensors of a GGUF file: llama.cpp's names, and the order of rows that its graphs expect.

use super::rotation;
use crate::Result;
use candle_core::{DType, Device};
use causal_lm::gguf::layout::{self, Experts, FileTensor, Part, Rows};
use causal_lm::gguf::names::{self as stored_names, in_block};
use causal_lm::gguf::{Architecture, GgufTensors, Order};
use causal_lm::{Decoder, LinearName};
use packed::{BlockType, QuantRows, quantise};

/// A tensor of the file.
#[derive(Debug)]
pub(super) struct Output {
    pub(super) name: String,
    pub(super) shape: Vec<usize>,
    /// Whether it is in 32-bit floats whatever the type of the file.
    pub(super) float: bool,
    source: Source,
}

#[derive(Debug)]
enum Source {
    /// Rows of tensors of the checkpoint, with a number added and the sum multiplied by another.
    Rows {
        parts: Vec<Part>,
        offset: f32,
        factor: f32,
    },
    /// Zeros that stand for a half that is gone, or for a bias.
    Zeros,
    /// Values that the config states.
    Values(Vec<f32>),
}

/// All tensors in the order of the data.
///
/// A half that is gone is written as one unit of zeros, which gives the same output: `deci` takes a
/// layer without an MLP for one without attention too, and has no bias for a layer without
/// attention.
pub(super) fn tensors(decoder: &Decoder<'_>, architecture: Architecture) -> Result<Vec<Output>> {
    let (config, checkpoint) = (decoder.config(), decoder.checkpoint());
    let mut outputs = Vec::new();
    for tensor in layout::tensors(config, architecture, Experts::Stacked) {
        let FileTensor {
            name,
            shape,
            parts,
            offset,
            factor,
            float,
            optional,
        } = tensor;
        let exists = parts.iter().all(|part| checkpoint.contains(&part.tensor));
        let source = match (exists, optional) {
            (false, true) if !needs_bias(architecture, &name) => continue,
            (false, true) => Source::Zeros,
            _ => Source::Rows {
                parts,
                offset,
                factor,
            },
        };
        outputs.push(Output {
            name,
            shape,
            float,
            source,
        });
    }
    for (name, values) in rotation::factors(decoder, architecture)? {
        outputs.push(Output {
            name: name.into(),
            shape: vec![values.len()],
            float: true,
            source: Source::Values(values),
        });
    }
    if architecture == Architecture::Deci {
        outputs.extend(stand_ins(decoder));
    }
    if config.tied && needs_head(architecture) {
        outputs.push(Output {
            name: stored_names::HEAD.into(),
            shape: vec![config.vocab, config.hidden],
            float: false,
            source: Source::Rows {
                parts: vec![Part {
                    tensor: config.names.embedding(),
                    rows: Rows::All,
                }],
                offset: 0.0,
                factor: 1.0,
            },
        });
    }
    // The tensors of a block are read together.
    outputs.sort_by_key(|output| block_of(&output.name));
    Ok(outputs)
}

/// Place of a tensor's block in the file: what is before the blocks, blocks, what is behind.
fn block_of(name: &str) -> usize {
    let block = name
        .strip_prefix("blk.")
        .and_then(|name| name.split_once('.'));
    match block.and_then(|(block, _)| block.parse::<usize>().ok()) {
        Some(block) => block + 1,
        None if name.starts_with("output") => usize::MAX,
        None => 0,
    }
}

/// Whether llama.cpp does not load the architecture without this bias.
fn needs_bias(architecture: Architecture, name: &str) -> bool {
    match architecture {
        Architecture::GptNeox => true,
        Architecture::Qwen2Moe => ["attn_q.", "attn_k.", "attn_v."]
            .iter()
            .any(|linear| name.contains(linear)),
        _ => false,
    }
}

/// Whether llama.cpp does not load the architecture without a head of its own.
fn needs_head(architecture: Architecture) -> bool {
    matches!(
        architecture,
        Architecture::GptNeox | Architecture::Qwen2Moe | Architecture::Olmoe | Architecture::Olmo2
    )
}

/// Linears of the one unit that stands for a half that is gone, and the bias that is left of it.
fn stand_ins(decoder: &Decoder<'_>) -> Vec<Output> {
    let (config, names) = (decoder.config(), decoder.config().names);
    let (hidden, head_dim) = (config.hidden, config.head_dim(0));
    let mut outputs = Vec::new();
    for layer in 0..config.layers() {
        for linear in LinearName::ALL {
            let Some(module) = names.module_of(linear) else {
                continue;
            };
            if config.linear_shape(layer, linear).is_some() {
                continue;
            }
            let shape = match linear {
                LinearName::Q | LinearName::K | LinearName::V => [head_dim, hidden],
                LinearName::O => [hidden, head_dim],
                LinearName::Gate | LinearName::Up => [1, hidden],
                _ => [hidden, 1],
            };
            let name =
                |kind: &str| in_block(layer, &format!("{}.{kind}", stored_names::linear(linear)));
            outputs.push(Output {
                name: name("weight"),
                shape: shape.to_vec(),
                float: false,
                source: Source::Zeros,
            });
            let bias = names.bias(layer, module);
            if decoder.checkpoint().contains(&bias) {
                outputs.push(Output {
                    name: name("bias"),
                    shape: vec![hidden],
                    float: true,
                    source: Source::Rows {
                        parts: vec![Part {
                            tensor: bias,
                            rows: Rows::All,
                        }],
                        offset: 0.0,
                        factor: 1.0,
                    },
                });
            }
        }
    }
    outputs
}

impl Output {
    /// Its bytes in the type `ty`.
    pub(super) fn bytes(&self, decoder: &Decoder<'_>, ty: BlockType) -> Result<Vec<u8>> {
        let width = self.shape.last().copied().unwrap_or(1);
        let (parts, offset, factor) = match &self.source {
            Source::Rows {
                parts,
                offset,
                factor,
            } => (parts, *offset, *factor),
            Source::Zeros => {
                let zeros = vec![0.0; self.shape.iter().product()];
                return Ok(quantise(ty, &zeros, width, None)?.into_bytes());
            }
            Source::Values(values) => return Ok(quantise(ty, values, width, None)?.into_bytes()),
        };
        let unchanged = (offset, factor) == (0.0, 1.0);
        let mut bytes = Vec::new();
        for part in parts {
            let rows = match stored_blocks(decoder, &part.tensor, ty)?.filter(|_| unchanged) {
                Some(rows) => match &part.rows {
                    Rows::Range(range) => rows.slice(range.clone())?.into_owned(),
                    _ => rows,
                },
                None => {
                    let mut values = values(decoder, part)?;
                    if !unchanged {
                        let change = |value: &mut f32| *value = (*value + offset) * factor;
                        values.iter_mut().for_each(change);
                    }
                    quantise(ty, &values, width, None)?
                }
            };
            decoder.checkpoint().release([part.tensor.as_str()]);
            let rows = match &part.rows {
                Rows::Order(order) => reordered(rows, self.shape.len(), *order)?,
                _ => rows,
            };
            match parts.len() {
                1 => return Ok(rows.into_bytes()),
                _ => bytes.extend_from_slice(rows.bytes()),
            }
        }
        Ok(bytes)
    }
}

/// The rows of a part, those of an order as they are stored.
fn values(decoder: &Decoder<'_>, part: &Part) -> Result<Vec<f32>> {
    let checkpoint = decoder.checkpoint();
    let (name, device) = (&part.tensor, &Device::Cpu);
    let tensor = match &part.rows {
        Rows::Range(range) => checkpoint.rows_as(name, range.clone(), DType::F32, device)?,
        _ => checkpoint.tensor_as(name, DType::F32, device)?,
    };
    Ok(tensor.flatten_all()?.to_vec1::<f32>()?)
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

/// The rows in the order of the file; of a vector, its values.
fn reordered<'a>(rows: QuantRows<'a>, dims: usize, order: Order) -> Result<QuantRows<'a>> {
    let rows = match dims {
        1 => QuantRows::new(
            rows.block_type(),
            rows.rows() * rows.cols(),
            1,
            rows.into_bytes(),
        )?,
        _ => rows,
    };
    Ok(rows.select(&order.all_in_checkpoint())?)
}

#[cfg(test)]
mod tests {
    use super::*;
    #[test]
    fn channels_that_rotate_together_become_neighbours() {
        let values: Vec<f32> = (0..12).map(|i| i as f32).collect();
        for (dims, width) in [(1, 12), (2, 1)] {
            let rows = quantise(BlockType::F32, &values, width, None).unwrap();
            let order = Order::Neighbours {
                rows: 12,
                head_dim: 6,
            };
            let rows = reordered(rows, dims, order).unwrap();
            let order = QuantRows::new(BlockType::F32, 1, 12, rows.into_bytes())
                .unwrap()
                .dequantise();
            assert_eq!(order, [0., 3., 1., 4., 2., 5., 6., 9., 7., 10., 8., 11.]);
        }
    }
}
