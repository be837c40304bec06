//! The driver.

use super::{
    ExperimentConfig, Repair, Row,
    network::{Dense, Session, Source, Visit},
};
use crate::{
    cell::Cell,
    data::Dataset,
    error::Result,
    mask::MaskSet,
    prune::Method,
    rnn::{Rnn, RnnConfig, TrainConfig, train},
    tasks::Task,
    wiring::{Wiring, WiringKind},
};
use rayon::prelude::*;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;
use tensor_io::{Cancelled, NoProgress, Progress};

/// Trains a dense network for every task, cell and seed, prunes it by every method at every sparsity, and evaluates it. A
/// step of `progress` is a pruned network or an epoch of training, which take about as long.
///
/// # Errors
/// Settings or files that cannot be used, a diverging run, or [`Error::Cancelled`](crate::Error::Cancelled). A degenerate order is no error here: its
/// rows say so.
pub fn run(config: &ExperimentConfig, progress: &dyn Progress) -> Result<Vec<Row>> {
    let rows = run_each(config, progress)
        .into_iter()
        .map(|network| network.rows);
    let rows: Vec<Vec<Row>> = rows.collect::<Result<_>>()?;
    Ok(rows.into_iter().flatten().collect())
}

/// What became of the network of one task, cell and seed.
#[derive(Debug)]
pub struct NetworkRows {
    /// `TASK, CELL, seed N`.
    pub name: String,
    /// Its rows, or why there are none.
    pub rows: Result<Vec<Row>>,
}

/// The name of the network of a task, cell and seed.
pub fn network_name(task: &Task, cell: Cell, seed: u64) -> String {
    format!("{task}, {cell}, seed {seed}")
}

/// As [`run`], network by network: one that fails leaves the others.
pub fn run_each(config: &ExperimentConfig, progress: &dyn Progress) -> Vec<NetworkRows> {
    let mut networks = Vec::new();
    for task in &config.tasks {
        for &cell in &config.cells {
            for &seed in &config.seeds {
                networks.push((task, cell, seed));
            }
        }
    }
    let methods = config.all_methods();
    let of_network =
        |&(task, cell, _): &(&Task, Cell, u64)| steps_of_network(config, (task, cell), &methods);
    progress.begin("pruning", networks.iter().map(of_network).sum());
    networks
        .into_par_iter()
        .map(|(task, cell, seed)| NetworkRows {
            name: network_name(task, cell, seed),
            rows: network_rows(config, (task, cell, seed), &methods, progress),
        })
        .collect()
}

/// The steps of one network's progress.
fn steps_of_network(
    config: &ExperimentConfig,
    (task, cell): (&Task, Cell),
    methods: &[Method],
) -> u64 {
    // The dense network, and the one that never had recurrent weights.
    2 * config.training(task, cell).epochs as u64 + steps(config, methods)
}

/// About how many seconds [`run`] takes: an epoch of training is timed for each task and cell, and counted as often as there
/// are steps of its progress, side by side on as many threads as there are. Training that stops early takes less.
///
/// # Errors
/// As [`run`].
pub fn expected_seconds(config: &ExperimentConfig) -> Result<f64> {
    let Some(&seed) = config.seeds.first() else {
        return Ok(0.0);
    };
    let methods = config.all_methods();
    let mut seconds = 0.0;
    for task in &config.tasks {
        for &cell in &config.cells {
            let mut network = prepare(config, task, cell, seed)?;
            network.training.epochs = 1;
            network.training.gradual = None;
            let Trained {
                rnn,
                data,
                training,
                wired,
            } = &mut network;
            let started = Instant::now();
            train(rnn, data, training, wired, &NoProgress)?;
            let steps = steps_of_network(config, (task, cell), &methods);
            let networks = config.seeds.len() as f64;
            let at_once = (rayon::current_num_threads() / training.shards.max(1)).max(1);
            let each = started.elapsed().as_secs_f64() * steps as f64;
            seconds += each * networks / (at_once as f64).min(networks);
        }
    }
    Ok(seconds)
}

fn network_rows(
    config: &ExperimentConfig,
    (task, cell, seed): (&Task, Cell, u64),
    methods: &[Method],
    progress: &dyn Progress,
) -> Result<Vec<Row>> {
    let trained = train_dense(config, task, cell, seed, progress)?;
    let name = match &config.wiring {
        WiringKind::Full => task.to_string(),
        wiring => format!("{task}, {wiring}"),
    };
    let session = Session {
        config,
        training: &trained.training,
        visit: &|_| Ok(()),
        progress,
    };
    let source = Source {
        name: &name,
        rnn: &trained.rnn,
        data: &trained.data,
        judge: &trained.data,
        readers: &[],
        wired: &trained.wired,
        seed: Some(seed),
    };
    let dense = Dense::new(source, progress)?;
    let mut rows = dense.prune_all(&session, methods, seed)?;
    rows.push(dense.without_recurrence(&session, seed)?);
    Ok(rows)
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
    let mut trained = prepare(config, task, cell, seed)?;
    let Trained {
        rnn,
        data,
        training,
        wired,
    } = &mut trained;
    let name = format!("training {task} {cell}, seed {seed}");
    let inner = Inner::of_training(progress, name, training.epochs);
    train(rnn, data, training, wired, &inner)?;
    inner.finish()?;
    Ok(trained)
}

/// The network of one task, cell and seed before training, and what it is trained on.
fn prepare(config: &ExperimentConfig, task: &Task, cell: Cell, seed: u64) -> Result<Trained> {
    let wiring = config.wiring.build()?;
    let data = config
        .data(task, seed)?
        .with_extra_steps(wiring.as_ref().map_or(0, Wiring::extra_steps))?;
    let training = TrainConfig {
        seed,
        ..config.training(task, cell)
    };
    let hidden = match &wiring {
        Some(wiring) => vec![wiring.len()],
        None => config.hidden.clone().unwrap_or(task.default_hidden(cell)),
    };
    let shape = RnnConfig::new(cell, data.input, hidden, data.outputs);
    let rnn = fresh(shape, task, seed)?;
    let wired = match &wiring {
        Some(wiring) => wiring.masks(&rnn)?,
        None => MaskSet::default(),
    };
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

/// Prunes a trained network by every method at every sparsity; `visit` sees each pruned network. Fine-tuning is by the
/// network's own way of training. The seeds of the configuration are those of methods that draw; the others run once, by the
/// first. Tasks, cells and sizes are not used.
///
/// # Errors
/// As [`run`]; examples that do not fit the network; those of `visit`.
pub fn run_model(
    name: &str,
    trained: &Trained,
    config: &ExperimentConfig,
    visit: &Visit<'_>,
    progress: &dyn Progress,
) -> Result<Vec<Row>> {
    let source = Source {
        name,
        rnn: &trained.rnn,
        data: &trained.data,
        judge: &trained.data,
        readers: &[],
        wired: &trained.wired,
        seed: None,
    };
    let session = Session {
        config,
        training: &trained.training,
        visit,
        progress,
    };
    prune_one_network(source, &session)
}

/// The rows of a network that was not trained here: methods that draw nothing run once.
pub(super) fn prune_one_network(source: Source<'_>, session: &Session<'_>) -> Result<Vec<Row>> {
    let Session {
        config, progress, ..
    } = session;
    let all = config.all_methods();
    let drawn: Vec<Method> = all.iter().copied().filter(|m| m.is_random()).collect();
    let of_seed = |k: usize| if k == 0 { &all } else { &drawn };
    let count = (0..config.seeds.len()).map(|k| steps(config, of_seed(k)));
    progress.begin("pruning", count.sum());
    let dense = Dense::new(source, *progress)?;
    let rows: Vec<Vec<Row>> = config
        .seeds
        .iter()
        .enumerate()
        .map(|(k, &seed)| dense.prune_all(session, of_seed(k), seed))
        .collect::<Result<_>>()?;
    Ok(rows.into_iter().flatten().collect())
}

/// The progress of a call inside a step: it can cancel, and its messages are passed on. Of its steps only epochs of training count.
pub(super) struct Inner<'a> {
    outer: &'a dyn Progress,
    name: String,
    epochs: u64,
    /// Updates in all and done, and the epochs that `outer` knows of.
    updates: Mutex<[u64; 3]>,
}

impl<'a> Inner<'a> {
    /// A call that counts nothing.
    pub(super) fn new(outer: &'a dyn Progress, name: impl Into<String>) -> Self {
        Self::of_training(outer, name, 0)
    }

    /// Training for `epochs` epochs.
    pub(super) fn of_training(
        outer: &'a dyn Progress,
        name: impl Into<String>,
        epochs: usize,
    ) -> Self {
        Self {
            outer,
            name: name.into(),
            epochs: epochs as u64,
            updates: Mutex::default(),
        }
    }

    /// Counts the epochs that training has not needed.
    pub(super) fn finish(self) -> std::result::Result<(), Cancelled> {
        let [.., told] = *self.updates.lock().unwrap_or_else(PoisonError::into_inner);
        self.outer.advance(self.epochs.saturating_sub(told))
    }
}

impl Progress for Inner<'_> {
    fn begin(&self, _stage: &str, steps: u64) {
        *self.updates.lock().unwrap_or_else(PoisonError::into_inner) = [steps, 0, 0];
    }

    fn advance(&self, steps: u64) -> std::result::Result<(), Cancelled> {
        let new = {
            let mut updates = self.updates.lock().unwrap_or_else(PoisonError::into_inner);
            let [total, done, told] = &mut *updates;
            *done = (*done + steps).min(*total);
            let epochs = (*done * self.epochs).checked_div(*total).unwrap_or(0);
            epochs - std::mem::replace(told, epochs)
        };
        self.outer.advance(new)
    }

    fn message(&self, text: &str) {
        self.outer.message(&format!("{}, {text}", self.name));
    }
}

/// The sparsities of a method; `dense` and `zero-whh` know none and run once.
pub(super) fn sparsities(config: &ExperimentConfig, method: Method) -> Vec<f64> {
    match method {
        Method::Dense | Method::ZeroWhh => vec![0.0],
        _ => config.sparsities.clone(),
    }
}

/// Pruned networks of one seed, and the epochs by which they are trained afterwards.
pub(super) fn steps(config: &ExperimentConfig, methods: &[Method]) -> u64 {
    let of = |m: &Method| {
        let repairs = config.repairs.iter().filter(|repair| match repair {
            Repair::None => true,
            Repair::Refit => *m != Method::Dense,
            Repair::Merge => m.ranks_neurons(),
        });
        let gradual = usize::from(config.gradual.is_some() && m.is_gradual());
        let epochs = config.finetune_epochs * (repairs.count() + gradual);
        sparsities(config, *m).len() as u64 * (1 + epochs as u64)
    };
    methods.iter().map(of).sum()
}
