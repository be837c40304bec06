//! A decoder while it is trained: its tensors by their names in the checkpoint, and a forward pass with gradients.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{D, DType, Device, Tensor, Var};
use causal_lm::ModelConfig;
use tensor_io::{CheckpointWriter, Config, TensorSpec, WriteOptions};

use super::attention::Attention;
use super::experts::{Experts, mixture};
use super::ops::{CrossEntropy, RmsNorm, SwiGlu};
use crate::{Error, Result};

/// The sequences of one training step, with the tokens to predict.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    sequences: Vec<Vec<u32>>,
    /// Positions of the concatenated sequences that have a target.
    positions: Vec<u32>,
    targets: Vec<u32>,
}

impl Batch {
    /// Equally long sequences in which every token but the first is to be predicted from those before it.
    ///
    /// # Errors
    /// [`Error::Batch`] for sequences of different lengths, or of fewer than two tokens.
    pub fn next_tokens(sequences: Vec<Vec<u32>>) -> Result<Self> {
        let length = sequences.first().map_or(0, Vec::len);
        if length < 2 {
            let reason = format!("sequences of {length} tokens have none to predict");
            return Err(Error::Batch(reason));
        }
        let targets = sequences.iter().enumerate().flat_map(|(index, sequence)| {
            let next = sequence.iter().enumerate().skip(1);
            next.map(move |(at, &token)| (index, at - 1, token))
        });
        let targets: Vec<_> = targets.collect();
        Self::new(sequences, targets)
    }

    /// Equally long sequences and the targets: the sequence's index, a position in it, and the token that is right after
    /// that position.
    ///
    /// # Errors
    /// [`Error::Batch`] for sequences of different lengths, no target, or one outside of the sequences.
    pub fn new(
        sequences: Vec<Vec<u32>>,
        targets: impl IntoIterator<Item = (usize, usize, u32)>,
    ) -> Result<Self> {
        let length = sequences.first().map_or(0, Vec::len);
        if let Some(other) = sequences.iter().find(|s| s.len() != length) {
            let reason = format!("sequences of {length} and of {} tokens", other.len());
            return Err(Error::Batch(reason));
        }
        let mut batch = Self {
            positions: Vec::new(),
            targets: Vec::new(),
            sequences,
        };
        for (sequence, position, token) in targets {
            if sequence >= batch.sequences.len() || position >= length {
                return Err(Error::Batch(format!(
                    "a target at position {position} of sequence {sequence}, with {} sequences of {length} tokens",
                    batch.sequences.len()
                )));
            }
            let row = u32::try_from(sequence * length + position)
                .map_err(|_| Error::Batch("more than 2^32 tokens".into()))?;
            batch.positions.push(row);
            batch.targets.push(token);
        }
        if batch.targets.is_empty() {
            return Err(Error::Batch("no target".into()));
        }
        Ok(batch)
    }
}

/// How strongly a mixture is drawn to equal use of its experts (Switch Transformer, arXiv 2101.03961, eq. 4).
const BALANCE: f64 = 0.01;

/// A Llama, Qwen2 or Mixtral decoder with tied embeddings whose every tensor is trained.
pub struct TrainableDecoder {
    config: ModelConfig,
    vars: BTreeMap<String, Var>,
    device: Device,
}

impl TrainableDecoder {
    /// A model whose initial values `init` gives by name and shape, in row-major order.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for an architecture that training does not implement, [`Error::InitialValues`].
    pub fn new(
        config: ModelConfig,
        device: &Device,
        mut init: impl FnMut(&str, &[usize]) -> Vec<f32>,
    ) -> Result<Self> {
        check(&config)?;
        let vars = config.tensors().into_iter().map(|(name, shape)| {
            let (values, expected) = (init(&name, &shape), shape.iter().product::<usize>());
            if values.len() != expected {
                return Err(Error::InitialValues {
                    found: values.len(),
                    tensor: name,
                    expected,
                });
            }
            let tensor = Tensor::from_vec(values, shape, device)?;
            Ok((name, Var::from_tensor(&tensor)?))
        });
        let vars = vars.collect::<Result<_>>()?;
        Ok(Self {
            config,
            vars,
            device: device.clone(),
        })
    }

    /// The tensors by their names in the checkpoint.
    pub fn vars(&self) -> &BTreeMap<String, Var> {
        &self.vars
    }

    /// Writes a checkpoint in `dtype`: `config`, which the model was made from, the tensors, and further `files`.
    ///
    /// # Errors
    /// What writing reports.
    pub fn write(
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
    ///
    /// # Errors
    /// [`Error::MissingTensor`].
    pub fn tensor(&self, name: &str) -> Result<&Tensor> {
        match self.vars.get(name) {
            Some(var) => Ok(var.as_tensor()),
            None => Err(Error::MissingTensor(name.into())),
        }
    }

    fn embedding(&self) -> Result<&Tensor> {
        self.tensor(&self.config.names.embedding())
    }

    /// Mean cross-entropy of the batch's targets, in nats; a scalar to differentiate. For a mixture a hundredth of its
    /// balance is added: E Σ f p over experts, the mean of all layers, where f is the share of choices that an expert gets and
    /// p its mean probability; equal use makes it 1.
    ///
    /// # Errors
    /// [`Error::Batch`] for a token outside of the vocabulary.
    pub fn loss(&self, batch: &Batch) -> Result<Tensor> {
        if let Some(token) = batch
            .targets
            .iter()
            .find(|t| **t as usize >= self.config.vocab)
        {
            return Err(self.outside(*token));
        }
        let positions = Tensor::new(&batch.positions[..], &self.device)?;
        let (hidden, balances) = self.run(&batch.sequences)?;
        let hidden = hidden.index_select(&positions, 0)?;
        let logits = hidden.matmul(&self.embedding()?.t()?)?;
        let mut loss = match self.device.is_cpu() {
            true => {
                let targets = batch.targets.clone();
                logits.apply_op1(CrossEntropy { targets })?.mean_all()?
            }
            false => {
                let targets = Tensor::new(&batch.targets[..], &self.device)?;
                candle_nn::loss::cross_entropy(&logits, &targets)?
            }
        };
        let weight = BALANCE / balances.len().max(1) as f64;
        for balance in balances {
            loss = (loss + (balance * weight)?)?;
        }
        Ok(loss)
    }

    fn outside(&self, token: u32) -> Error {
        Error::Batch(format!(
            "token {token}, with a vocabulary of {} entries",
            self.config.vocab
        ))
    }

    /// The normed output of the last layer for equally long sequences, `[sequences * length, hidden]`.
    ///
    /// # Errors
    /// [`Error::Batch`] for sequences of different lengths or a token outside of the vocabulary.
    pub fn hidden(&self, sequences: &[Vec<u32>]) -> Result<Tensor> {
        Ok(self.run(sequences)?.0)
    }

    /// [`TrainableDecoder::hidden`], and the balance of each mixture.
    fn run(&self, sequences: &[Vec<u32>]) -> Result<(Tensor, Vec<Tensor>)> {
        let length = sequences.first().map_or(0, Vec::len);
        if length == 0 || sequences.iter().any(|s| s.len() != length) {
            return Err(Error::Batch("sequences that are not equally long".into()));
        }
        let tokens = sequences.concat();
        if let Some(token) = tokens.iter().find(|t| **t as usize >= self.config.vocab) {
            return Err(self.outside(*token));
        }
        let tokens = Tensor::new(tokens, &self.device)?;
        let mut x = self.embedding()?.index_select(&tokens, 0)?;
        let mut balances = Vec::new();
        for layer in 0..self.config.layers() {
            let name = |part: &str| format!("model.layers.{layer}.{part}");
            let input = self.norm(&x, &name("input_layernorm.weight"))?;
            let q = self.linear(&input, &name("self_attn.q_proj"))?;
            let k = self.linear(&input, &name("self_attn.k_proj"))?;
            let v = self.linear(&input, &name("self_attn.v_proj"))?;
            let mixed = self.attention(layer, length, &q, &k, &v)?;
            x = (x + self.linear(&mixed, &name("self_attn.o_proj"))?)?;
            let input = self.norm(&x, &name("post_attention_layernorm.weight"))?;
            let output = match self.config.mixtures[layer] {
                None => {
                    let gate = self.linear(&input, &name("mlp.gate_proj"))?;
                    let up = self.linear(&input, &name("mlp.up_proj"))?;
                    self.linear(&swiglu(&gate, &up)?, &name("mlp.down_proj"))?
                }
                Some(of) => {
                    let router = self.tensor(&name("block_sparse_moe.gate.weight"))?;
                    let expert = |expert: usize, x: &Tensor| {
                        let linear = |x: &Tensor, part: &str| {
                            let path = format!("block_sparse_moe.experts.{expert}.{part}");
                            self.linear(x, &name(&path))
                        };
                        let product = swiglu(&linear(x, "w1")?, &linear(x, "w3")?)?;
                        linear(&product, "w2")
                    };
                    let Experts { output, balance } = mixture(&input, router, of.chosen, expert)?;
                    balances.push(balance);
                    output
                }
            };
            x = (x + output)?;
        }
        Ok((self.norm(&x, "model.norm.weight")?, balances))
    }

    fn linear(&self, x: &Tensor, path: &str) -> Result<Tensor> {
        let y = x.matmul(&self.tensor(&format!("{path}.weight"))?.t()?)?;
        Ok(match self.vars.get(&format!("{path}.bias")) {
            Some(bias) => y.broadcast_add(bias.as_tensor())?,
            None => y,
        })
    }

    fn norm(&self, x: &Tensor, name: &str) -> Result<Tensor> {
        let (weight, eps) = (self.tensor(name)?, self.config.norm.eps);
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
        let (cos, sin) =
            self.config.ropes[0].tables((0, length, length), DType::F32, &self.device)?;
        let dim = self.config.head_dim(layer);
        let widths = &self.config.widths[layer];
        if !self.device.is_cpu() {
            return composed_attention(length, dim, [q, k, v], [&cos, &sin]);
        }
        let attention = Attention {
            length,
            heads: widths.heads,
            kv_heads: widths.kv_heads,
            dim,
            cos: cos.flatten_all()?.to_vec1()?,
            sin: sin.flatten_all()?.to_vec1()?,
        };
        Ok(q.apply_op3(k, v, attention)?)
    }
}

fn swiglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    Ok(match gate.device().is_cpu() {
        true => gate.apply_op2(up, SwiGlu)?,
        false => (gate.silu()? * up)?,
    })
}

/// Refuses what the forward pass above does not compute.
fn check(config: &ModelConfig) -> Result<()> {
    let sublayers = config.widths.iter().zip(&config.mixtures);
    let missing = sublayers.map(|(w, mixture)| w.heads == 0 || w.neurons == 0 && mixture.is_none());
    let unsupported = [
        (
            !config.is_plain_llama() && !config.is_plain_mixtral(),
            "an architecture other than Llama, Qwen2 and Mixtral, or options that change what they compute",
        ),
        (!config.tied, "an output head that is not the embedding"),
        (
            missing.into_iter().any(|missing| missing),
            "layers without attention or without MLP",
        ),
    ];
    match unsupported.iter().find(|(found, _)| *found) {
        Some((_, what)) => Err(Error::Unsupported((*what).into())),
        None => Ok(()),
    }
}

fn composed_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    let mean = x.sqr()?.mean_keepdim(D::Minus1)?;
    let x = x.broadcast_div(&(mean + eps)?.sqrt()?)?;
    Ok(x.broadcast_mul(weight)?)
}

/// [`Attention`] by operations that every device has.
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
