//! The driver.

use super::{Connectivity, ExperimentConfig, OrderSummary, Repair, Row, Stage};
use crate::{
    calibration::{Calibration, Moments, RecordConfig, record},
    cell::Cell,
    connectivity::{SameNeurons, functional_similarity, reach_kept},
    data::{Dataset, Examples},
    error::{Error, Result},
    influence::Influence,
    mask::MaskSet,
    order::CutReport,
    prune::{
        Method, PruneConfig, PruneContext, PruneReport, influence_of, layers_of, prune_in,
        rank_neurons_in,
    },
    repair::{MergeConfig, RefitConfig, merge, refit},
    rnn::{Evaluation, Rnn, RnnConfig, TrainConfig, evaluate, train},
    tasks::Task,
    wiring::{Wiring, WiringKind},
};
use rayon::prelude::*;
use std::time::Instant;
use tensor_io::{Cancelled, Progress};

/// Trains a dense network for every task, cell and seed, prunes it by every method at every sparsity, and evaluates it. A
/// step of `progress` is a pruned network; epochs of training are messages.
///
/// # Errors
/// Settings or files that cannot be used, a diverging run, or [`Error::Cancelled`]. A degenerate order is no error here: its
/// rows say so.
pub fn run(config: &ExperimentConfig, progress: &dyn Progress) -> Result<Vec<Row>> {
    let mut networks = Vec::new();
    for task in &config.tasks {
        for &cell in &config.cells {
            for &seed in &config.seeds {
                networks.push((task, cell, seed));
            }
        }
    }
    progress.begin("pruning", (networks.len() * jobs(config).len()) as u64);
    let rows: Vec<Vec<Row>> = networks
        .into_par_iter()
        .map(|(task, cell, seed)| {
            let trained = train_dense(config, task, cell, seed, progress)?;
            let name = match &config.wiring {
                WiringKind::Full => task.to_string(),
                wiring => format!("{task}, {wiring}"),
            };
            let session = Session {
                config,
                training: &trained.training,
                progress,
            };
            let dense = Dense::new(&name, &trained.rnn, &trained.data, &trained.wired, progress)?;
            let mut rows = dense.prune_all(&session, seed)?;
            rows.push(dense.without_recurrence(&session, seed)?);
            Ok(rows)
        })
        .collect::<Result<_>>()?;
    Ok(rows.into_iter().flatten().collect())
}

/// A network of an experiment before pruning.
#[derive(Debug, Clone)]
pub struct Trained {
    /// The network.
    pub rnn: Rnn,
    /// What it was trained on and is tested with.
    pub data: Dataset,
    /// How it was trained.
    pub training: TrainConfig,
    /// The masks of its wiring; empty where it has all connections.
    pub wired: MaskSet,
}

/// Trains the dense network of one task, cell and seed.
///
/// # Errors
/// As [`run`].
pub fn train_dense(
    config: &ExperimentConfig,
    task: &Task,
    cell: Cell,
    seed: u64,
    progress: &dyn Progress,
) -> Result<Trained> {
    let wiring = config.wiring.build()?;
    let data = task
        .generate(config.sizes.unwrap_or(task.default_sizes()), seed)?
        .with_extra_steps(wiring.as_ref().map_or(0, Wiring::extra_steps))?;
    let training = TrainConfig {
        seed,
        ..config
            .training
            .clone()
            .unwrap_or(task.default_training(cell))
    };
    let hidden = match &wiring {
        Some(wiring) => vec![wiring.len()],
        None => config.hidden.clone().unwrap_or(task.default_hidden(cell)),
    };
    let shape = RnnConfig::new(cell, data.input, hidden, data.outputs);
    let mut rnn = fresh(shape, task, seed)?;
    let wired = match &wiring {
        Some(wiring) => wiring.masks(&rnn)?,
        None => MaskSet::default(),
    };
    let inner = Inner {
        outer: progress,
        name: format!("training {task} {cell}, seed {seed}"),
    };
    train(&mut rnn, &data, &training, &wired, &inner)?;
    Ok(Trained {
        rnn,
        data,
        training,
        wired,
    })
}

/// A network with the initial weights that suit a task.
pub(super) fn fresh(shape: RnnConfig, task: &Task, seed: u64) -> Result<Rnn> {
    let orthogonal = task.orthogonal_recurrence(shape.cell);
    let mut rnn = Rnn::new(shape, seed)?;
    if orthogonal {
        rnn.orthogonal_recurrence(seed);
    }
    Ok(rnn)
}

/// Prunes a trained network by every method at every sparsity, with `training` as the base of the fine-tuning. The seeds of
/// the configuration are those of the methods; tasks, cells and sizes are not used.
///
/// # Errors
/// As [`run`]; examples that do not fit the network.
pub fn run_model(
    name: &str,
    rnn: &Rnn,
    data: &Dataset,
    config: &ExperimentConfig,
    training: &TrainConfig,
    progress: &dyn Progress,
) -> Result<Vec<Row>> {
    progress.begin("pruning", (config.seeds.len() * jobs(config).len()) as u64);
    let session = Session {
        config,
        training,
        progress,
    };
    let wired = MaskSet::default();
    let dense = Dense::new(name, rnn, data, &wired, progress)?;
    let rows: Vec<Vec<Row>> = config
        .seeds
        .iter()
        .map(|&seed| dense.prune_all(&session, seed))
        .collect::<Result<_>>()?;
    Ok(rows.into_iter().flatten().collect())
}

/// The progress of a call inside a step: it can cancel and its messages are passed on, its steps do not count.
struct Inner<'a> {
    outer: &'a dyn Progress,
    name: String,
}

impl Progress for Inner<'_> {
    fn advance(&self, _steps: u64) -> std::result::Result<(), Cancelled> {
        self.outer.advance(0)
    }

    fn message(&self, text: &str) {
        self.outer.message(&format!("{}, {text}", self.name));
    }
}

/// Methods and sparsities; `dense` and `zero-whh` know no sparsity and run once.
fn jobs(config: &ExperimentConfig) -> Vec<(Method, f64)> {
    let sparsities = |m: Method| match m {
        Method::Dense | Method::ZeroWhh => vec![0.0],
        _ => config.sparsities.clone(),
    };
    config
        .all_methods()
        .into_iter()
        .flat_map(|m| sparsities(m).into_iter().map(move |s| (m, s)))
        .collect()
}

struct Dense<'a> {
    name: &'a str,
    rnn: &'a Rnn,
    data: &'a Dataset,
    /// The entries that exist.
    wired: &'a MaskSet,
    test: Evaluation,
    calibration: Calibration,
    /// States on test examples, for comparisons of connectivity.
    states: Vec<Moments>,
    influence: Influence,
}

/// Test examples on which connectivity is compared.
fn connectivity_recording() -> RecordConfig {
    RecordConfig::default().with(|c| {
        c.sequences = Some(200);
        c.symbols = Some(2_000);
    })
}

/// Moments of the states of all layers on test examples.
fn states_of(rnn: &Rnn, data: &Dataset, progress: &dyn Progress) -> Result<Vec<Moments>> {
    let recorded = record(rnn, &data.test, &connectivity_recording(), progress)?;
    Ok(recorded.layers.into_iter().map(|l| l.after).collect())
}

fn influence(rnn: &Rnn, config: &PruneConfig) -> Result<Influence> {
    influence_of(&layers_of(rnn), rnn.config().cell, &config.lattice)
}

/// A network that was pruned, and perhaps repaired or trained, and tested.
struct Done<'a> {
    rnn: &'a Rnn,
    stage: Stage,
    epochs: usize,
    test: Evaluation,
    seconds: f64,
}

/// What all pruned networks of a run share.
struct Session<'a> {
    config: &'a ExperimentConfig,
    training: &'a TrainConfig,
    progress: &'a dyn Progress,
}

impl Session<'_> {
    fn inner(&self, name: impl Into<String>) -> Inner<'_> {
        Inner {
            outer: self.progress,
            name: name.into(),
        }
    }
}

impl<'a> Dense<'a> {
    fn new(
        name: &'a str,
        rnn: &'a Rnn,
        data: &'a Dataset,
        wired: &'a MaskSet,
        progress: &dyn Progress,
    ) -> Result<Self> {
        let inner = Inner {
            outer: progress,
            name: name.into(),
        };
        Ok(Self {
            name,
            rnn,
            data,
            wired,
            test: evaluate(rnn, &data.test)?,
            calibration: record(rnn, &data.train, &RecordConfig::default(), &inner)?,
            states: states_of(rnn, data, &inner)?,
            influence: influence(rnn, &PruneConfig::new(Method::Dense, 0.0))?,
        })
    }

    fn context(&self) -> PruneContext<'_> {
        let context = PruneContext::default().calibrated(&self.calibration);
        match self.wired.is_empty() {
            true => context,
            false => context.within(self.wired),
        }
    }

    /// What a pruned network keeps; `keep` are the neurons that the method keeps, `removed` whether the others are gone.
    fn connectivity(
        &self,
        rnn: &Rnn,
        keep: Option<&[Vec<bool>]>,
        removed: bool,
        progress: &dyn Progress,
    ) -> Result<Connectivity> {
        let after = states_of(rnn, self.data, progress)?;
        let similarity = |of: &dyn Fn(usize) -> Vec<(usize, usize)>| {
            let layers = self.states.iter().zip(&after).enumerate();
            let layers: Vec<SameNeurons<'_>> = layers
                .map(|(l, (before, after))| SameNeurons {
                    before,
                    after,
                    neurons: of(l),
                })
                .collect();
            functional_similarity(&layers)
        };
        let kept = |keep: &[Vec<bool>], l: usize| -> Vec<(usize, usize)> {
            let numbers = (0..keep[l].len()).filter(|&x| keep[l][x]);
            match removed {
                true => numbers.enumerate().map(|(k, x)| (x, k)).collect(),
                false => numbers.map(|x| (x, x)).collect(),
            }
        };
        let functional_kept = keep.and_then(|keep| similarity(&|l| kept(keep, l)));
        if removed {
            return Ok(Connectivity {
                functional: functional_kept,
                functional_kept,
                ..Connectivity::default()
            });
        }
        let pruned = influence(rnn, &PruneConfig::new(Method::Dense, 0.0))?;
        Ok(Connectivity {
            functional: similarity(&|l| (0..self.states[l].dim()).map(|x| (x, x)).collect()),
            functional_kept,
            reach: Some(reach_kept(&self.influence, &pruned, 1.0)?),
            reach_2: Some(reach_kept(&self.influence, &pruned, 2.0)?),
        })
    }

    fn prune_all(&self, session: &Session<'_>, seed: u64) -> Result<Vec<Row>> {
        let rows: Vec<Vec<Row>> = jobs(session.config)
            .into_par_iter()
            .map(|(method, sparsity)| {
                let rows = self.prune_one(method, sparsity, session, seed)?;
                session.progress.advance(1)?;
                Ok(rows)
            })
            .collect::<Result<_>>()?;
        Ok(rows.into_iter().flatten().collect())
    }

    fn prune_one(
        &self,
        method: Method,
        sparsity: f64,
        session: &Session<'_>,
        seed: u64,
    ) -> Result<Vec<Row>> {
        let Session {
            config, training, ..
        } = session;
        let start = Instant::now();
        let context = self.context();
        let prune_config = config.prune_config(method, sparsity, seed);
        let (masks, report) = match prune_in(self.rnn, &context, &prune_config) {
            Ok(done) => done,
            Err(e @ Error::DegenerateOrder { .. }) => {
                return Ok(vec![self.refused(method, sparsity, seed, &e)]);
            }
            Err(e) => return Err(e),
        };
        let ranked = method.ranks_neurons();
        let keep = ranked
            .then(|| rank_neurons_in(self.rnn, &context, &prune_config))
            .transpose()?;
        let inner = session.inner(format!("{method} on {}", self.name));
        let mut rows = Vec::new();
        for &repair in &config.repairs {
            let start = if rows.is_empty() {
                start
            } else {
                Instant::now()
            };
            let mut rnn = self.rnn.clone();
            let none = MaskSet::default();
            let masks = match repair {
                Repair::None => {
                    masks.apply(rnn.params_mut())?;
                    &masks
                }
                Repair::Refit if masks.is_empty() => continue,
                Repair::Refit => {
                    refit(&mut rnn, &masks, &self.calibration, &RefitConfig::default())?;
                    &masks
                }
                Repair::Merge => match &keep {
                    None => continue,
                    Some(keep) => {
                        rnn = merge(self.rnn, keep, &self.calibration, &MergeConfig::default())?;
                        &none
                    }
                },
            };
            let row = |done: Done<'_>| Row {
                repair,
                params: Some(done.rnn.params().count() - masks.pruned()),
                ..self.row(&report, masks, &done)
            };
            let test = evaluate(&rnn, &self.data.test)?;
            let seconds = start.elapsed().as_secs_f64();
            let removed = repair == Repair::Merge;
            rows.push(Row {
                connectivity: Some(self.connectivity(&rnn, keep.as_deref(), removed, &inner)?),
                ..row(Done {
                    rnn: &rnn,
                    stage: Stage::OneShot,
                    epochs: 0,
                    test,
                    seconds,
                })
            });
            if config.finetune_epochs > 0 {
                let start = Instant::now();
                let tuning = (*training).clone().with(|c| {
                    c.epochs = config.finetune_epochs;
                    c.learning_rate = training.learning_rate * config.finetune_rate;
                    c.patience = None;
                    c.target_loss = None;
                    c.seed = seed.wrapping_add(1);
                });
                let inner = session.inner(format!("fine-tuning {} after {method}", self.name));
                train(&mut rnn, self.data, &tuning, masks, &inner)?;
                let test = evaluate(&rnn, &self.data.test)?;
                rows.push(row(Done {
                    rnn: &rnn,
                    stage: Stage::FineTuned,
                    epochs: tuning.epochs,
                    test,
                    seconds: start.elapsed().as_secs_f64(),
                }));
            }
        }
        Ok(rows)
    }

    /// A fresh network trained without any recurrent weight.
    fn without_recurrence(&self, session: &Session<'_>, seed: u64) -> Result<Row> {
        let start = Instant::now();
        let mut rnn = Rnn::new(self.rnn.config().clone(), seed)?;
        let config = session.config.prune_config(Method::ZeroWhh, 0.0, seed);
        let (masks, report) = prune_in(&rnn, &self.context(), &config)?;
        let inner = session.inner(format!("training {} without W_hh", self.name));
        train(&mut rnn, self.data, session.training, &masks, &inner)?;
        let test = evaluate(&rnn, &self.data.test)?;
        let done = Done {
            rnn: &rnn,
            stage: Stage::FromScratch,
            epochs: 0,
            test,
            seconds: start.elapsed().as_secs_f64(),
        };
        Ok(self.row(&report, &masks, &done))
    }

    fn bits(&self, evaluation: &Evaluation) -> Option<f64> {
        matches!(self.data.test, Examples::Text(_)).then(|| evaluation.bits())
    }

    fn row(&self, report: &PruneReport, masks: &MaskSet, done: &Done<'_>) -> Row {
        let test = done.test;
        Row {
            reached: Some(report.sparsity),
            finetune_epochs: done.epochs,
            loss: Some(test.loss),
            bits: self.bits(&test),
            accuracy: test.accuracy,
            auc: test.auc,
            params: Some(self.rnn.params().count() - masks.pruned()),
            dead: Some(report.layers.iter().map(|l| l.dead).sum()),
            spectral_radius: report.layers.iter().map(|l| l.spectral_radius).collect(),
            order: summary(&report.cuts),
            seconds: done.seconds,
            ..self.empty(
                report.config.method,
                report.config.sparsity,
                report.config.seed,
                done.stage,
            )
        }
    }

    /// A row without results.
    fn empty(&self, method: Method, sparsity: f64, seed: u64, stage: Stage) -> Row {
        let shape = self.rnn.config();
        Row {
            suite: "lattice".into(),
            task: self.name.into(),
            cell: shape.cell,
            hidden: shape.hidden.clone(),
            method,
            sparsity,
            reached: None,
            seed,
            stage,
            finetune_epochs: 0,
            loss: None,
            loss_dense: self.test.loss,
            bits: None,
            bits_dense: self.bits(&self.test),
            accuracy: None,
            accuracy_dense: self.test.accuracy,
            auc: None,
            auc_dense: self.test.auc,
            repair: Repair::None,
            params: None,
            params_dense: self.rnn.params().count(),
            dead: None,
            spectral_radius: Vec::new(),
            connectivity: None,
            order: None,
            seconds: 0.0,
            error: None,
        }
    }

    fn refused(&self, method: Method, sparsity: f64, seed: u64, error: &Error) -> Row {
        Row {
            error: Some(error.to_string()),
            ..self.empty(method, sparsity, seed, Stage::OneShot)
        }
    }
}

fn summary(cuts: &[CutReport]) -> Option<OrderSummary> {
    let range = |of: fn(&CutReport) -> usize| {
        Some((cuts.iter().map(of).min()?, cuts.iter().map(of).max()?))
    };
    Some(OrderSummary {
        cuts: cuts.len(),
        degenerate_cuts: cuts.iter().filter(|c| c.order.degenerate).count(),
        classes: range(|c| c.order.classes)?,
        largest_class: range(|c| c.order.largest_class)?,
        irreducible: range(|c| c.order.irreducible_neurons)?,
    })
}
