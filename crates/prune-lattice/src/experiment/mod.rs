//! Experiments: cells x methods x sparsities x seeds on tasks, and the same on a trained checkpoint, as plain rows.
//!
//! One network per task, cell and seed is trained on the training split with early stopping on the validation split; every
//! method prunes that same network; each pruned network is evaluated at once and again after fine-tuning under its mask, on
//! the test split, which decides nothing. Rows come in a fixed order and do not depend on the number of threads.

mod judge;
mod network;
mod noise;
mod row;
mod run;
mod speed;
mod structures;
mod verdict;

pub use network::{PrunedNetwork, Visit};
pub use noise::run_rnnoise;
pub use row::{Connectivity, ExactRemoval, Metric, OrderSummary, Row, Stage, Treatment};
pub use run::{
    NetworkRows, Trained, expected_seconds, network_name, run, run_each, run_model, train_dense,
};
pub use speed::{BlockSpeed, SpeedRow, measure_blocks, measure_speed};
pub use structures::{
    Property, Structure, StructureConfig, StructureRow, correlations, run_structures,
};
pub use verdict::{Comparison, Outcome, compare, verdict};

use crate::{
    cell::Cell,
    data::{Augment, Dataset},
    error::{Error, Result},
    mask::MaskRule,
    names::{named, with},
    prune::{Compete, LatticeConfig, Method, PruneConfig, Scope},
    repair::{MergeConfig, RefitConfig},
    rnn::{Gradual, TrainConfig},
    tasks::{Sizes, Task},
    wiring::WiringKind,
};
use serde::{Deserialize, Serialize};

/// What to run. `None` leaves the choice to the task's defaults.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct ExperimentConfig {
    /// Tasks.
    pub tasks: Vec<Task>,
    /// Cells.
    pub cells: Vec<Cell>,
    /// Methods; `zero-whh`, `random` and `threshold` are always run besides.
    pub methods: Vec<Method>,
    /// Shares of the weights in scope to remove.
    pub sparsities: Vec<f64>,
    /// Seeds: of the data, the initial weights, the order of the examples and whatever a method draws.
    pub seeds: Vec<u64>,
    /// What is done after pruning; each gives rows of its own.
    #[serde(default = "all_repairs")]
    pub repairs: Vec<Repair>,
    /// Passes of fine-tuning under the mask; 0 leaves only the one-shot rows.
    pub finetune_epochs: usize,
    /// Adam's rate in fine-tuning, as a share of the rate in training.
    pub finetune_rate: f32,
    /// Which matrices are pruned.
    pub scope: Scope,
    /// How scores of neurons decide over connections.
    pub rule: MaskRule,
    /// Within what weights compete for magnitude pruning.
    pub compete: Compete,
    /// The share that each gate keeps, in place of the sparsity, for magnitudes per gate and for blocks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub densities: Option<Vec<f64>>,
    /// Whether blocks of `W_hh` leave the diagonal as it is.
    #[serde(default)]
    pub keep_diagonal: bool,
    /// Whether magnitudes are weighed by their inputs, for magnitudes, thresholds and blocks.
    #[serde(default)]
    pub weigh_inputs: bool,
    /// Rewiring probability of the Watts–Strogatz graphs of `ws`.
    #[serde(default = "default_rewire")]
    pub rewire: f64,
    /// How weights under a mask are solved again.
    #[serde(default)]
    pub refit: RefitConfig,
    /// How neurons are merged.
    #[serde(default)]
    pub merge: MergeConfig,
    /// Pruning while fine-tuning, as further rows of the methods that [can](Method::is_gradual).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gradual: Option<Ramp>,
    /// How neurons are scored by order.
    pub lattice: LatticeConfig,
    /// Which connections the networks have before pruning.
    #[serde(default)]
    pub wiring: WiringKind,
    /// Hidden sizes, where the wiring does not give them.
    pub hidden: Option<Vec<usize>>,
    /// Sizes of the splits.
    pub sizes: Option<Sizes>,
    /// How images are deformed in training.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub augment: Option<Augment>,
    /// Passes of training, in place of those of `training`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub epochs: Option<usize>,
    /// Training.
    pub training: Option<TrainConfig>,
}

/// Gradual pruning in fine-tuning: the sparsity rises over a share of its updates.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Ramp {
    /// Share of the updates after which the masks are final, above 0 and at most 1.
    pub until: f64,
    /// Updates between two choices of masks.
    pub every: u64,
}

impl Ramp {
    /// The schedule in a run of so many updates.
    fn schedule(self, updates: u64, prune: PruneConfig) -> Result<Gradual> {
        let stop = (self.until * updates as f64).round();
        if !(self.until > 0.0 && self.until <= 1.0 && stop >= 1.0) {
            return Err(Error::Setting {
                setting: "gradual pruning",
                reason: format!("until {} of {updates} updates", self.until),
            });
        }
        Ok(Gradual::new(0, stop as u64, self.every, prune))
    }
}

named! {
    /// What is done after pruning, before any training.
    #[derive(Default)]
    pub enum Repair as "repair" {
        /// Nothing.
        #[default]
        None = "none",
        /// The weights under the mask are solved again by least squares on states of the training split.
        Refit = "refit",
        /// Neurons are removed and folded into the kept ones; for methods that rank neurons.
        Merge = "merge",
    }
}

/// Controls without which no row of a lattice method means anything.
pub const CONTROLS: [Method; 3] = [Method::ZeroWhh, Method::Random, Method::Threshold];

with!(ExperimentConfig);

fn default_rewire() -> f64 {
    PruneConfig::new(Method::Ws, 0.5).rewire
}

fn all_repairs() -> Vec<Repair> {
    Repair::ALL.to_vec()
}

impl Default for ExperimentConfig {
    /// The default suite: Reber strings, row digits and counting modulo 3 with LSTMs, all methods at 50, 75 and 90 %, three
    /// seeds.
    fn default() -> Self {
        let base = PruneConfig::new(Method::LatticeContext, 0.5);
        Self {
            tasks: vec![Task::Reber, Task::RowDigits, Task::Mod(3)],
            cells: vec![Cell::Lstm],
            methods: Method::ALL.to_vec(),
            sparsities: vec![0.5, 0.75, 0.9],
            seeds: vec![0, 1, 2],
            repairs: all_repairs(),
            finetune_epochs: 1,
            finetune_rate: 1.0,
            scope: base.scope,
            rule: base.rule,
            compete: base.compete,
            densities: base.densities,
            keep_diagonal: base.keep_diagonal,
            weigh_inputs: base.weigh_inputs,
            rewire: base.rewire,
            refit: RefitConfig::default(),
            merge: MergeConfig::default(),
            gradual: None,
            lattice: base.lattice,
            wiring: WiringKind::Full,
            hidden: None,
            sizes: None,
            augment: None,
            epochs: None,
            training: None,
        }
    }
}

impl ExperimentConfig {
    /// The methods with the controls, each once, in the order of [`Method::ALL`]. Blocks and random graphs choose among all
    /// connections and are left out where a wiring does not have them, random graphs also where `W_ih` is pruned.
    pub fn all_methods(&self) -> Vec<Method> {
        let wired = self.wiring != WiringKind::Full;
        let wanted = |m: &Method| {
            (self.methods.contains(m) || CONTROLS.contains(m))
                && !(wired && m.needs_all_connections())
                && !(self.scope.input() && m.draws_graph())
        };
        Method::ALL.iter().copied().filter(wanted).collect()
    }

    pub(crate) fn prune_config(&self, method: Method, sparsity: f64, seed: u64) -> PruneConfig {
        let by_gate = method.block().is_some()
            || (method, self.compete) == (Method::Magnitude, Compete::PerGate);
        PruneConfig {
            // Without W_hh: that is what the control is, whatever is pruned otherwise.
            scope: match method {
                Method::ZeroWhh => Scope::H2h,
                _ => self.scope,
            },
            rule: self.rule,
            compete: self.compete,
            lattice: self.lattice.clone(),
            densities: self.densities.clone().filter(|_| by_gate),
            keep_diagonal: self.keep_diagonal && method.block().is_some(),
            weigh_inputs: self.weigh_inputs && method.weighs_inputs(),
            rewire: self.rewire,
            seed,
            ..PruneConfig::new(method, sparsity)
        }
    }

    /// The data of a task.
    ///
    /// # Errors
    /// Those of [`Task::generate`]; an augmentation of a task without images.
    pub fn data(&self, task: &Task, seed: u64) -> Result<Dataset> {
        let data = task.generate(self.sizes.unwrap_or(task.default_sizes()), seed)?;
        match self.augment {
            None => Ok(data),
            Some(kind) => data.with_augment(kind),
        }
    }

    /// How a network is trained on a task.
    pub fn training(&self, task: &Task, cell: Cell) -> TrainConfig {
        let training = self.training.clone();
        let training = training.unwrap_or(task.default_training(cell));
        training.with(|c| c.epochs = self.epochs.unwrap_or(c.epochs))
    }
}
