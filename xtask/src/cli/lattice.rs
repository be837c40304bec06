//! The flags of `eval lattice`.

use std::num::{NonZeroU64, NonZeroUsize};
use std::path::{Path, PathBuf};

use clap::{ArgGroup, Args};
use prune_lattice::Cell;
use prune_lattice::experiment::{ExperimentConfig, Repair};
use prune_lattice::prune::Method;
use prune_lattice::rnn::ReadOut;
use prune_lattice::tasks::Task;
use prune_lattice::wiring::WiringKind;

use super::values::{counted, positive, ratio};
use super::{CommonArgs, names};
use crate::settings::Device;
use crate::suites::lattice;

#[derive(Args)]
#[command(group = ArgGroup::new("data").args(["task", "vocab"]))]
pub(super) struct LatticeArgs {
    #[arg(
        long,
        value_name = "T[,T..]",
        value_parser = tasks,
        help = format!("Tasks, separated by commas: {} [default: reber, row-digits, mod3]", Task::NAMES)
    )]
    task: Vec<Tasks>,
    #[arg(
        long,
        value_delimiter = ',',
        value_name = "C[,C..]",
        value_parser = cell,
        help = format!("Cells, separated by commas: {} [default: lstm]", Cell::names())
    )]
    cell: Vec<Cell>,
    #[arg(
        long,
        value_delimiter = ',',
        value_name = "M[,M..]",
        value_parser = method,
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
    #[arg(long, value_name = "N", default_value = "3", value_parser = counted::<NonZeroU64>)]
    seeds: NonZeroU64,
    #[arg(
        long,
        value_delimiter = ',',
        value_name = "R[,R..]",
        value_parser = repair,
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
        value_parser = wiring,
        conflicts_with = "weights",
        help = format!("Connections of the networks before pruning: {} [default: full]", WiringKind::NAMES)
    )]
    wiring: Option<WiringKind>,
    /// Also train networks on N random graphs of each kind, and correlate graph properties with accuracy
    #[arg(long, value_name = "N", conflicts_with = "weights", value_parser = positive)]
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

/// Tasks of one occurrence of the flag.
#[derive(Clone)]
struct Tasks(Vec<Task>);

/// Tasks separated by commas, which may also be part of the path of one.
fn tasks(list: &str) -> Result<Tasks, String> {
    let parts: Vec<&str> = list.split(',').collect();
    let file = |task: &str| {
        task.split_once(':')
            .map(|(_, path)| Path::new(path).exists())
    };
    let tasks = names::joined(&parts, |task| file(task) == Some(true)).into_iter();
    let task = |task: String| names::parse(&task, &names::words(Task::NAMES));
    tasks.map(task).collect::<Result<_, _>>().map(Tasks)
}

fn cell(name: &str) -> Result<Cell, String> {
    names::parse(name, &names::words(&Cell::names()))
}

fn method(name: &str) -> Result<Method, String> {
    names::parse(name, &names::words(&Method::names()))
}

fn repair(name: &str) -> Result<Repair, String> {
    names::parse(name, &names::words(&Repair::names()))
}

fn wiring(name: &str) -> Result<WiringKind, String> {
    names::parse(name, &names::words(WiringKind::NAMES))
}

impl LatticeArgs {
    /// Why the flags cannot be used together, or not by this suite.
    pub(super) fn refused(&self, common: &CommonArgs) -> Option<String> {
        let wired = (self.wiring.as_ref()).filter(|wiring| **wiring != WiringKind::Full);
        let whole = self.method.iter().find(|m| m.needs_all_connections());
        match () {
            () if common.device != Device::Cpu => Some(format!(
                "--device {}: eval lattice computes on the processor only",
                common.device.name()
            )),
            () if common.window.is_some() => {
                Some("--window: eval lattice reads no windows of tokens".into())
            }
            () if common.samples.is_some() => {
                Some("--samples: eval lattice evaluates on the whole test split of a task".into())
            }
            () => wired.zip(whole).map(|(wiring, method)| {
                format!("--method {method}: it chooses among all connections, which --wiring {wiring} does not have")
            }),
        }
    }

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
                c.tasks = self.task.into_iter().flat_map(|tasks| tasks.0).collect();
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
