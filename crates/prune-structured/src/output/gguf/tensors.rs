//! The tensors of a GGUF file: llama.cpp's names, and the order of rows that its rotation expects.

use super::{Architecture, unsupported};
use crate::Result;
use candle_core::{DType, Device, Tensor};
use causal_lm::{Decoder, LinearName};

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
    let mut outputs = vec![copy("token_embd.weight".into(), names.embedding())];
    if let Some(factors) = super::metadata::rope_factors(decoder)? {
        outputs.push(Output {
            name: "rope_freqs.weight".into(),
            source: Source::RopeFactors(factors),
        });
    }
    for layer in 0..config.layers() {
        let inside = |part: &str| format!("blk.{layer}.{part}");
        for (part, path) in [
            ("attn_norm.weight", "input_layernorm.weight"),
            ("ffn_norm.weight", "post_attention_layernorm.weight"),
            ("attn_q_norm.weight", "self_attn.q_norm.weight"),
            ("attn_k_norm.weight", "self_attn.k_norm.weight"),
        ] {
            let source = names.block(layer, path);
            if checkpoint.contains(&source) {
                outputs.push(copy(inside(part), source));
            }
        }
        for linear in LinearName::ALL {
            let Some(module) = names.module_of(linear) else {
                continue;
            };
            let part = part(linear);
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
    outputs.push(copy("output_norm.weight".into(), names.final_norm_weight()));
    if !config.tied {
        outputs.push(copy("output.weight".into(), names.head().into()));
    }
    Ok(outputs)
}

fn part(linear: LinearName) -> &'static str {
    match linear {
        LinearName::Q => "attn_q",
        LinearName::K => "attn_k",
        LinearName::V => "attn_v",
        LinearName::O => "attn_output",
        LinearName::Gate => "ffn_gate",
        LinearName::Up => "ffn_up",
        _ => "ffn_down",
    }
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
    /// Its values, f32 on the CPU.
    pub(super) fn load(&self, decoder: &Decoder<'_>) -> Result<Tensor> {
        let read = |name: &str| -> Result<Tensor> {
            let tensor = decoder
                .checkpoint()
                .tensor_as(name, DType::F32, &Device::Cpu)?;
            decoder.checkpoint().release([name]);
            Ok(tensor)
        };
        Ok(match &self.source {
            Source::Copy(name) => read(name)?,
            Source::Interleaved(name) => interleave(&read(name)?, decoder.config().head_dim(0))?,
            Source::Zeros(shape) => Tensor::zeros(shape.as_slice(), DType::F32, &Device::Cpu)?,
            Source::RopeFactors(factors) => Tensor::new(factors.as_slice(), &Device::Cpu)?,
        })
    }
}

/// Rows `i` and `i + head_dim/2` of each head become rows `2i` and `2i + 1`.
fn interleave(rows: &Tensor, head_dim: usize) -> Result<Tensor> {
    let count = rows.dims()[0];
    let order = (0..count).map(|row| {
        let (head, within) = (row / head_dim, row % head_dim);
        (head * head_dim + within / 2 + within % 2 * (head_dim / 2)) as u32
    });
    let order = Tensor::from_iter(order, &Device::Cpu)?;
    Ok(rows.index_select(&order, 0)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn channels_that_rotate_together_become_neighbours() {
        let rows = Tensor::from_iter((0..12).map(|i| i as f32), &Device::Cpu).unwrap();
        let order = interleave(&rows, 6).unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(order, [0., 3., 1., 4., 2., 5., 6., 9., 7., 10., 8., 11.]);
    }
}
