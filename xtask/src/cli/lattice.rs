//! The flags of `eval lattice`.

use std::num::{NonZeroU64, NonZeroUsize};
use std::path::PathBuf;

use clap::{ArgGroup, Args};
use prune_lattice::Cell;
use prune_lattice::experiment::{ExperimentConfig, Repair};
use prune_lattice::prune::Method;
use prune_lattice::rnn::ReadOut;
use prune_lattice::tasks::Task;
use prune_lattice::wiring::WiringKind;

use super::ratio;
use crate::suites::lattice;

#[derive(Args)]
#[command(group = ArgGroup::new("data").args(["task", "vocab"]))]
pub(super) struct LatticeArgs {
    #[arg(
        long,
        value_delimiter = ',',
        value_name = "T[,T..]",
        help = format!("Tasks, separated by commas: {} [default: reber, row-digits, mod3]", Task::NAMES)
    )]
    task: Vec<Task>,
    #[arg(
        long,
        value_delimiter = ',',
        value_name = "C[,C..]",
        help = format!("Cells, separated by commas: {} [default: lstm]", Cell::names())
    )]
    cell: Vec<Cell>,
    #[arg(
        long,
        value_delimiter = ',',
        value_name = "M[,M..]",
        help = format!(
            "Methods, separated by commas: {}; dense, zero-whh, random and threshold always run [default: all]",
            Method::names()
        )
    )]
    method: Vec<Method>,
    /// Shares of the recurrent weights to remove, separated by commas [default: 0.5, 0.75, 0.9]
    #[arg(long, value_delimiter = ',', value_name = "S[,S..]", value_parser = ratio)]
    sparsity: Vec<f64>,
    /// Networks of each task and cell, seeded from --seed on
    #[arg(long, value_name = "N", default_value = "3")]
    seeds: NonZeroU64,
    #[arg(
        long,
        value_delimiter = ',',
        value_name = "R[,R..]",
        help = format!(
            "What is done after pruning, separated by commas: {}; refit solves the weights under the mask again by least \
             squares, merge folds removed neurons into the kept ones [default: all]",
            Repair::names()
        )
    )]
    repair: Vec<Repair>,
    /// Epochs of fine-tuning under the mask
    #[arg(long, value_name = "N", default_value_t = 1)]
    finetune_epochs: usize,
    #[arg(
        long,
        value_name = "W",
        conflicts_with = "weights",
        help = format!("Connections of the networks before pruning: {} [default: full]", WiringKind::NAMES)
    )]
    wiring: Option<WiringKind>,
    /// Also train networks on N random graphs of each kind, and correlate graph properties with accuracy
    #[arg(long, value_name = "N", conflicts_with = "weights")]
    structures: Option<NonZeroUsize>,
    /// A trained network: safetensors or ONNX, with --task vad:FOLDER, or safetensors of a character network with --vocab and
    /// --text
    #[arg(long, value_name = "FILE", requires = "data", conflicts_with = "cell")]
    weights: Option<PathBuf>,
    /// Recurrent node of an ONNX file [default: the only one]
    #[arg(long, value_name = "NAME", requires = "weights")]
    node: Option<String>,
    /// Prefix of the read-out's weight and bias in --weights
    #[arg(long, value_name = "NAME", requires = "weights")]
    read_out: Option<String>,
    #[arg(
        long,
        value_name = "A",
        requires = "weights",
        help = format!("What the read-out applies to the states: {} [default: linear]", ReadOut::names())
    )]
    read_out_activation: Option<ReadOut>,
    /// JSON with the id of each character of a character network
    #[arg(long, value_name = "FILE", requires_all = ["weights", "text"])]
    vocab: Option<PathBuf>,
    /// Text for a character network: 90 % fine-tuning, 5 % validation, 5 % test
    #[arg(long, value_name = "FILE", requires_all = ["weights", "vocab"])]
    text: Option<PathBuf>,
}

impl LatticeArgs {
    pub(super) fn config(self, seed: u64) -> lattice::Config {
        let data = self.vocab.zip(self.text);
        let checkpoint = self.weights.map(|weights| lattice::CheckpointConfig {
            weights,
            node: self.node,
            read_out: self.read_out,
            activation: self.read_out_activation.unwrap_or_default(),
            characters: data.map(|(vocab, text)| lattice::Characters { vocab, text }),
        });
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
            c.wiring = self.wiring.unwrap_or_default();
        });
        lattice::Config {
            checkpoint,
            structures: self.structures.map(NonZeroUsize::get),
            ..lattice::Config::new(experiment, seed, self.seeds.get())
        }
    }
}
