//! A small transformer, trained to recall.
//!
//! What comes out is an ordinary checkpoint. Sequences grow longer as training goes on.

use std::f64::consts::PI;
use std::path::Path;

use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor};
use candle_nn::optim::{AdamW, Optimizer, ParamsAdamW};
use causal_lm::ModelConfig;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::json;
use tensor_io::{Config, WriteOptions};

use super::language::{KEYS, Kind, Sample, VOCABULARY};
use crate::progress::Progress;
use crate::train::Student;

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
    let student = student(ModelConfig::new(&fields)?, &mut rng)?;
    let mut optimizer = AdamW::new(
        student.vars().values().cloned().collect(),
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
        let loss = loss(&student, &samples)?;
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
    student.write(&fields, DType::F32, dir, options, &[])?;
    Ok(Trained {
        steps,
        loss: mean,
        seconds: started.elapsed().as_secs_f64(),
    })
}

/// The model before it learns anything.
fn student(config: ModelConfig, rng: &mut ChaCha8Rng) -> Result<Student> {
    let dim = config.head_dim;
    let (cos, sin) = config.rope.tables(0, 2, DType::F32, &Device::Cpu)?;
    let student = Student::new(config, &Device::Cpu, |name, shape| {
        let inputs = shape.last().copied().unwrap_or(1) as f32;
        let (centre, spread) = match name {
            n if n.ends_with("norm.weight") => (1.0, 0.0),
            n if n.ends_with(".bias") => (0.0, 0.0),
            n if n.contains("embed") => (0.0, 0.5),
            n if n.contains("o_proj") => (0.0, 0.3 * (3.0 / inputs).sqrt()),
            n if n.contains("down") => (0.0, 0.1 * (3.0 / inputs).sqrt()),
            _ => (0.0, 0.3 * (3.0 / inputs).sqrt()),
        };
        let count: usize = shape.iter().product();
        (0..count)
            .map(|_| centre + spread * rng.random_range(-1.0f32..=1.0))
            .collect()
    })?;
    induction(
        &student,
        dim,
        &cos.get(1)?.to_vec1()?,
        &sin.get(1)?.to_vec1()?,
    )?;
    Ok(student)
}

/// Lets training begin near an induction circuit, where a minute would not do to find one: the first head of the first layer looks one
/// token back, through biases that RoPE turns into a preference for that distance, and copies what it sees from the first half
/// of the residual stream into the second; the first head of the second layer matches the one half of the query with the
/// other half of the keys. Everything is trained from there.
fn induction(student: &Student, dim: usize, cos: &[f32], sin: &[f32]) -> Result<()> {
    let apart: f64 = cos.iter().map(|&cos| 1.0 - f64::from(cos)).sum();
    let back = (LOOK_BACK * (dim as f64).sqrt() / apart).sqrt() as f32;
    edit(student, "model.layers.0.self_attn.q_proj.bias", |i, _| {
        (i < dim / 2).then_some(back)
    })?;
    // The key is turned ahead by the rotation of one position, so that the two agree at distance one.
    edit(
        student,
        "model.layers.0.self_attn.k_proj.bias",
        |i, _| match i {
            _ if i < dim / 2 => Some(back * cos[i]),
            _ if i < dim => Some(back * sin[i - dim / 2]),
            _ => None,
        },
    )?;
    // Pairs of dimensions that RoPE turns by less than a right angle over a whole sequence can match at any distance.
    let slow = |i: usize| f64::from(sin[i % (dim / 2)]) * (LENGTH as f64) < 0.5 * PI;
    let unit = |on: bool, size: f32| on.then_some(size);
    let first = |part: &str| format!("model.layers.0.self_attn.{part}_proj.weight");
    edit(student, &first("v"), |i, j| unit(i < dim && i == j, 1.0))?;
    edit(student, &first("o"), |i, j| {
        unit(j < dim && i == j + dim, 1.0)
    })?;
    let second = |part: &str| format!("model.layers.1.self_attn.{part}_proj.weight");
    edit(student, &second("q"), |i, j| {
        unit(i < dim && slow(i) && i == j, MATCH)
    })?;
    edit(student, &second("k"), |i, j| {
        unit(i < dim && slow(i) && i + dim == j, MATCH)
    })?;
    edit(student, &second("v"), |i, j| unit(i < dim && i == j, 1.0))?;
    edit(student, &second("o"), |i, j| unit(j < dim && i == j, 1.0))
}

/// Replaces the elements of a matrix or vector for which `element` has a value.
fn edit(
    student: &Student,
    name: &str,
    element: impl Fn(usize, usize) -> Option<f32>,
) -> Result<()> {
    let var = student
        .vars()
        .get(name)
        .with_context(|| format!("no tensor {name}"))?;
    let columns = if var.rank() == 2 { var.dim(1)? } else { 1 };
    let mut values = var.flatten_all()?.to_vec1::<f32>()?;
    for (at, value) in values.iter_mut().enumerate() {
        *value = element(at / columns, at % columns).unwrap_or(*value);
    }
    Ok(var.set(&Tensor::from_vec(values, var.shape(), &Device::Cpu)?)?)
}

/// Mean cross-entropy over all questions of equally long samples.
fn loss(student: &Student, samples: &[Sample]) -> Result<Tensor> {
    let length = samples[0].tokens.len();
    let asked = samples.iter().enumerate().flat_map(|(i, sample)| {
        let at = sample.questions.iter();
        at.map(move |&(position, answer)| ((i * length + position) as u32, answer))
    });
    let (rows, answers): (Vec<u32>, Vec<u32>) = asked.unzip();
    student.loss(&tokens(samples), &rows, &answers)
}

fn tokens(samples: &[Sample]) -> Vec<&[u32]> {
    samples.iter().map(|sample| &sample.tokens[..]).collect()
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
        let student = student(ModelConfig::new(&config()).unwrap(), &mut rng).unwrap();
        let gradients = loss(&student, &samples(&mut rng))
            .unwrap()
            .backward()
            .unwrap();
        for (name, var) in student.vars() {
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
        let student = student(ModelConfig::new(&fields).unwrap(), &mut rng).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model");
        student
            .write(&fields, DType::F32, &path, &WriteOptions::default(), &[])
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
        let ours = student
            .hidden(&super::tokens(&samples))
            .unwrap()
            .matmul(&head)
            .unwrap();
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
