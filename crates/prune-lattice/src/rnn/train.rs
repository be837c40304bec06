//! Training and evaluation: Adam, clipping, truncated backpropagation, early stopping on a validation split.

use super::{
    adam::Adam,
    evaluate::evaluate,
    gradual::{Gradual, GradualState},
    input::Input,
    loss::{Evaluation, Sums, binary_cross_entropy, cross_entropy, squared_error},
    model::{Rnn, Role},
    tape::{State, Tape},
};
use crate::{
    data::{Batch, Dataset, Draw, Examples, Sequences, Targets},
    error::{Error, Result},
    mask::MaskSet,
    names::with,
    params::ParamSet,
    seed,
};
use rand::seq::SliceRandom;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use tensor_io::Progress;

/// How to train.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct TrainConfig {
    /// Passes over the training split at most.
    pub epochs: usize,
    /// Sequences per step.
    pub batch: usize,
    /// Adam's rate.
    pub learning_rate: f32,
    /// Steps over which the rate rises from 0.
    pub warmup: usize,
    /// How the rate falls after that.
    pub decay: Decay,
    /// Largest norm of the gradient.
    pub clip: f32,
    /// Penalty on the magnitudes of `W_ih` and `W_hh`.
    pub l1: f32,
    /// Steps of truncated backpropagation, for texts and for targets at every step.
    pub window: usize,
    /// Epochs without improvement of the validation loss before stopping; `None` runs all epochs and keeps the last weights.
    pub patience: Option<usize>,
    /// Stop as soon as the validation loss is at or below this.
    pub target_loss: Option<f64>,
    /// Parts of a batch whose gradients are computed in parallel and then summed. The result depends on this number, not
    /// on the number of threads.
    pub shards: usize,
    /// Pruning while training; it must end within the run.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gradual: Option<Gradual>,
    /// For the order of the examples and their augmentation.
    pub seed: u64,
}

with!(TrainConfig);

/// How the learning rate falls after the warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Decay {
    /// Not at all.
    #[default]
    Constant,
    /// Along half a cosine to 0 at the last step.
    Cosine,
}

impl Default for TrainConfig {
    fn default() -> Self {
        Self {
            epochs: 20,
            batch: 32,
            learning_rate: 3e-3,
            warmup: 0,
            decay: Decay::Constant,
            clip: 1.0,
            l1: 0.0,
            window: 64,
            patience: Some(5),
            target_loss: None,
            shards: 1,
            gradual: None,
            seed: 0,
        }
    }
}

impl TrainConfig {
    /// Adam's rate at a step, counted from 0, of `total`.
    fn rate(&self, step: u64, total: u64) -> f32 {
        let warmup = self.warmup as u64;
        if step < warmup {
            return self.learning_rate * (step + 1) as f32 / warmup as f32;
        }
        match self.decay {
            Decay::Constant => self.learning_rate,
            Decay::Cosine => {
                let done = (step - warmup) as f64 / (total.saturating_sub(warmup)).max(1) as f64;
                let share = 0.5 * (1.0 + (std::f64::consts::PI * done.min(1.0)).cos());
                self.learning_rate * share as f32
            }
        }
    }

    /// The same training in another number of epochs. Of few epochs the warm-up is a tenth of the updates at most: one that was
    /// meant for a long run would leave nothing else of a short one.
    #[must_use]
    pub fn over(&self, epochs: usize, train: &Examples) -> Self {
        let run = self.clone().with(|c| c.epochs = epochs);
        let tenth = usize::try_from(run.updates(train) / 10).unwrap_or(usize::MAX);
        run.with(|c| c.warmup = c.warmup.min(tenth))
    }

    /// Updates of the weights in a whole run on these examples.
    pub fn updates(&self, train: &Examples) -> u64 {
        self.epochs as u64 * updates(train, self)
    }

    fn check(&self) -> Result<()> {
        let positive = [
            self.batch as f32,
            self.window as f32,
            self.epochs as f32,
            self.shards as f32,
            self.learning_rate,
            self.clip,
        ];
        if positive.iter().any(|v| v.is_nan() || *v <= 0.0) || self.l1.is_nan() || self.l1 < 0.0 {
            return Err(Error::Setting {
                setting: "training",
                reason: format!("a value is 0 or less in {self:?}"),
            });
        }
        Ok(())
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
#[non_exhaustive]
pub struct TrainReport {
    /// Every pass.
    pub epochs: Vec<Epoch>,
    /// The pass whose weights were kept.
    pub best: usize,
    /// The masks at the end: those given, and those of gradual pruning.
    #[serde(skip)]
    pub masks: MaskSet,
}

/// Trains in place. With masks, pruned weights are zero from the start and stay so. A step of `progress` is an update of the
/// weights; each epoch is a message.
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
    config.check()?;
    if matches!(&data.train, Examples::Sequences(s) if s.is_empty()) {
        return Err(Error::Setting {
            setting: "training",
            reason: "there are no examples".into(),
        });
    }
    masks.apply(rnn.params_mut())?;
    let updates = config.updates(&data.train);
    let mut run = Run {
        adam: Adam::new(rnn.params()),
        engines: vec![Engine::new(rnn); config.shards],
        gradual: config
            .gradual
            .as_ref()
            .map(|g| GradualState::new(g, rnn, masks, updates))
            .transpose()?,
        config,
        masks: masks.clone(),
        progress,
        step: 0,
        total: updates,
    };
    progress.begin("training", updates);
    let mut rng = seed::rng(config.seed, "batches");
    let mut epochs: Vec<Epoch> = Vec::new();
    let mut best: Option<(usize, f64, ParamSet, MaskSet)> = None;
    for epoch in 0..config.epochs {
        let sums = match &data.train {
            Examples::Sequences(s) => {
                let batches = batches(s, config.batch, &mut rng);
                let draw = Draw {
                    seed: config.seed,
                    epoch: epoch as u64,
                };
                run.sequences(rnn, s, &batches, draw)?
            }
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
        progress.message(&format!(
            "epoch {}: loss {train_loss:.4}, validation {:.4}",
            epoch + 1,
            valid.loss
        ));
        epochs.push(Epoch {
            epoch,
            train_loss,
            valid,
        });
        // Weights from before the last masks are of another sparsity.
        if !run.is_pruned() {
            continue;
        }
        if let Some(patience) = config.patience {
            if best.as_ref().is_none_or(|(_, loss, ..)| valid.loss < *loss) {
                best = Some((epoch, valid.loss, rnn.params().clone(), run.masks.clone()));
            } else if best.as_ref().is_some_and(|(at, ..)| epoch - at >= patience) {
                break;
            }
        }
        if config.target_loss.is_some_and(|t| valid.loss <= t) {
            break;
        }
    }
    if !run.is_pruned() {
        return Err(Error::Setting {
            setting: "gradual pruning",
            reason: format!(
                "training ended after {} updates, before the last masks",
                run.step
            ),
        });
    }
    let (best, masks) = match best {
        Some((at, _, params, masks)) => {
            *rnn.params_mut() = params;
            (at, masks)
        }
        None => (epochs.len() - 1, run.masks),
    };
    Ok(TrainReport {
        epochs,
        best,
        masks,
    })
}

/// Updates of the weights in one epoch.
fn updates(train: &Examples, config: &TrainConfig) -> u64 {
    let (batch, window) = (config.batch.max(1), config.window.max(1));
    let updates = match train {
        Examples::Sequences(s) => {
            let windows = match s.targets() {
                Targets::Binary { .. } => s.longest().div_ceil(window),
                _ => 1,
            };
            s.len().div_ceil(batch) * windows
        }
        Examples::Text(text) => {
            let symbols = text.len().saturating_sub(1);
            let lanes = batch.min(symbols.max(1));
            (symbols / lanes).div_ceil(window)
        }
    };
    updates as u64
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

/// The loss of the logits read at some positions, `chosen` being the indices of their targets; the logits become the gradient
/// of `scale` times the summed loss.
pub(super) fn loss(
    targets: &Targets,
    chosen: &[usize],
    outputs: usize,
    scale: f32,
    logits: &mut [f32],
) -> Result<Sums> {
    match targets {
        Targets::Classes(classes) => {
            let wanted: Vec<u32> = chosen.iter().map(|&k| classes[k]).collect();
            check_classes(&wanted, outputs)?;
            Ok(cross_entropy(logits, outputs, &wanted, scale))
        }
        _ if outputs != 1 => Err(Error::Setting {
            setting: "read-out",
            reason: format!("these targets need 1 output, the network has {outputs}"),
        }),
        Targets::Values(values) => {
            let wanted: Vec<f32> = chosen.iter().map(|&k| values[k]).collect();
            Ok(squared_error(logits, &wanted, scale))
        }
        Targets::Binary { targets, .. } => {
            let wanted: Vec<f32> = chosen.iter().map(|&k| targets[k]).collect();
            Ok(binary_cross_entropy(logits, &wanted, scale))
        }
    }
}

pub(super) fn check_classes(wanted: &[u32], outputs: usize) -> Result<()> {
    match wanted.iter().find(|&&c| c as usize >= outputs) {
        None => Ok(()),
        Some(c) => Err(Error::Setting {
            setting: "read-out",
            reason: format!("class {c} with {outputs} outputs"),
        }),
    }
}

/// What computes the gradient of one part of a batch.
#[derive(Clone)]
struct Engine {
    tape: Tape,
    logits: Vec<f32>,
    gradients: ParamSet,
    state: State,
    sums: Sums,
}

impl Engine {
    fn new(rnn: &Rnn) -> Self {
        Self {
            tape: Tape::new(),
            logits: Vec::new(),
            gradients: rnn.params().zeros_like(),
            state: State::zeros(rnn, 0),
            sums: Sums::default(),
        }
    }

    /// Adds the gradient of the steps `window` of a batch, for a loss multiplied by `scale`.
    fn add_gradient(
        &mut self,
        rnn: &Rnn,
        data: &Sequences,
        batch: &Batch,
        window: (usize, usize),
        scale: f32,
    ) -> Result<()> {
        let (from, to) = (window.0.min(batch.steps), window.1.min(batch.steps));
        if from == to || batch.size == 0 {
            return Ok(());
        }
        let (rows, targets) = batch.in_window(from, to);
        let input = batch.view(from, to);
        self.tape.forward(rnn, input, to - from, &mut self.state)?;
        self.tape.read_out(rnn, Some(&rows), &mut self.logits);
        let outputs = rnn.config().outputs;
        self.sums.add(loss(
            data.targets(),
            &targets,
            outputs,
            scale,
            &mut self.logits,
        )?);
        let (logits, gradients) = (&self.logits, &mut self.gradients);
        self.tape
            .backward(rnn, input, Some(&rows), logits, gradients);
        Ok(())
    }
}

struct Run<'a> {
    adam: Adam,
    engines: Vec<Engine>,
    gradual: Option<GradualState<'a>>,
    config: &'a TrainConfig,
    masks: MaskSet,
    progress: &'a dyn Progress,
    step: u64,
    total: u64,
}

impl Run<'_> {
    /// Whether gradual pruning, where there is any, has reached its final sparsity.
    fn is_pruned(&self) -> bool {
        let gradual = self.gradual.as_ref();
        gradual.is_none_or(|g| g.is_final(self.step))
    }

    /// One step of the optimiser along the sum of the engines' gradients.
    fn update(&mut self, rnn: &mut Rnn) -> Result<()> {
        let (first, others) = self
            .engines
            .split_first_mut()
            .expect("checked: at least one shard");
        for other in others {
            first.gradients.add(&other.gradients);
            other.gradients.clear();
        }
        if self.config.l1 > 0.0 {
            let roles = rnn.roles();
            let weights = roles.iter().zip(rnn.params().iter());
            for ((role, w), g) in weights.zip(first.gradients.iter_mut()) {
                if matches!(role, Role::InputWeight(_) | Role::RecurrentWeight(_)) {
                    let pairs = g.data.iter_mut().zip(&w.data);
                    pairs.filter(|(_, w)| **w != 0.0).for_each(|(g, w)| {
                        *g += self.config.l1 * w.signum();
                    });
                }
            }
        }
        let rate = self.config.rate(self.step, self.total);
        self.adam.update(
            rnn.params_mut(),
            &mut first.gradients,
            rate,
            self.config.clip,
            &self.masks,
        )?;
        first.gradients.clear();
        self.step += 1;
        if let Some(gradual) = &mut self.gradual
            && let Some(masks) = gradual.masks_at(self.step, rnn)?
        {
            masks.apply(rnn.params_mut())?;
            self.masks = masks;
        }
        Ok(self.progress.advance(1)?)
    }

    fn sequences(
        &mut self,
        rnn: &mut Rnn,
        data: &Sequences,
        batches: &[Vec<usize>],
        draw: Draw,
    ) -> Result<Sums> {
        let shards = self.engines.len();
        let fill = |chosen: Option<&Vec<usize>>, into: &mut [Batch]| {
            let Some(chosen) = chosen else { return };
            let part = chosen.len().div_ceil(shards);
            for (k, batch) in into.iter_mut().enumerate() {
                let (from, to) = (k * part, (k + 1) * part);
                let len = chosen.len();
                data.batch(&chosen[from.min(len)..to.min(len)], Some(draw), batch);
            }
        };
        let mut current = vec![Batch::new(data.inputs()); shards];
        let mut next = current.clone();
        fill(batches.first(), &mut next);
        for k in 0..batches.len() {
            std::mem::swap(&mut current, &mut next);
            // Augmented images take time: they are drawn while the batch before them is computed.
            let (done, ()) = rayon::join(
                || self.batch(rnn, data, &current),
                || fill(batches.get(k + 1), &mut next),
            );
            done?;
        }
        let mut total = Sums::default();
        for engine in &mut self.engines {
            total.add(std::mem::take(&mut engine.sums));
        }
        // Decisions of different weights are no one curve.
        total.decisions.clear();
        Ok(total)
    }

    /// The updates of one batch: one, or for targets at every step one for each window.
    fn batch(&mut self, rnn: &mut Rnn, data: &Sequences, parts: &[Batch]) -> Result<()> {
        let steps = parts.iter().map(|b| b.steps).max().unwrap_or(0);
        let window = match data.targets() {
            Targets::Binary { .. } => self.config.window,
            _ => steps.max(1),
        };
        for (engine, part) in self.engines.iter_mut().zip(parts) {
            engine.state = State::zeros(rnn, part.size);
        }
        for from in (0..steps).step_by(window) {
            let to = from + window;
            let targets: usize = parts.iter().map(|b| b.in_window(from, to).0.len()).sum();
            let scale = 1.0 / targets.max(1) as f32;
            let network = &*rnn;
            let engines = self.engines.par_iter_mut().zip(parts);
            engines
                .map(|(engine, part)| engine.add_gradient(network, data, part, (from, to), scale))
                .collect::<Result<Vec<()>>>()?;
            self.update(rnn)?;
        }
        Ok(())
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
            let engine = &mut self.engines[0];
            let input = Input::Symbols(&inputs);
            engine.tape.forward(rnn, input, steps, &mut state)?;
            engine.tape.read_out(rnn, None, &mut engine.logits);
            let scale = 1.0 / targets.len() as f32;
            let outputs = rnn.config().outputs;
            total.add(cross_entropy(&mut engine.logits, outputs, &targets, scale));
            let (logits, gradients) = (&engine.logits, &mut engine.gradients);
            engine.tape.backward(rnn, input, None, logits, gradients);
            self.update(rnn)?;
        }
        Ok(total)
    }
}
