//! A decoder while it learns: its tensors by their names in the checkpoint, and a forward pass that carries gradients.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};
use candle_core::{D, DType, Device, Tensor, Var};
use causal_lm::ModelConfig;
use tensor_io::{CheckpointWriter, Config, TensorSpec, WriteOptions};

use super::attention::Attention;
use super::ops::{CrossEntropy, RmsNorm, SwiGlu};

/// A model with a gradient for every tensor: Llama or Qwen2 with tied embeddings.
pub(crate) struct Student {
    config: ModelConfig,
    vars: BTreeMap<String, Var>,
    device: Device,
}

impl Student {
    /// A model whose tensors `make` provides by name and shape.
    pub(crate) fn new(
        config: ModelConfig,
        device: &Device,
        mut make: impl FnMut(&str, &[usize]) -> Vec<f32>,
    ) -> Result<Self> {
        let vars = config.tensors().into_iter().map(|(name, shape)| {
            let tensor = Tensor::from_vec(make(&name, &shape), shape, device)?;
            Ok((name, Var::from_tensor(&tensor)?))
        });
        let vars = vars.collect::<Result<_>>()?;
        Ok(Self {
            config,
            vars,
            device: device.clone(),
        })
    }

    /// Its tensors by name.
    pub(crate) fn vars(&self) -> &BTreeMap<String, Var> {
        &self.vars
    }

    /// Writes a checkpoint of the config that the model was made from, with `files` beside it.
    pub(crate) fn write(
        &self,
        config: &Config,
        dtype: DType,
        dir: &Path,
        options: &WriteOptions,
        files: &[(&str, Vec<u8>)],
    ) -> Result<()> {
        let specs = self.config.tensors().into_iter();
        let specs = specs.map(|(name, shape)| TensorSpec::new(name, dtype, shape));
        let mut writer = CheckpointWriter::create(dir, config, specs.collect(), options)?;
        for (name, var) in &self.vars {
            let tensor = var.as_tensor().to_device(&Device::Cpu)?;
            writer.write_tensor(name, &tensor.to_dtype(dtype)?)?;
        }
        for (name, contents) in files {
            writer.add_file(name, contents)?;
        }
        writer.finish()?;
        Ok(())
    }

    /// The tensor of that name.
    pub(crate) fn var(&self, name: &str) -> Result<&Tensor> {
        let var = self.vars.get(name);
        Ok(var
            .with_context(|| format!("no tensor {name}"))?
            .as_tensor())
    }

    /// Mean cross-entropy, in nats, of `targets` at the rows `at` of equally long sequences.
    pub(crate) fn loss(&self, sequences: &[&[u32]], at: &[u32], targets: &[u32]) -> Result<Tensor> {
        let at = Tensor::new(at, &self.device)?;
        let hidden = self.hidden(sequences)?.index_select(&at, 0)?;
        let logits = hidden.matmul(&self.var("model.embed_tokens.weight")?.t()?)?;
        if self.device.is_cpu() {
            let targets = targets.to_vec();
            return Ok(logits.apply_op1(CrossEntropy { targets })?.mean_all()?);
        }
        Ok(candle_nn::loss::cross_entropy(
            &logits,
            &Tensor::new(targets, &self.device)?,
        )?)
    }

    /// The normed output of the last layer, `[sequences * length, hidden]`.
    pub(crate) fn hidden(&self, sequences: &[&[u32]]) -> Result<Tensor> {
        let length = sequences[0].len();
        let embedding = self.var("model.embed_tokens.weight")?;
        let tokens = Tensor::new(sequences.concat(), &self.device)?;
        let mut x = embedding.index_select(&tokens, 0)?;
        for layer in 0..self.config.layers() {
            let name = |part: &str| format!("model.layers.{layer}.{part}");
            let input = self.norm(&x, &name("input_layernorm.weight"))?;
            let q = self.linear(&input, &name("self_attn.q_proj"))?;
            let k = self.linear(&input, &name("self_attn.k_proj"))?;
            let v = self.linear(&input, &name("self_attn.v_proj"))?;
            let mixed = self.attention(layer, length, &q, &k, &v)?;
            x = (x + self.linear(&mixed, &name("self_attn.o_proj"))?)?;
            let input = self.norm(&x, &name("post_attention_layernorm.weight"))?;
            let gate = self.linear(&input, &name("mlp.gate_proj"))?;
            let up = self.linear(&input, &name("mlp.up_proj"))?;
            let product = match self.device.is_cpu() {
                true => gate.apply_op2(&up, SwiGlu)?,
                false => (gate.silu()? * up)?,
            };
            x = (x + self.linear(&product, &name("mlp.down_proj"))?)?;
        }
        self.norm(&x, "model.norm.weight")
    }

    fn linear(&self, x: &Tensor, path: &str) -> Result<Tensor> {
        let y = x.matmul(&self.var(&format!("{path}.weight"))?.t()?)?;
        Ok(match self.vars.get(&format!("{path}.bias")) {
            Some(bias) => y.broadcast_add(bias.as_tensor())?,
            None => y,
        })
    }

    fn norm(&self, x: &Tensor, name: &str) -> Result<Tensor> {
        let (weight, eps) = (self.var(name)?, self.config.rms_eps);
        if self.device.is_cpu() {
            return Ok(x.apply_op2(weight, RmsNorm { eps: eps as f32 })?);
        }
        composed_norm(x, weight, eps)
    }

    fn attention(
        &self,
        layer: usize,
        length: usize,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
    ) -> Result<Tensor> {
        let (cos, sin) = self
            .config
            .rope
            .tables(0, length, DType::F32, &self.device)?;
        let widths = &self.config.widths[layer];
        if !self.device.is_cpu() {
            return composed_attention(length, self.config.head_dim, [q, k, v], [&cos, &sin]);
        }
        let attention = Attention {
            length,
            heads: widths.heads,
            kv_heads: widths.kv_heads,
            dim: self.config.head_dim,
            cos: cos.flatten_all()?.to_vec1()?,
            sin: sin.flatten_all()?.to_vec1()?,
        };
        Ok(q.apply_op3(k, v, attention)?)
    }
}

fn composed_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    let mean = x.sqr()?.mean_keepdim(D::Minus1)?;
    let x = x.broadcast_div(&(mean + eps)?.sqrt()?)?;
    Ok(x.broadcast_mul(weight)?)
}

/// [`Attention`] of operations that every device has.
fn composed_attention(
    length: usize,
    dim: usize,
    [q, k, v]: [&Tensor; 3],
    [cos, sin]: [&Tensor; 2],
) -> Result<Tensor> {
    let (rows, width) = q.dims2()?;
    let heads = |x: &Tensor| -> Result<Tensor> {
        Ok(x.reshape((rows / length, length, (), dim))?
            .transpose(1, 2)?
            .contiguous()?)
    };
    let rotate = |x: Tensor| candle_nn::rotary_emb::rope_slow(&x, cos, sin);
    let (q, k, v) = (rotate(heads(q)?)?, rotate(heads(k)?)?, heads(v)?);
    let group = q.dim(1)? / k.dim(1)?;
    let repeat = |x: Tensor| -> Result<Tensor> {
        let (batch, kv, length, dim) = x.dims4()?;
        let x = x
            .unsqueeze(2)?
            .broadcast_as((batch, kv, group, length, dim))?;
        Ok(x.reshape((batch, kv * group, length, dim))?)
    };
    let (k, v) = (repeat(k)?, repeat(v)?);
    let mask: Vec<f32> = (0..length * length)
        .map(|i| {
            if i % length > i / length {
                f32::NEG_INFINITY
            } else {
                0.0
            }
        })
        .collect();
    let mask = Tensor::from_vec(mask, (1, 1, length, length), q.device())?;
    let scores = (q.matmul(&k.t()?.contiguous()?)? * (1.0 / (dim as f64).sqrt()))?;
    let weights = candle_nn::ops::softmax(&scores.broadcast_add(&mask)?, D::Minus1)?;
    Ok(weights
        .matmul(&v)?
        .transpose(1, 2)?
        .reshape((rows, width))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn random(shape: &[usize], seed: usize) -> Var {
        let count: usize = shape.iter().product();
        let values: Vec<f32> = (0..count)
            .map(|i| ((i * 31 + seed * 17) as f32 * 0.7).sin())
            .collect();
        Var::from_tensor(&Tensor::from_vec(values, shape, &Device::Cpu).unwrap()).unwrap()
    }

    /// Outputs and the gradients of a weighted sum of them.
    fn outcome(vars: &[&Var], y: &Tensor) -> Vec<Vec<f32>> {
        let weights = random(y.dims(), 9);
        let gradients = (y * weights.as_tensor())
            .unwrap()
            .sum_all()
            .unwrap()
            .backward()
            .unwrap();
        let gradients = vars
            .iter()
            .map(|var| gradients.get(var.as_tensor()).unwrap().clone());
        let all = std::iter::once(y.clone()).chain(gradients);
        all.map(|t| t.flatten_all().unwrap().to_vec1().unwrap())
            .collect()
    }

    fn assert_close(ours: &[Vec<f32>], composed: &[Vec<f32>]) {
        for (i, (ours, composed)) in ours.iter().zip(composed).enumerate() {
            let size = composed.iter().fold(0f32, |m, x| m.max(x.abs()));
            for (a, b) in ours.iter().zip(composed) {
                assert!(
                    (a - b).abs() <= 2e-5 * size,
                    "tensor {i}: {a} and {b} of {size}"
                );
            }
        }
    }

    #[test]
    fn rms_norm_and_its_gradients_are_those_of_candle() {
        let (x, w) = (random(&[150, 12], 1), random(&[12], 2));
        let ours = x.apply_op2(&w, RmsNorm { eps: 1e-5 }).unwrap();
        let composed = composed_norm(&x, &w, 1e-5).unwrap();
        assert_close(&outcome(&[&x, &w], &ours), &outcome(&[&x, &w], &composed));
    }

    #[test]
    fn swiglu_and_its_gradients_are_those_of_candle() {
        let (gate, up) = (random(&[9, 700], 1), random(&[9, 700], 2));
        let ours = gate.apply_op2(&up, SwiGlu).unwrap();
        let composed = (gate.silu().unwrap() * up.as_tensor()).unwrap();
        assert_close(
            &outcome(&[&gate, &up], &ours),
            &outcome(&[&gate, &up], &composed),
        );
    }

    #[test]
    fn cross_entropy_and_its_gradient_are_those_of_candle() {
        let logits = random(&[7, 11], 1);
        let targets: Vec<u32> = (0..7).map(|i| i * 3 % 11).collect();
        let composed = candle_nn::loss::cross_entropy(
            &logits,
            &Tensor::new(&targets[..], &Device::Cpu).unwrap(),
        );
        let ours = logits
            .apply_op1(CrossEntropy { targets })
            .unwrap()
            .mean_all()
            .unwrap();
        assert_close(
            &outcome(&[&logits], &ours),
            &outcome(&[&logits], &composed.unwrap()),
        );
    }

    #[test]
    fn attention_and_its_gradients_are_those_of_candle() {
        let (length, dim) = (150, 8);
        for (heads, kv_heads) in [(4, 4), (6, 2), (3, 1)] {
            let q = random(&[2 * length, heads * dim], 1);
            let [k, v] = [2, 3].map(|seed| random(&[2 * length, kv_heads * dim], seed));
            let angles = random(&[length, dim / 2], 4);
            let (cos, sin) = (angles.cos().unwrap(), angles.sin().unwrap());
            let list = |t: &Tensor| t.flatten_all().unwrap().to_vec1().unwrap();
            let attention = Attention {
                length,
                heads,
                kv_heads,
                dim,
                cos: list(&cos),
                sin: list(&sin),
            };
            let ours = q.apply_op3(&k, &v, attention).unwrap();
            let composed = composed_attention(length, dim, [&q, &k, &v], [&cos, &sin]).unwrap();
            assert_close(
                &outcome(&[&q, &k, &v], &ours),
                &outcome(&[&q, &k, &v], &composed),
            );
        }
    }
}
