//! A small transformer, trained to recall.
//!
//! Gradients do not flow through fused operations, so that the forward pass is written out here; what comes out is an ordinary
//! checkpoint. Sequences grow longer as training goes on.

use std::collections::BTreeMap;
use std::f64::consts::PI;
use std::path::Path;

use anyhow::{Context, Result};
use candle_core::{D, DType, Device, Tensor, Var};
use candle_nn::optim::{AdamW, Optimizer, ParamsAdamW};
use causal_lm::{ModelConfig, synthetic};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::json;
use tensor_io::{Config, WriteOptions};

use super::language::{KEYS, Kind, Sample, VOCABULARY};
use crate::progress::Progress;

/// Longest sequence that the model is trained on.
pub(super) const LENGTH: usize = 128;
/// Field of config.json by which such a model is recognised.
pub(super) const MARK: &str = "recall_keys";
/// Part of the steps over which the learning rate rises.
const WARMUP: usize = 50;
/// Largest learning rate.
const RATE: f64 = 4e-3;
/// Width of the residual stream.
const HIDDEN: usize = 64;
/// How much more attention the head that looks back starts out giving to the token before than to its neighbours, in nats.
const LOOK_BACK: f64 = 4.0;
/// Factor on queries and keys of the head that matches.
const MATCH: f32 = 1.6;
/// Tokens of a step.
const STEP_TOKENS: usize = 1024;
/// Curriculum: length of the sequences, and the share of the steps after which it ends.
const STAGES: [(usize, f64); 3] = [(32, 0.4), (64, 0.7), (LENGTH, 1.0)];

/// Length of the sequences when a share `done` of the steps is done.
fn stage(done: f64) -> usize {
    let stage = STAGES.iter().find(|(_, end)| done < *end);
    stage.map_or(LENGTH, |(length, _)| *length)
}

/// How training went.
#[derive(Debug, Clone, Copy)]
pub(super) struct Trained {
    pub(super) steps: usize,
    pub(super) loss: f64,
    pub(super) seconds: f64,
}

/// The architecture: two layers of two heads.
fn config() -> Config {
    let fields = json!({
        "model_type": "qwen2", "hidden_size": HIDDEN, "intermediate_size": HIDDEN, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": VOCABULARY,
        "max_position_embeddings": 4 * LENGTH, "tie_word_embeddings": true, "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5, MARK: KEYS,
    });
    Config::new(fields.as_object().cloned().unwrap_or_default())
}

/// Trains for `steps` and writes the checkpoint to `dir`.
pub(super) fn train(
    dir: &Path,
    options: &WriteOptions,
    steps: usize,
    seed: u64,
    bar: &Progress,
) -> Result<Trained> {
    let started = std::time::Instant::now();
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let fields = config();
    let student = Student::new(ModelConfig::new(&fields)?, &mut rng)?;
    let mut optimizer = AdamW::new(
        student.vars.values().cloned().collect(),
        ParamsAdamW {
            beta2: 0.98,
            weight_decay: 0.01,
            ..ParamsAdamW::default()
        },
    )?;
    let mut mean = f64::NAN;
    for step in 0..steps {
        let length = stage(step as f64 / steps as f64);
        let samples: Vec<Sample> = (0..STEP_TOKENS / length)
            .map(|i| {
                let prompt = rng.random_range(1..=4);
                Kind::ALL[i % Kind::ALL.len()].sample(length, prompt, &mut rng)
            })
            .collect();
        let loss = student.loss(&samples)?;
        let rise = ((step + 1) as f64 / WARMUP as f64).min(1.0);
        let fall = 0.5 * (1.0 + (PI * step as f64 / steps as f64).cos());
        optimizer.set_learning_rate(RATE * rise * (0.05 + 0.95 * fall));
        optimizer.backward_step(&loss)?;
        let loss = f64::from(loss.to_scalar::<f32>()?);
        mean = if mean.is_nan() {
            loss
        } else {
            0.95 * mean + 0.05 * loss
        };
        bar.inc(1);
    }
    student.write(&fields, dir, options)?;
    Ok(Trained {
        steps,
        loss: mean,
        seconds: started.elapsed().as_secs_f64(),
    })
}

/// The model while it learns: its tensors by their names in the checkpoint.
struct Student {
    config: ModelConfig,
    vars: BTreeMap<String, Var>,
}

impl Student {
    fn new(config: ModelConfig, rng: &mut ChaCha8Rng) -> Result<Self> {
        let mut vars = BTreeMap::new();
        for (name, shape) in config.tensors() {
            let inputs = shape.last().copied().unwrap_or(1) as f32;
            let (centre, spread) = match name.as_str() {
                n if n.ends_with("norm.weight") => (1.0, 0.0),
                n if n.ends_with(".bias") => (0.0, 0.0),
                n if n.contains("embed") => (0.0, 0.5),
                n if n.contains("o_proj") => (0.0, 0.3 * (3.0 / inputs).sqrt()),
                n if n.contains("down") => (0.0, 0.1 * (3.0 / inputs).sqrt()),
                _ => (0.0, 0.3 * (3.0 / inputs).sqrt()),
            };
            let count: usize = shape.iter().product();
            let values: Vec<f32> = (0..count)
                .map(|_| centre + spread * rng.random_range(-1.0f32..=1.0))
                .collect();
            let tensor = Tensor::from_vec(values, shape, &Device::Cpu)?;
            vars.insert(name, Var::from_tensor(&tensor)?);
        }
        let student = Student { config, vars };
        student.induction()?;
        Ok(student)
    }

    /// Lets training begin near an induction circuit, where a minute would not do to find one: the first head of the first layer looks one
    /// token back, through biases that RoPE turns into a preference for that distance, and copies what it sees from the first half
    /// of the residual stream into the second; the first head of the second layer matches the one half of the query with the
    /// other half of the keys. Everything is trained from there.
    fn induction(&self) -> Result<()> {
        let dim = self.config.head_dim;
        let (cos, sin) = self.config.rope.tables(0, 2, DType::F32, &Device::Cpu)?;
        let (cos, sin) = (cos.get(1)?.to_vec1::<f32>()?, sin.get(1)?.to_vec1::<f32>()?);
        let apart: f64 = cos.iter().map(|&cos| 1.0 - f64::from(cos)).sum();
        let back = (LOOK_BACK * (dim as f64).sqrt() / apart).sqrt() as f32;
        self.edit("model.layers.0.self_attn.q_proj.bias", |i, _| {
            (i < dim / 2).then_some(back)
        })?;
        // The key is turned ahead by the rotation of one position, so that the two agree at distance one.
        self.edit("model.layers.0.self_attn.k_proj.bias", |i, _| match i {
            _ if i < dim / 2 => Some(back * cos[i]),
            _ if i < dim => Some(back * sin[i - dim / 2]),
            _ => None,
        })?;
        // Pairs of dimensions that RoPE turns by less than a right angle over a whole sequence can match at any distance.
        let slow = |i: usize| f64::from(sin[i % (dim / 2)]) * (LENGTH as f64) < 0.5 * PI;
        let unit = |on: bool, size: f32| on.then_some(size);
        let first = |part: &str| format!("model.layers.0.self_attn.{part}_proj.weight");
        self.edit(&first("v"), |i, j| unit(i < dim && i == j, 1.0))?;
        self.edit(&first("o"), |i, j| unit(j < dim && i == j + dim, 1.0))?;
        let second = |part: &str| format!("model.layers.1.self_attn.{part}_proj.weight");
        self.edit(&second("q"), |i, j| {
            unit(i < dim && slow(i) && i == j, MATCH)
        })?;
        self.edit(&second("k"), |i, j| {
            unit(i < dim && slow(i) && i + dim == j, MATCH)
        })?;
        self.edit(&second("v"), |i, j| unit(i < dim && i == j, 1.0))?;
        self.edit(&second("o"), |i, j| unit(j < dim && i == j, 1.0))
    }

    /// Replaces the elements of a matrix or vector for which `element` has a value.
    fn edit(&self, name: &str, element: impl Fn(usize, usize) -> Option<f32>) -> Result<()> {
        let var = self
            .vars
            .get(name)
            .with_context(|| format!("no tensor {name}"))?;
        let columns = if var.rank() == 2 { var.dim(1)? } else { 1 };
        let mut values = var.flatten_all()?.to_vec1::<f32>()?;
        for (at, value) in values.iter_mut().enumerate() {
            *value = element(at / columns, at % columns).unwrap_or(*value);
        }
        Ok(var.set(&Tensor::from_vec(values, var.shape(), &Device::Cpu)?)?)
    }

    /// Writes a checkpoint.
    fn write(&self, fields: &Config, dir: &Path, options: &WriteOptions) -> Result<()> {
        let make = |name: &str, _: &[usize]| Ok(self.vars[name].as_tensor().clone());
        synthetic::write(fields, DType::F32, dir, options, make)?;
        Ok(())
    }

    fn var(&self, name: &str) -> Result<&Tensor> {
        let var = self
            .vars
            .get(name)
            .with_context(|| format!("no tensor {name}"))?;
        Ok(var.as_tensor())
    }

    /// Mean cross-entropy over all questions of equally long samples.
    fn loss(&self, samples: &[Sample]) -> Result<Tensor> {
        let length = samples[0].tokens.len();
        let asked = samples.iter().enumerate().flat_map(|(i, sample)| {
            let at = sample.questions.iter();
            at.map(move |&(position, answer)| ((i * length + position) as u32, answer))
        });
        let (rows, answers): (Vec<u32>, Vec<u32>) = asked.unzip();
        let device = &Device::Cpu;
        let hidden = self
            .hidden(samples)?
            .index_select(&Tensor::new(rows, device)?, 0)?;
        let logits = hidden.matmul(&self.var("model.embed_tokens.weight")?.t()?)?;
        Ok(candle_nn::loss::cross_entropy(
            &logits,
            &Tensor::new(answers, device)?,
        )?)
    }

    /// The normed output of the last layer, `[samples * length, hidden]`.
    fn hidden(&self, samples: &[Sample]) -> Result<Tensor> {
        let (batch, length) = (samples.len(), samples[0].tokens.len());
        let device = &Device::Cpu;
        let tokens: Vec<u32> = samples.iter().flat_map(|s| &s.tokens).copied().collect();
        let embedding = self.var("model.embed_tokens.weight")?;
        let mut x = embedding.index_select(&Tensor::new(tokens, device)?, 0)?;
        let (cos, sin) = self.config.rope.tables(0, length, DType::F32, device)?;
        let mask: Vec<f32> = (0..length * length)
            .map(|i| {
                if i % length > i / length {
                    f32::NEG_INFINITY
                } else {
                    0.0
                }
            })
            .collect();
        let mask = Tensor::from_vec(mask, (1, 1, length, length), device)?;
        let dim = self.config.head_dim;
        for layer in 0..self.config.layers() {
            let name = |part: &str| format!("model.layers.{layer}.{part}");
            let input = self.norm(&x, &name("input_layernorm.weight"))?;
            let heads = |path: &str| -> Result<Tensor> {
                let y = self.linear(&input, &name(path))?;
                let y = y.reshape((batch, length, (), dim))?;
                Ok(y.transpose(1, 2)?.contiguous()?)
            };
            let rotate = |x: Tensor| candle_nn::rotary_emb::rope_slow(&x, &cos, &sin);
            let q = rotate(heads("self_attn.q_proj")?)?;
            let k = rotate(heads("self_attn.k_proj")?)?;
            let v = heads("self_attn.v_proj")?;
            let scores = (q.matmul(&k.t()?.contiguous()?)? * (1.0 / (dim as f64).sqrt()))?;
            let weights = candle_nn::ops::softmax(&scores.broadcast_add(&mask)?, D::Minus1)?;
            let mixed = weights.matmul(&v)?.transpose(1, 2)?;
            let mixed = mixed.reshape((batch * length, ()))?;
            x = (x + self.linear(&mixed, &name("self_attn.o_proj"))?)?;
            let input = self.norm(&x, &name("post_attention_layernorm.weight"))?;
            let gate = self.linear(&input, &name("mlp.gate_proj"))?.silu()?;
            let up = self.linear(&input, &name("mlp.up_proj"))?;
            x = (x + self.linear(&(gate * up)?, &name("mlp.down_proj"))?)?;
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
        let mean = x.sqr()?.mean_keepdim(D::Minus1)?;
        let x = x.broadcast_div(&(mean + self.config.rms_eps)?.sqrt()?)?;
        Ok(x.broadcast_mul(self.var(name)?)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use causal_lm::{Decoder, Model};
    use tensor_io::Checkpoint;

    fn samples(rng: &mut ChaCha8Rng) -> Vec<Sample> {
        let sample = |i: usize| Kind::ALL[i % 4].sample(32, 2, rng);
        (0..8).map(sample).collect()
    }

    #[test]
    fn every_parameter_gets_a_gradient() {
        let mut rng = ChaCha8Rng::seed_from_u64(0);
        let student = Student::new(ModelConfig::new(&config()).unwrap(), &mut rng).unwrap();
        let gradients = student
            .loss(&samples(&mut rng))
            .unwrap()
            .backward()
            .unwrap();
        for (name, var) in &student.vars {
            let gradient = gradients
                .get(var.as_tensor())
                .unwrap_or_else(|| panic!("{name}"));
            let size = gradient.abs().unwrap().max_all().unwrap();
            assert!(size.to_scalar::<f32>().unwrap() > 0.0, "{name}");
        }
    }

    #[test]
    fn the_student_computes_what_its_checkpoint_computes() {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let fields = config();
        let student = Student::new(ModelConfig::new(&fields).unwrap(), &mut rng).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model");
        student
            .write(&fields, &path, &WriteOptions::default())
            .unwrap();
        let checkpoint = Checkpoint::open(&path).unwrap();
        let decoder = Decoder::new(&checkpoint, DType::F32, &Device::Cpu).unwrap();
        let model = Model::load(&decoder).unwrap();
        let samples = samples(&mut rng);
        let tokens: Vec<&[u32]> = samples.iter().map(|s| &s.tokens[..]).collect();
        let mut cache = model.full_cache(tokens.len()).unwrap();
        let found = model.forward_all(&tokens, &mut cache).unwrap();
        let head = student
            .var("model.embed_tokens.weight")
            .unwrap()
            .t()
            .unwrap();
        let ours = student.hidden(&samples).unwrap().matmul(&head).unwrap();
        let largest = |x: &Tensor| -> f32 {
            let x = x.abs().unwrap().max_all().unwrap();
            x.to_scalar().unwrap()
        };
        let gap = largest(&(ours.reshape(found.shape()).unwrap() - &found).unwrap());
        assert!(gap < 5e-5 * largest(&found), "{gap} of {}", largest(&found));
    }

    #[test]
    fn sequences_grow_longer_to_the_full_length() {
        assert_eq!([0.0, 0.5, 0.9, 1.0].map(stage), [32, 64, LENGTH, LENGTH]);
    }
}
