//! Training of small decoders from their initial values: AdamW with one learning-rate schedule.
//!
//! Candle differentiates and holds the tensors; `ops` and `attention` replace the operations that it does slowly on a
//! CPU.

mod attention;
mod decoder;
mod experts;
mod ops;

use std::collections::VecDeque;
use std::f64::consts::PI;
use std::time::Instant;

use candle_core::Tensor;
use candle_core::backprop::GradStore;
use candle_nn::optim::{AdamW, Optimizer, ParamsAdamW};
use tensor_io::Progress;

use crate::{Error, Result};
pub use decoder::{Batch, TrainableDecoder};

/// Steps over which the reported loss is averaged.
const LOSS_STEPS: usize = 50;
/// The learning rate at the end, as a share of its maximum.
const FINAL_RATE: f64 = 0.05;
/// Decay of AdamW's second moment: 0.999 would need longer runs.
const BETA2: f64 = 0.98;

/// Sequences of one length, over a part of a run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Stage {
    /// Tokens of a sequence.
    pub length: usize,
    /// Share of all steps after which the stage ends.
    pub until: f64,
}

/// How to train.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct TrainOptions {
    /// Optimizer steps.
    pub steps: usize,
    /// Steps over which the learning rate rises linearly; after them it falls along a cosine to a twentieth.
    pub warmup: usize,
    /// Maximum of the learning rate.
    pub learning_rate: f64,
    /// Norm that the gradient of a step is scaled down to where it is larger.
    pub max_gradient_norm: f64,
    /// Weight decay of AdamW.
    pub weight_decay: f64,
    /// Lengths of the sequences in the order of the run; the last stage lasts to the end of it.
    pub stages: Vec<Stage>,
}

impl TrainOptions {
    /// `steps` steps on sequences of `length` tokens, with a maximum learning rate of 0.003 after a warm-up of a
    /// twentieth of the steps.
    pub fn new(steps: usize, length: usize) -> Self {
        Self {
            steps,
            warmup: (steps / 20).clamp(1, 200),
            learning_rate: 3e-3,
            max_gradient_norm: 1.0,
            weight_decay: 0.01,
            stages: vec![Stage { length, until: 1.0 }],
        }
    }

    fn check(&self) -> Result<()> {
        let positive = |option, value: f64| {
            if value > 0.0 && value.is_finite() {
                return Ok(());
            }
            let reason = format!("{value}, expected a number above 0");
            Err(Error::Option { option, reason })
        };
        positive("steps", self.steps as f64)?;
        positive("learning_rate", self.learning_rate)?;
        positive("max_gradient_norm", self.max_gradient_norm)?;
        if self.stages.is_empty() {
            let reason = "no stage, expected at least one".into();
            return Err(Error::Option {
                option: "stages",
                reason,
            });
        }
        Ok(())
    }

    /// Learning rate of a step.
    fn rate(&self, step: usize) -> f64 {
        let rise = ((step + 1) as f64 / self.warmup.max(1) as f64).min(1.0);
        let fall = 0.5 * (1.0 + (PI * step as f64 / self.steps as f64).cos());
        self.learning_rate * rise * (FINAL_RATE + (1.0 - FINAL_RATE) * fall)
    }

    /// Length of the sequences of a step.
    fn length(&self, step: usize) -> usize {
        let done = step as f64 / self.steps as f64;
        let stage = self.stages.iter().find(|stage| done < stage.until);
        let stage = stage.or(self.stages.last());
        stage.map_or(0, |stage| stage.length)
    }
}

/// The outcome of a run.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct Trained {
    /// Mean loss of the last 50 steps, in nats per target.
    pub loss: f64,
    /// Duration of the run.
    pub seconds: f64,
}

/// Trains `decoder` on the batches that `batch` gives for each step, from the length of the sequences that the options ask
/// for.
///
/// # Errors
/// [`Error::Option`] and [`Error::Batch`] for input that makes no sense, whatever `batch` reports, and
/// [`Error::Cancelled`].
pub fn train(
    decoder: &TrainableDecoder,
    options: &TrainOptions,
    mut batch: impl FnMut(usize) -> Result<Batch>,
    progress: &dyn Progress,
) -> Result<Trained> {
    options.check()?;
    let started = Instant::now();
    let parameters = ParamsAdamW {
        beta2: BETA2,
        weight_decay: options.weight_decay,
        ..ParamsAdamW::default()
    };
    let vars = decoder.vars().values().cloned().collect();
    let mut optimizer = AdamW::new(vars, parameters)?;
    let mut losses = VecDeque::with_capacity(LOSS_STEPS);
    let mut mean = f64::NAN;
    progress.begin("training", options.steps as u64);
    for step in 0..options.steps {
        let loss = decoder.loss(&batch(options.length(step))?)?;
        let mut gradients = loss.backward()?;
        limit_norm(decoder, &mut gradients, options.max_gradient_norm)?;
        optimizer.set_learning_rate(options.rate(step));
        optimizer.step(&gradients)?;
        if losses.len() == LOSS_STEPS {
            losses.pop_front();
        }
        losses.push_back(scalar(&loss)?);
        mean = losses.iter().sum::<f64>() / losses.len() as f64;
        progress.message(&format!("training, {mean:.3} nats per token"));
        progress.advance(1)?;
    }
    Ok(Trained {
        loss: mean,
        seconds: started.elapsed().as_secs_f64(),
    })
}

/// Scales all gradients so that their common norm is at most `limit`.
fn limit_norm(decoder: &TrainableDecoder, gradients: &mut GradStore, limit: f64) -> Result<()> {
    let mut square = 0.0;
    for var in decoder.vars().values() {
        if let Some(gradient) = gradients.get(var) {
            square += scalar(&gradient.sqr()?.sum_all()?)?;
        }
    }
    let norm = square.sqrt();
    if norm > limit {
        for var in decoder.vars().values() {
            if let Some(gradient) = gradients.remove(var) {
                gradients.insert(var, (gradient * (limit / norm))?);
            }
        }
    }
    Ok(())
}

fn scalar(tensor: &Tensor) -> Result<f64> {
    Ok(f64::from(tensor.to_scalar::<f32>()?))
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use candle_core::Device;
    use causal_lm::ModelConfig;
    use serde_json::json;
    use tensor_io::{Cancelled, Config, NoProgress};

    use super::*;

    fn decoder() -> TrainableDecoder {
        let fields = json!({
            "model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
            "num_attention_heads": 2, "vocab_size": 5, "max_position_embeddings": 16, "tie_word_embeddings": true,
        });
        let config = Config::new(fields.as_object().cloned().unwrap());
        let model = ModelConfig::new(&config).unwrap();
        TrainableDecoder::new(model, &Device::Cpu, |name, shape| {
            let count = shape.iter().product();
            if name.ends_with("norm.weight") {
                return vec![1.0; count];
            }
            (0..count).map(|i| 0.3 * (i as f32 * 0.7).sin()).collect()
        })
        .unwrap()
    }

    /// Counting modulo five, from every start.
    fn counting(length: usize) -> Result<Batch> {
        let sequence = |start| (start..start + length as u32).map(|t| t % 5).collect();
        Batch::next_tokens((0..5).map(sequence).collect())
    }

    #[test]
    fn a_decoder_learns_to_count() {
        let options = TrainOptions {
            learning_rate: 2e-2,
            ..TrainOptions::new(120, 8)
        };
        let decoder = decoder();
        let before = scalar(&decoder.loss(&counting(8).unwrap()).unwrap()).unwrap();
        let trained = train(&decoder, &options, counting, &NoProgress).unwrap();
        assert!(
            before > 1.0 && trained.loss < 0.1,
            "{before} {}",
            trained.loss
        );
    }

    #[test]
    fn each_stage_gives_its_share_of_the_steps() {
        let stages = [(4, 0.3), (8, 0.5), (6, 0.7)];
        let options = TrainOptions {
            stages: stages
                .map(|(length, until)| Stage { length, until })
                .to_vec(),
            ..TrainOptions::new(10, 0)
        };
        let asked = RefCell::new(Vec::new());
        let batch = |length| {
            asked.borrow_mut().push(length);
            counting(length)
        };
        train(&decoder(), &options, batch, &NoProgress).unwrap();
        assert_eq!(asked.into_inner(), [4, 4, 4, 8, 8, 6, 6, 6, 6, 6]);
    }

    #[test]
    fn gradients_are_scaled_to_the_limit_and_keep_their_direction() {
        let decoder = decoder();
        let gradients = |limit: Option<f64>| {
            let loss = decoder.loss(&counting(8).unwrap()).unwrap();
            let mut gradients = loss.backward().unwrap();
            if let Some(limit) = limit {
                limit_norm(&decoder, &mut gradients, limit).unwrap();
            }
            let all = decoder.vars().values().flat_map(|var| {
                let gradient = gradients.get(var).unwrap().flatten_all().unwrap();
                gradient.to_vec1::<f32>().unwrap()
            });
            all.map(f64::from).collect::<Vec<_>>()
        };
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        let free = gradients(None);
        let norm = dot(&free, &free).sqrt();
        let limited = gradients(Some(norm / 4.0));
        let limited_norm = dot(&limited, &limited).sqrt();
        assert!((limited_norm / norm - 0.25).abs() < 1e-5);
        assert!((dot(&free, &limited) / (norm * limited_norm) - 1.0).abs() < 1e-9);
        assert_eq!(gradients(Some(2.0 * norm)), free);
    }

    #[test]
    fn a_run_can_be_cancelled_and_refuses_options_without_sense() {
        let stop = |_| Err(Cancelled);
        let options = TrainOptions::new(3, 8);
        let cancelled = train(&decoder(), &options, counting, &stop);
        assert!(matches!(cancelled, Err(Error::Cancelled(_))));
        let none = TrainOptions {
            stages: Vec::new(),
            ..TrainOptions::new(3, 8)
        };
        for options in [TrainOptions::new(0, 8), none] {
            let refused = train(&decoder(), &options, counting, &NoProgress);
            assert!(matches!(refused, Err(Error::Option { .. })));
        }
    }
}
