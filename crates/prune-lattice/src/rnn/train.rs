//! Training and evaluation: Adam, clipping, truncated backpropagation for texts, early stopping on a validation split.

use super::{
    adam::Adam,
    compact::CompactRnn,
    loss::{Evaluation, Sums, cross_entropy, squared_error},
    model::Rnn,
    tape::{Input, State, Tape},
};
use crate::{
    data::{Dataset, Examples, Inputs, Sequences, Targets},
    error::{Error, Result},
    mask::MaskSet,
    names::with,
    params::ParamSet,
    seed,
};
use rand::seq::SliceRandom;
use serde::{Deserialize, Serialize};
use tensor_io::Progress;

/// How to train.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct TrainConfig {
    /// Passes over the training split at most.
    pub epochs: usize,
    /// Sequences per step.
    pub batch: usize,
    /// Adam's rate.
    pub learning_rate: f32,
    /// Largest norm of the gradient.
    pub clip: f32,
    /// Steps of truncated backpropagation, for texts.
    pub window: usize,
    /// Epochs without improvement of the validation loss before stopping; `None` runs all epochs and keeps the last weights.
    pub patience: Option<usize>,
    /// Stop as soon as the validation loss is at or below this.
    pub target_loss: Option<f64>,
    /// For the order of the examples.
    pub seed: u64,
}

with!(TrainConfig);

impl Default for TrainConfig {
    fn default() -> Self {
        Self {
            epochs: 20,
            batch: 32,
            learning_rate: 3e-3,
            clip: 1.0,
            window: 64,
            patience: Some(5),
            target_loss: None,
            seed: 0,
        }
    }
}

/// One pass over the training split.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Epoch {
    /// Counted from 0.
    pub epoch: usize,
    /// Mean training loss during the pass.
    pub train_loss: f64,
    /// On the validation split after it.
    pub valid: Evaluation,
}

/// What training did.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TrainReport {
    /// Every pass.
    pub epochs: Vec<Epoch>,
    /// The pass whose weights were kept.
    pub best: usize,
}

/// Trains in place. With masks, pruned weights are zero from the start and stay so. A step of `progress` is a batch (for
/// texts, a window); each epoch is a message.
///
/// # Errors
/// Settings that cannot be carried out, masks or data that do not fit the network, a loss that leaves the finite numbers, or
/// [`Error::Cancelled`]; the weights are then those of the last update.
pub fn train(
    rnn: &mut Rnn,
    data: &Dataset,
    config: &TrainConfig,
    masks: &MaskSet,
    progress: &dyn Progress,
) -> Result<TrainReport> {
    if config.batch == 0
        || config.window == 0
        || config.epochs == 0
        || config.learning_rate <= 0.0
        || config.clip <= 0.0
    {
        return Err(Error::Setting {
            setting: "training",
            reason: format!("a value is 0 or less in {config:?}"),
        });
    }
    if matches!(&data.train, Examples::Sequences(s) if s.is_empty()) {
        return Err(Error::Setting {
            setting: "training",
            reason: "there are no examples".into(),
        });
    }
    masks.apply(rnn.params_mut())?;
    let mut run = Run {
        adam: Adam::new(rnn.params()),
        gradients: rnn.params().zeros_like(),
        tape: Tape::new(),
        logits: Vec::new(),
        config,
        masks,
        progress,
    };
    progress.begin("training", config.epochs as u64 * run.batches(data));
    let mut rng = seed::rng(config.seed, "batches");
    let mut epochs: Vec<Epoch> = Vec::new();
    let mut best: Option<(usize, f64, ParamSet)> = None;
    for epoch in 0..config.epochs {
        let sums = match &data.train {
            Examples::Sequences(s) => run.sequences(rnn, s, &batches(s, config.batch, &mut rng))?,
            Examples::Text(text) => run.text(rnn, text)?,
        };
        let train_loss = sums.mean(true).loss;
        if !train_loss.is_finite() {
            return Err(Error::Diverged {
                epoch,
                loss: train_loss,
            });
        }
        let valid = evaluate(rnn, &data.valid)?;
        if !valid.loss.is_finite() {
            return Err(Error::Diverged {
                epoch,
                loss: valid.loss,
            });
        }
        let entry = Epoch {
            epoch,
            train_loss,
            valid,
        };
        progress.message(&format!(
            "epoch {}: loss {train_loss:.4}, validation {:.4}",
            epoch + 1,
            valid.loss
        ));
        epochs.push(entry);
        if let Some(patience) = config.patience {
            if best.as_ref().is_none_or(|(_, loss, _)| valid.loss < *loss) {
                best = Some((epoch, valid.loss, rnn.params().clone()));
            } else if best.as_ref().is_some_and(|(at, ..)| epoch - at >= patience) {
                break;
            }
        }
        if config.target_loss.is_some_and(|t| valid.loss <= t) {
            break;
        }
    }
    let kept = match best {
        Some((at, _, params)) => {
            *rnn.params_mut() = params;
            at
        }
        None => epochs.len() - 1,
    };
    Ok(TrainReport { epochs, best: kept })
}

/// Random batches of sequences of similar length: shuffled pools of 16 batches, sorted inside.
fn batches(sequences: &Sequences, batch: usize, rng: &mut impl rand::Rng) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..sequences.len()).collect();
    order.shuffle(rng);
    for pool in order.chunks_mut(16 * batch) {
        pool.sort_by_key(|&k| sequences.length(k));
    }
    let mut batches: Vec<Vec<usize>> = order.chunks(batch).map(<[usize]>::to_vec).collect();
    batches.shuffle(rng);
    batches
}

fn buffer_like(inputs: &Inputs) -> Inputs {
    match inputs {
        Inputs::Symbols(_) => Inputs::Symbols(Vec::new()),
        Inputs::Vectors { dim, .. } => Inputs::Vectors {
            dim: *dim,
            values: Vec::new(),
        },
    }
}

fn view(inputs: &Inputs) -> Input<'_> {
    match inputs {
        Inputs::Symbols(s) => Input::Symbols(s),
        Inputs::Vectors { values, .. } => Input::Vectors(values),
    }
}

fn loss(targets: &Targets, chosen: &[usize], outputs: usize, logits: &mut [f32]) -> Result<Sums> {
    let scale = 1.0 / chosen.len() as f32;
    match targets {
        Targets::Classes(classes) => {
            let wanted: Vec<u32> = chosen.iter().map(|&k| classes[k]).collect();
            check_classes(&wanted, outputs)?;
            Ok(cross_entropy(logits, outputs, &wanted, scale))
        }
        Targets::Values(_) if outputs != 1 => Err(Error::Setting {
            setting: "read-out",
            reason: format!("regression needs 1 output, the network has {outputs}"),
        }),
        Targets::Values(values) => {
            let wanted: Vec<f32> = chosen.iter().map(|&k| values[k]).collect();
            Ok(squared_error(logits, &wanted, scale))
        }
    }
}

fn check_classes(wanted: &[u32], outputs: usize) -> Result<()> {
    match wanted.iter().find(|&&c| c as usize >= outputs) {
        None => Ok(()),
        Some(c) => Err(Error::Setting {
            setting: "read-out",
            reason: format!("class {c} with {outputs} outputs"),
        }),
    }
}

struct Run<'a> {
    adam: Adam,
    gradients: ParamSet,
    tape: Tape,
    logits: Vec<f32>,
    config: &'a TrainConfig,
    masks: &'a MaskSet,
    progress: &'a dyn Progress,
}

impl Run<'_> {
    fn update(&mut self, rnn: &mut Rnn) -> Result<()> {
        let Self {
            adam,
            gradients,
            config,
            masks,
            ..
        } = self;
        adam.update(
            rnn.params_mut(),
            gradients,
            config.learning_rate,
            config.clip,
            masks,
        )?;
        gradients.clear();
        Ok(self.progress.advance(1)?)
    }

    /// Updates of one epoch.
    fn batches(&self, data: &Dataset) -> u64 {
        let batches = match &data.train {
            Examples::Sequences(s) => s.len().div_ceil(self.config.batch),
            Examples::Text(text) => {
                let symbols = text.len().saturating_sub(1);
                let lanes = self.config.batch.min(symbols.max(1));
                (symbols / lanes).div_ceil(self.config.window)
            }
        };
        batches as u64
    }

    fn sequences(
        &mut self,
        rnn: &mut Rnn,
        data: &Sequences,
        batches: &[Vec<usize>],
    ) -> Result<Sums> {
        let mut total = Sums::default();
        let (mut inputs, mut rows) = (buffer_like(data.inputs()), Vec::new());
        for chosen in batches {
            let steps = data.batch(chosen, &mut inputs, &mut rows);
            let mut state = State::zeros(rnn, chosen.len());
            self.tape.forward(rnn, view(&inputs), steps, &mut state)?;
            self.tape.read_out(rnn, Some(&rows), &mut self.logits);
            total.add(loss(
                data.targets(),
                chosen,
                rnn.config().outputs,
                &mut self.logits,
            )?);
            self.tape.backward(
                rnn,
                view(&inputs),
                Some(&rows),
                &self.logits,
                &mut self.gradients,
            );
            self.update(rnn)?;
        }
        Ok(total)
    }

    fn text(&mut self, rnn: &mut Rnn, text: &[u32]) -> Result<Sums> {
        let lanes = self.config.batch.min((text.len().saturating_sub(1)).max(1));
        let length = text.len().saturating_sub(1) / lanes;
        if length == 0 {
            return Err(Error::Setting {
                setting: "text",
                reason: format!("{} symbols are too few", text.len()),
            });
        }
        check_classes(text, rnn.config().outputs)?;
        let mut total = Sums::default();
        let mut state = State::zeros(rnn, lanes);
        let (mut inputs, mut targets) = (Vec::new(), Vec::new());
        for start in (0..length).step_by(self.config.window) {
            let steps = self.config.window.min(length - start);
            let at = |offset: usize| {
                (start..start + steps)
                    .flat_map(move |t| (0..lanes).map(move |b| text[b * length + t + offset]))
            };
            inputs.clear();
            inputs.extend(at(0));
            targets.clear();
            targets.extend(at(1));
            self.tape
                .forward(rnn, Input::Symbols(&inputs), steps, &mut state)?;
            self.tape.read_out(rnn, None, &mut self.logits);
            let scale = 1.0 / targets.len() as f32;
            total.add(cross_entropy(
                &mut self.logits,
                rnn.config().outputs,
                &targets,
                scale,
            ));
            self.tape.backward(
                rnn,
                Input::Symbols(&inputs),
                None,
                &self.logits,
                &mut self.gradients,
            );
            self.update(rnn)?;
        }
        Ok(total)
    }
}

/// Sequences per forward pass, and steps of a text, in evaluation.
const EVALUATION_BATCH: usize = 256;

/// Quality of a network on examples. A text is read once from its start with the state carried through.
///
/// # Errors
/// The examples do not fit the network, or are not finite.
pub fn evaluate(rnn: &Rnn, examples: &Examples) -> Result<Evaluation> {
    let mut total = Sums::default();
    let (mut tape, mut logits) = (Tape::new(), Vec::new());
    let outputs = rnn.config().outputs;
    match examples {
        Examples::Sequences(data) => {
            let mut order: Vec<usize> = (0..data.len()).collect();
            order.sort_by_key(|&k| data.length(k));
            let (mut inputs, mut rows) = (buffer_like(data.inputs()), Vec::new());
            for chosen in order.chunks(EVALUATION_BATCH) {
                let steps = data.batch(chosen, &mut inputs, &mut rows);
                tape.forward(
                    rnn,
                    view(&inputs),
                    steps,
                    &mut State::zeros(rnn, chosen.len()),
                )?;
                tape.read_out(rnn, Some(&rows), &mut logits);
                total.add(loss(data.targets(), chosen, outputs, &mut logits)?);
            }
        }
        Examples::Text(text) => {
            check_classes(text, outputs)?;
            // Laid out once for the many short passes.
            let network = CompactRnn::new(rnn, &MaskSet::default())?;
            let mut state = State::zeros(rnn, 1);
            let last = text.len().saturating_sub(1);
            for start in (0..last).step_by(EVALUATION_BATCH) {
                let end = (start + EVALUATION_BATCH).min(last);
                network.forward(
                    &mut tape,
                    Input::Symbols(&text[start..end]),
                    end - start,
                    &mut state,
                )?;
                network.read_out(&tape, None, &mut logits);
                total.add(cross_entropy(
                    &mut logits,
                    outputs,
                    &text[start + 1..=end],
                    1.0,
                ));
            }
        }
    }
    Ok(total.mean(examples.classes()))
}
