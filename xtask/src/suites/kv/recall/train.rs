//! A small transformer trained to recall, written as an ordinary checkpoint.

use std::f64::consts::PI;
use std::path::Path;

use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor};
use causal_lm::ModelConfig;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::json;
use tensor_io::{Config, WriteOptions};

use toy_lm::{Batch, Progress, Stage, TrainOptions, TrainableDecoder, Trained};

use super::language::{KEYS, Kind, Sample, VOCABULARY};

/// Longest sequence that the model is trained on.
pub(super) const LENGTH: usize = 128;
/// Positions that the trained model is made for.
pub(super) const POSITIONS: usize = 4 * LENGTH;
/// Field of config.json by which such a model is recognised.
pub(super) const MARK: &str = "recall_keys";
/// Part of the steps over which the learning rate rises.
const WARMUP: usize = 50;
/// Largest learning rate.
const RATE: f64 = 4e-3;
/// Width of the residual stream.
const HIDDEN: usize = 64;
/// Initial preference of the first layer's head for the token before over its neighbours, in nats.
const LOOK_BACK: f64 = 4.0;
/// Factor on queries and keys of the head that matches.
const MATCH: f32 = 1.6;
/// Tokens of a step.
const STEP_TOKENS: usize = 1024;
/// Lengths of the sequences over the run.
const STAGES: [Stage; 3] = [
    Stage {
        length: 32,
        until: 0.4,
    },
    Stage {
        length: 64,
        until: 0.7,
    },
    Stage {
        length: LENGTH,
        until: 1.0,
    },
];

/// The architecture: two layers of two heads.
fn config() -> Config {
    let fields = json!({
        "model_type": "qwen2", "hidden_size": HIDDEN, "intermediate_size": HIDDEN, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": VOCABULARY,
        "max_position_embeddings": POSITIONS, "tie_word_embeddings": true, "rope_theta": 10000.0,
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
    progress: &dyn Progress,
) -> Result<Trained> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let fields = config();
    let decoder = initial(ModelConfig::new(&fields)?, &mut rng)?;
    let mut training = TrainOptions::new(steps, LENGTH);
    training.warmup = WARMUP;
    training.learning_rate = RATE;
    training.stages = STAGES.to_vec();
    let next = |length| {
        let samples = (0..STEP_TOKENS / length).map(|i| {
            let prompt = rng.random_range(1..=4);
            Kind::ALL[i % Kind::ALL.len()].sample(length, prompt, &mut rng)
        });
        batch(&samples.collect::<Vec<_>>())
    };
    let trained = toy_lm::train(&decoder, &training, next, progress)?;
    decoder.write(&fields, DType::F32, dir, options, &[])?;
    Ok(trained)
}

/// The answers to all questions of equally long samples.
fn batch(samples: &[Sample]) -> toy_lm::Result<Batch> {
    let targets = samples.iter().enumerate().flat_map(|(i, sample)| {
        let asked = sample.questions.iter();
        asked.map(move |&(position, answer)| (i, position, answer))
    });
    Batch::new(tokens(samples), targets)
}

fn tokens(samples: &[Sample]) -> Vec<Vec<u32>> {
    samples.iter().map(|sample| sample.tokens.clone()).collect()
}

/// The model before training.
fn initial(config: ModelConfig, rng: &mut ChaCha8Rng) -> Result<TrainableDecoder> {
    let dim = config.head_dim(0);
    let (cos, sin) = config.ropes[0].tables((0, 2, 2), DType::F32, &Device::Cpu)?;
    let decoder = TrainableDecoder::new(config, &Device::Cpu, |name, shape| {
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
        &decoder,
        dim,
        &cos.get(1)?.to_vec1()?,
        &sin.get(1)?.to_vec1()?,
    )?;
    Ok(decoder)
}

/// Starts training near an induction circuit, because a minute is not enough to find one. The first head of the first
/// layer attends to the token before, by biases that RoPE turns into a preference for distance one, and copies what it
/// reads from the first half of the residual stream into the second. The first head of the second layer matches the first
/// half of the query with the second half of the keys. Every weight is trained from there.
fn induction(decoder: &TrainableDecoder, dim: usize, cos: &[f32], sin: &[f32]) -> Result<()> {
    let apart: f64 = cos.iter().map(|&cos| 1.0 - f64::from(cos)).sum();
    let back = (LOOK_BACK * (dim as f64).sqrt() / apart).sqrt() as f32;
    edit(decoder, "model.layers.0.self_attn.q_proj.bias", |i, _| {
        (i < dim / 2).then_some(back)
    })?;
    // The key is turned ahead by the rotation of one position, so that the two agree at distance one.
    edit(
        decoder,
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
    edit(decoder, &first("v"), |i, j| unit(i < dim && i == j, 1.0))?;
    edit(decoder, &first("o"), |i, j| {
        unit(j < dim && i == j + dim, 1.0)
    })?;
    let second = |part: &str| format!("model.layers.1.self_attn.{part}_proj.weight");
    edit(decoder, &second("q"), |i, j| {
        unit(i < dim && slow(i) && i == j, MATCH)
    })?;
    edit(decoder, &second("k"), |i, j| {
        unit(i < dim && slow(i) && i + dim == j, MATCH)
    })?;
    edit(decoder, &second("v"), |i, j| unit(i < dim && i == j, 1.0))?;
    edit(decoder, &second("o"), |i, j| unit(j < dim && i == j, 1.0))
}

/// Replaces the elements of a matrix or vector for which `element` has a value.
fn edit(
    decoder: &TrainableDecoder,
    name: &str,
    element: impl Fn(usize, usize) -> Option<f32>,
) -> Result<()> {
    let var = decoder
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
        let decoder = initial(ModelConfig::new(&config()).unwrap(), &mut rng).unwrap();
        let batch = batch(&samples(&mut rng)).unwrap();
        let gradients = decoder.loss(&batch).unwrap().backward().unwrap();
        for (name, var) in decoder.vars() {
            let gradient = gradients
                .get(var.as_tensor())
                .unwrap_or_else(|| panic!("{name}"));
            let size = gradient.abs().unwrap().max_all().unwrap();
            assert!(size.to_scalar::<f32>().unwrap() > 0.0, "{name}");
        }
    }

    #[test]
    fn the_trained_decoder_computes_what_its_checkpoint_computes() {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let fields = config();
        let trained = initial(ModelConfig::new(&fields).unwrap(), &mut rng).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model");
        trained
            .write(&fields, DType::F32, &path, &WriteOptions::default(), &[])
            .unwrap();
        let checkpoint = Checkpoint::open(&path).unwrap();
        let decoder = Decoder::new(&checkpoint, DType::F32, &Device::Cpu).unwrap();
        let model = Model::load(&decoder).unwrap();
        let samples = samples(&mut rng);
        let sequences: Vec<&[u32]> = samples.iter().map(|s| &s.tokens[..]).collect();
        let mut cache = model.full_cache(sequences.len()).unwrap();
        let found = model.forward_all(&sequences, &mut cache).unwrap();
        let head = trained.tensor("model.embed_tokens.weight").unwrap();
        let hidden = trained.hidden(&tokens(&samples)).unwrap();
        let ours = hidden.matmul(&head.t().unwrap()).unwrap();
        let largest = |x: &Tensor| -> f32 {
            let x = x.abs().unwrap().max_all().unwrap();
            x.to_scalar().unwrap()
        };
        let gap = largest(&(ours.reshape(found.shape()).unwrap() - &found).unwrap());
        assert!(gap < 5e-5 * largest(&found), "{gap} of {}", largest(&found));
    }
}
