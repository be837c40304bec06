//! The flags of `eval lattice`.

use std::num::NonZeroU64;
use std::path::PathBuf;

use clap::Args;
use prune_lattice::Cell;
use prune_lattice::experiment::{ExperimentConfig, Repair};
use prune_lattice::prune::Method;
use prune_lattice::tasks::Task;

use super::ratio;
use crate::suites::lattice;

#[derive(Args)]
pub(super) struct LatticeArgs {
    /// Tasks, separated by commas: reber, embedded-reber, row-digits, mod2, mod3, tomita1 to tomita7, adding,
    /// char-grammar, text:FILE, mnist:FOLDER, mnist-permuted:FOLDER, vad:FOLDER [default: reber, row-digits, mod3]
    #[arg(long, value_delimiter = ',', value_name = "T[,T..]")]
    task: Vec<Task>,
    /// Cells, separated by commas: lstm, gru, tanh, relu [default: lstm]
    #[arg(long, value_delimiter = ',', value_name = "C[,C..]")]
    cell: Vec<Cell>,
    /// Methods, separated by commas; dense, zero-whh, random and threshold always run besides [default: all]
    #[arg(long, value_delimiter = ',', value_name = "M[,M..]")]
    method: Vec<Method>,
    /// Shares of the recurrent weights to remove, separated by commas [default: 0.5, 0.75, 0.9]
    #[arg(long, value_delimiter = ',', value_name = "S[,S..]", value_parser = ratio)]
    sparsity: Vec<f64>,
    /// Networks of each task and cell, seeded from --seed on
    #[arg(long, value_name = "N", default_value = "3")]
    seeds: NonZeroU64,
    /// What is done after pruning, separated by commas: none, refit (solve the weights under the mask again by least
    /// squares), merge (fold removed neurons into the kept ones) [default: none, refit, merge]
    #[arg(long, value_delimiter = ',', value_name = "R[,R..]")]
    repair: Vec<Repair>,
    /// Passes of fine-tuning under the mask
    #[arg(long, value_name = "N", default_value_t = 1)]
    finetune_epochs: usize,
    /// A trained character network in place of the tasks
    #[arg(long, value_name = "FILE", requires_all = ["vocab", "text"], conflicts_with_all = ["task", "cell"])]
    weights: Option<PathBuf>,
    /// JSON with the id of each character of that network
    #[arg(long, value_name = "FILE", requires = "weights")]
    vocab: Option<PathBuf>,
    /// Text for that network: 90 % fine-tuning, 5 % validation, 5 % test
    #[arg(long, value_name = "FILE", requires = "weights")]
    text: Option<PathBuf>,
}

impl LatticeArgs {
    pub(super) fn config(self, seed: u64) -> lattice::Config {
        let experiment = ExperimentConfig::default().with(|c| {
            if !self.task.is_empty() {
                c.tasks = self.task;
            }
            if !self.cell.is_empty() {
                c.cells = self.cell;
            }
            if !self.method.is_empty() {
                c.methods = self.method;
            }
            if !self.sparsity.is_empty() {
                c.sparsities = self.sparsity;
            }
            if !self.repair.is_empty() {
                c.repairs = self.repair;
            }
            c.finetune_epochs = self.finetune_epochs;
        });
        let files = self.weights.zip(self.vocab).zip(self.text);
        lattice::Config {
            checkpoint: files.map(|((weights, vocab), text)| lattice::CheckpointConfig {
                weights,
                vocab,
                text,
            }),
            ..lattice::Config::new(experiment, seed, self.seeds.get())
        }
    }
}
