//! Experiments: cells x methods x sparsities x seeds on tasks, and the same on a trained checkpoint, as plain rows.
//!
//! One network per task, cell and seed is trained on the training split with early stopping on the validation split; every
//! method prunes that same network; each pruned network is evaluated at once and again after fine-tuning under its mask, on
//! the test split, which decides nothing. Rows come in a fixed order and do not depend on the number of threads.

mod network;
mod row;
mod run;
mod speed;
mod structures;
mod verdict;

pub use row::{Connectivity, Metric, OrderSummary, Row, Stage, Treatment};
pub use run::{Trained, run, run_model, train_dense};
pub use speed::{BlockSpeed, SpeedRow, measure_blocks, measure_speed};
pub use structures::{
    Property, Structure, StructureConfig, StructureRow, correlations, run_structures,
};
pub use verdict::{Comparison, Outcome, compare, verdict};

use crate::{
    cell::Cell,
    mask::MaskRule,
    names::{named, with},
    prune::{Compete, LatticeConfig, Method, PruneConfig, Scope},
    rnn::TrainConfig,
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
    /// How neurons are scored by order.
    pub lattice: LatticeConfig,
    /// Which connections the networks have before pruning.
    #[serde(default)]
    pub wiring: WiringKind,
    /// Hidden sizes, where the wiring does not give them.
    pub hidden: Option<Vec<usize>>,
    /// Sizes of the splits.
    pub sizes: Option<Sizes>,
    /// Training.
    pub training: Option<TrainConfig>,
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
            lattice: base.lattice,
            wiring: WiringKind::Full,
            hidden: None,
            sizes: None,
            training: None,
        }
    }
}

impl ExperimentConfig {
    /// The methods with the controls, each once, in the order of [`Method::ALL`]. Blocks and random graphs choose among all
    /// connections and are left out where a wiring does not have them.
    pub fn all_methods(&self) -> Vec<Method> {
        let wired = self.wiring != WiringKind::Full;
        let wanted = |m: &Method| {
            (self.methods.contains(m) || CONTROLS.contains(m))
                && !(wired && m.needs_all_connections())
        };
        Method::ALL.iter().copied().filter(wanted).collect()
    }

    pub(crate) fn prune_config(&self, method: Method, sparsity: f64, seed: u64) -> PruneConfig {
        PruneConfig {
            scope: self.scope,
            rule: self.rule,
            compete: self.compete,
            lattice: self.lattice.clone(),
            seed,
            ..PruneConfig::new(method, sparsity)
        }
    }
}
