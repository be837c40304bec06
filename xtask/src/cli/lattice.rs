//! The flags of `eval lattice`.

use std::num::{NonZeroU64, NonZeroUsize};
use std::path::{Path, PathBuf};

use clap::{ArgGroup, Args};
use prune_lattice::Cell;
use prune_lattice::data::Augment;
use prune_lattice::experiment::{ExperimentConfig, Ramp, Repair};
use prune_lattice::prune::{Compete, Method, Scope};
use prune_lattice::rnn::ReadOut;
use prune_lattice::rnnoise::{Stored, refit_config};
use prune_lattice::tasks::{Sizes, Task};
use prune_lattice::wiring::WiringKind;

use super::values::{ratio, up_to};
use super::{CommonArgs, names};
use crate::settings::{Device, once};
use crate::suites::lattice;

/// The most networks of a kind.
const NETWORKS: u64 = 10_000;
/// The most passes over the examples, and updates between two masks.
const EPOCHS: u64 = 1_000_000;
/// The most neurons of a layer or wiring, whose recurrent weights take a few GB in an LSTM.
const NEURONS: u64 = 16_384;
/// The most examples of a split.
const EXAMPLES: u64 = 10_000_000;

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
    /// Fractions of the pruned matrices to remove, separated by commas [default: 0.5, 0.75, 0.9]
    #[arg(long, value_delimiter = ',', value_name = "S[,S..]", value_parser = ratio)]
    sparsity: Vec<f64>,
    /// Networks of each task and cell, seeded from --seed on; draws of each random method for a network from a file
    #[arg(long, value_name = "N", default_value = "3", value_parser = up_to::<NonZeroU64>(NETWORKS))]
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
    /// Epochs of fine-tuning under the mask [default: 1; 0 for RNNoise, which is not trained here]
    #[arg(long, value_name = "N", value_parser = finetune_epochs)]
    finetune_epochs: Option<usize>,
    #[command(flatten)]
    pruning: PruningArgs,
    #[command(flatten)]
    training: TrainingArgs,
    #[command(flatten)]
    checkpoint: CheckpointArgs,
}

/// How methods prune and repairs repair.
#[derive(Args)]
#[command(next_help_heading = "Pruning and repair")]
struct PruningArgs {
    #[arg(
        long,
        value_name = "M",
        value_parser = scope,
        help = format!("Matrices to prune: {}; h2h is W_hh, i2h is W_ih [default: h2h]", Scope::names())
    )]
    scope: Option<Scope>,
    #[arg(
        long,
        value_name = "C",
        value_parser = compete,
        help = format!(
            "Within what weights compete for method magnitude: {} [default: per-gate]",
            Compete::names()
        )
    )]
    compete: Option<Compete>,
    /// Fraction of its weights or blocks that each gate keeps, in PyTorch's order (LSTM: i, f, g, o; GRU: r, z, n), in place of
    /// --sparsity; for magnitude per gate and for blocks
    #[arg(
        long,
        value_delimiter = ',',
        value_name = "D[,D..]",
        value_parser = share,
        conflicts_with = "sparsity"
    )]
    densities: Option<Vec<f64>>,
    /// Blocks of W_hh keep the diagonal, beside the budget
    #[arg(long)]
    keep_diagonal: bool,
    /// Weigh magnitudes by the root mean square of their inputs, for methods magnitude, threshold and blocks
    #[arg(long)]
    weigh_inputs: bool,
    /// Rewiring probability of the graphs of method ws [default: 0.1]
    #[arg(long, value_name = "P", value_parser = share)]
    rewire: Option<f64>,
    /// Ridge of refit and merge, as a fraction of the mean square (refit) or variance (merge) of the states [default: 1e-4; 1e-2 to
    /// refit RNNoise]
    #[arg(long, value_name = "X", value_parser = ridge)]
    ridge: Option<f64>,
    /// Refit weights without a constant, so that biases stay as they are [default for RNNoise]
    #[arg(long)]
    no_constant: bool,
    /// Passes of merge: later ones predict from the states of the smaller network; the pass with the smallest validation loss stays
    #[arg(long, value_name = "N", default_value = "1", value_parser = up_to::<NonZeroUsize>(EPOCHS))]
    merge_passes: NonZeroUsize,
    /// Also prune gradually: the sparsity rises over this fraction of the fine-tuning, for methods magnitude, threshold and blocks
    #[arg(long, value_name = "F", value_parser = share)]
    gradual: Option<f64>,
    /// Updates between two masks of --gradual
    #[arg(long, value_name = "N", default_value = "10", requires = "gradual", value_parser = up_to::<NonZeroU64>(EPOCHS))]
    gradual_every: NonZeroU64,
}

/// What networks are trained here, and on what.
#[derive(Args)]
#[command(next_help_heading = "Networks that are trained")]
struct TrainingArgs {
    /// Neurons of each layer, such as 128 or 64+64 [default: by task]
    #[arg(long, value_name = "N[+N..]", value_parser = hidden, conflicts_with_all = ["weights", "wiring"])]
    hidden: Option<Layers>,
    /// Epochs of training at most [default: by task]
    #[arg(long, value_name = "N", value_parser = up_to::<NonZeroUsize>(EPOCHS), conflicts_with = "weights")]
    epochs: Option<NonZeroUsize>,
    /// Examples to train on, to validate and to test with [default: by task; MNIST: 9000,1000,10000 of 60,000 and 10,000]
    #[arg(long, value_name = "N,N,N", value_parser = sizes)]
    examples: Option<Sizes>,
    #[arg(
        long,
        value_name = "A",
        value_parser = augment,
        help = format!("How images are deformed in training: {} [default: elastic]", Augment::names())
    )]
    augment: Option<Augment>,
    #[arg(
        long,
        value_name = "W",
        value_parser = wiring,
        conflicts_with = "weights",
        help = format!("Connections of the networks before pruning: {} [default: full]", WiringKind::NAMES)
    )]
    wiring: Option<WiringKind>,
    /// Also train networks on N random graphs of each kind for each task and cell, and correlate graph properties with accuracy
    #[arg(long, value_name = "N", conflicts_with = "weights", value_parser = up_to::<NonZeroUsize>(NETWORKS))]
    structures: Option<NonZeroUsize>,
}

/// A network from a file.
#[derive(Args)]
#[command(next_help_heading = "A trained network")]
struct CheckpointArgs {
    /// A trained network: safetensors, ONNX or a weight file of RNNoise, with --task vad:FOLDER, or safetensors of a character
    /// network with --vocab and --text
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
        value_parser = read_out,
        help = format!("What the read-out applies to the states: {} [default: linear]", ReadOut::names())
    )]
    read_out_activation: Option<ReadOut>,
    /// JSON with the id of each character of a character network
    #[arg(long, value_name = "FILE", requires_all = ["weights", "text"])]
    vocab: Option<PathBuf>,
    /// Text for a character network: 90 % fine-tuning, 5 % validation, 5 % test
    #[arg(long, value_name = "FILE", requires_all = ["weights", "vocab"])]
    text: Option<PathBuf>,
    /// Write every pruned network to this new folder: as ONNX or RNNoise's weight file where --weights is one and can hold it, as
    /// safetensors otherwise
    #[arg(long, value_name = "DIR", requires = "weights")]
    save: Option<PathBuf>,
    #[arg(
        long,
        value_name = "S",
        requires = "save",
        value_parser = stored,
        help = format!("How weights of RNNoise are saved: {} [default: floats]", Stored::names())
    )]
    save_as: Option<Stored>,
}

/// Tasks of one occurrence of the flag.
#[derive(Clone)]
struct Tasks(Vec<Task>);

/// Sizes of layers.
#[derive(Clone)]
struct Layers(Vec<usize>);

/// Tasks separated by commas, which may also be part of the path of one.
fn tasks(list: &str) -> Result<Tasks, String> {
    let parts: Vec<&str> = list.split(',').collect();
    let known = names::words(Task::NAMES);
    let is_of_path = |kind: &str| {
        let mut kinds = known.iter().filter_map(|name| name.split_once(':'));
        kinds.any(|(known, _)| known == kind)
    };
    let is_there = |task: &str| {
        task.split_once(':')
            .is_some_and(|(kind, path)| is_of_path(kind) && Path::new(path).exists())
    };
    let tasks = names::joined(&parts, is_there).into_iter();
    let task = |task: String| names::parse(&task, &known);
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
    let wiring: WiringKind = names::parse(name, &names::words(WiringKind::NAMES))?;
    match &wiring {
        WiringKind::Feedback(sizes) | WiringKind::BottomUp(sizes) => {
            let neurons = sizes
                .iter()
                .try_fold(0u64, |sum, &n| sum.checked_add(n as u64));
            match neurons {
                Some(neurons) if neurons <= NEURONS => Ok(wiring),
                _ => Err(format!("expected at most {NEURONS} neurons in all")),
            }
        }
        _ => Ok(wiring),
    }
}

fn read_out(name: &str) -> Result<ReadOut, String> {
    names::parse(name, &names::words(&ReadOut::names()))
}

fn scope(name: &str) -> Result<Scope, String> {
    names::parse(name, &names::words(&Scope::names()))
}

fn compete(name: &str) -> Result<Compete, String> {
    names::parse(name, &names::words(&Compete::names()))
}

fn augment(name: &str) -> Result<Augment, String> {
    names::parse(name, &names::words(&Augment::names()))
}

fn stored(name: &str) -> Result<Stored, String> {
    names::parse(name, &names::words(&Stored::names()))
}

/// Numbers that are separated by a character, each at least 1 and at most `most`.
fn numbers(text: &str, separator: char, most: u64) -> Option<Vec<usize>> {
    let number = up_to(most);
    text.split(separator).map(|n| number(n).ok()).collect()
}

fn hidden(text: &str) -> Result<Layers, String> {
    let expected = || {
        format!(
            "expected sizes of layers, each at least 1 and at most {NEURONS}, such as 128 or 64+64"
        )
    };
    numbers(text, '+', NEURONS).map(Layers).ok_or_else(expected)
}

fn sizes(text: &str) -> Result<Sizes, String> {
    match numbers(text, ',', EXAMPLES).as_deref() {
        Some(&[train, valid, test]) => Ok(Sizes { train, valid, test }),
        _ => Err(format!(
            "expected three numbers of examples, each at least 1 and at most {EXAMPLES}: training, validation, test"
        )),
    }
}

fn finetune_epochs(text: &str) -> Result<usize, String> {
    match text {
        "0" => Ok(0),
        _ => up_to(EPOCHS)(text).map_err(|_| format!("expected a whole number, at most {EPOCHS}")),
    }
}

/// A fraction above 0 and at most 1.
fn share(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(share) if share > 0.0 && share <= 1.0 => Ok(share),
        _ => Err("expected a fraction, above 0 and at most 1".into()),
    }
}

fn ridge(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(ridge) if f64::is_finite(ridge) && ridge >= 0.0 => Ok(ridge),
        _ => Err("expected a finite number, at least 0".into()),
    }
}

impl LatticeArgs {
    /// Whether one of the methods that run satisfies a condition.
    fn runs(&self, condition: impl Fn(Method) -> bool) -> bool {
        match self.method.as_slice() {
            [] => true,
            methods => methods.iter().any(|&m| condition(m)),
        }
    }

    fn repairs(&self, repair: Repair) -> bool {
        self.repair.is_empty() || self.repair.contains(&repair)
    }

    /// Why the flags cannot be used together, or not by this suite.
    pub(super) fn refused(&self, common: &CommonArgs) -> Option<String> {
        let Self {
            pruning,
            training,
            checkpoint,
            ..
        } = self;
        let not_common = [
            (
                common.device != Device::Cpu,
                "--device: eval lattice computes on the processor only",
            ),
            (
                common.window.is_some(),
                "--window: eval lattice reads no windows of tokens",
            ),
            (
                common.samples.is_some(),
                "--samples: eval lattice evaluates on the whole test split; --examples sets its size",
            ),
            (
                checkpoint.save.is_some() && common.cells.is_some(),
                "--save: networks are not kept in --cells, only rows",
            ),
        ];
        let by_gate = |m: Method| {
            m.block().is_some()
                || (m == Method::Magnitude
                    && pruning.compete.unwrap_or_default() == Compete::PerGate)
        };
        let ranks = self.runs(Method::ranks_neurons);
        let tasks = || self.task.iter().flat_map(|tasks| &tasks.0);
        let without_effect = [
            (
                pruning.compete.is_some() && !self.runs(|m| m == Method::Magnitude),
                "--compete: method magnitude does not run",
            ),
            (
                pruning.densities.is_some() && !self.runs(by_gate),
                "--densities: no method that prunes by gate runs (magnitude with --compete per-gate, or blocks)",
            ),
            (
                pruning.keep_diagonal
                    && !(self.runs(|m| m.block().is_some())
                        && pruning.scope.unwrap_or_default().recurrent()),
                "--keep-diagonal: no method of blocks prunes W_hh",
            ),
            (
                pruning.rewire.is_some() && !self.runs(|m| m == Method::Ws),
                "--rewire: method ws does not run",
            ),
            (
                pruning.ridge.is_some()
                    && !self.repairs(Repair::Refit)
                    && !self.repairs(Repair::Merge),
                "--ridge: neither refit nor merge is among the repairs",
            ),
            (
                pruning.no_constant && !self.repairs(Repair::Refit),
                "--no-constant: refit is not among the repairs",
            ),
            (
                pruning.merge_passes.get() > 1 && !(self.repairs(Repair::Merge) && ranks),
                "--merge-passes: no method that ranks neurons runs with the repair merge",
            ),
            (
                pruning.gradual.is_some() && self.finetune_epochs == Some(0),
                "--gradual: there is no fine-tuning",
            ),
            (
                training.augment.is_some()
                    && (self.task.is_empty() || !tasks().all(Task::has_images)),
                "--augment: only MNIST has images that are deformed in training",
            ),
            (
                training.examples.is_some()
                    && (checkpoint.vocab.is_some() || !tasks().all(Task::has_sizes)),
                "--examples: texts and recorded clips are taken whole",
            ),
        ];
        let refused = not_common.into_iter().chain(without_effect);
        let mut reasons = refused.filter(|(is_refused, _)| *is_refused);
        reasons
            .next()
            .map(|(_, reason)| reason.to_owned())
            .or_else(|| self.repeated().err().map(|error| error.to_string()))
            .or_else(|| self.refused_method())
    }

    /// Each value of a list may stand once.
    fn repeated(&self) -> anyhow::Result<()> {
        once("--task", self.task.iter().flat_map(|tasks| &tasks.0))?;
        once("--cell", self.cell.iter())?;
        once("--method", self.method.iter())?;
        once("--sparsity", self.sparsity.iter())?;
        once("--repair", self.repair.iter())
    }

    /// A method that was asked for by name and cannot run.
    fn refused_method(&self) -> Option<String> {
        let named = |condition: &dyn Fn(Method) -> bool| {
            self.method.iter().copied().find(|&m| condition(m))
        };
        let wiring = self.training.wiring.as_ref();
        let wired = wiring.filter(|wiring| **wiring != WiringKind::Full);
        if let (Some(wiring), Some(method)) = (wired, named(&Method::needs_all_connections)) {
            return Some(format!(
                "--method {method}: it chooses among all connections, which --wiring {wiring} does not have"
            ));
        }
        let scope = self.pruning.scope.filter(|scope| scope.input());
        let graph = scope.zip(named(&Method::draws_graph))?;
        Some(format!(
            "--method {}: it draws a graph for W_hh and cannot prune --scope {}",
            graph.1, graph.0
        ))
    }

    pub(super) fn config(self, seed: u64) -> lattice::Config {
        let Self {
            pruning,
            training,
            checkpoint,
            ..
        } = self;
        let noise = checkpoint.weights.as_ref().is_some_and(|file| {
            let extension = file.extension().and_then(|e| e.to_str());
            !matches!(extension, Some("onnx" | "safetensors"))
        });
        let data = checkpoint.vocab.zip(checkpoint.text);
        let save = checkpoint.save.map(|folder| lattice::SaveConfig {
            folder,
            stored: checkpoint.save_as.unwrap_or_default(),
        });
        let network = checkpoint.weights.map(|weights| lattice::CheckpointConfig {
            weights,
            node: checkpoint.node,
            read_out: checkpoint.read_out,
            activation: checkpoint.read_out_activation.unwrap_or_default(),
            characters: data.map(|(vocab, text)| lattice::Characters { vocab, text }),
            save,
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
            if let Some(densities) = &pruning.densities {
                // Methods without gates prune as much on the whole.
                c.sparsities = vec![1.0 - densities.iter().sum::<f64>() / densities.len() as f64];
            }
            if !self.repair.is_empty() {
                c.repairs = self.repair;
            }
            let epochs = if noise { 0 } else { c.finetune_epochs };
            c.finetune_epochs = self.finetune_epochs.unwrap_or(epochs);
            c.scope = pruning.scope.unwrap_or_default();
            c.compete = pruning.compete.unwrap_or_default();
            c.densities = pruning.densities;
            c.keep_diagonal = pruning.keep_diagonal;
            c.weigh_inputs = pruning.weigh_inputs;
            c.rewire = pruning.rewire.unwrap_or(c.rewire);
            if noise {
                c.refit = refit_config();
            }
            c.refit.constant &= !pruning.no_constant;
            c.refit.ridge = pruning.ridge.unwrap_or(c.refit.ridge);
            c.merge.ridge = pruning.ridge.unwrap_or(c.merge.ridge);
            c.merge.passes = pruning.merge_passes.get();
            c.gradual = pruning.gradual.map(|until| Ramp {
                until,
                every: pruning.gradual_every.get(),
            });
            c.wiring = training.wiring.unwrap_or_default();
            c.hidden = training.hidden.map(|layers| layers.0);
            c.epochs = training.epochs.map(NonZeroUsize::get);
            c.sizes = training.examples;
            c.augment = training.augment;
        });
        lattice::Config {
            checkpoint: network,
            structures: training.structures.map(NonZeroUsize::get),
            ..lattice::Config::new(experiment, seed, self.seeds.get())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_of_a_list_of_tasks_may_have_commas_and_neighbours() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name).display().to_string();
        let (plain, odd) = (path("text"), path("a,b:c"));
        for file in [&plain, &odd] {
            std::fs::write(file, "text").unwrap();
        }
        for list in [
            format!("mod3,text:{plain}"),
            format!("text:{odd},mod3"),
            format!("mod3,text:{odd},vad:{}", dir.path().display()),
            format!("text:{plain},text:{odd}"),
        ] {
            let Tasks(tasks) = tasks(&list).unwrap();
            let names: Vec<String> = tasks.iter().map(Task::to_string).collect();
            assert_eq!(names.join(","), list);
            let count = list.matches("text:").count() + list.matches("mod3").count();
            assert_eq!(tasks.len(), count + list.matches("vad:").count());
        }
    }
}
