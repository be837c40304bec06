//! What was measured, as plain rows.

use super::Repair;
use crate::{
    cell::Cell,
    exact::Counts,
    names::named,
    prune::{Method, Sparsity},
    rnn::Evaluation,
};
use serde::{Deserialize, Serialize};
use std::fmt;

/// When a row's numbers were taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Stage {
    /// Right after pruning.
    OneShot,
    /// After fine-tuning under the mask.
    FineTuned,
    /// After fine-tuning in which the sparsity rose gradually.
    Gradual,
    /// Trained from fresh weights under the mask, with the full training budget (`zero-whh` only: what the task needs of
    /// recurrent weights at all).
    FromScratch,
}

/// What the order looked like over the cuts of a lattice method.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct OrderSummary {
    /// Cuts tried.
    pub cuts: usize,
    /// Cuts whose order was degenerate and did not count.
    pub degenerate_cuts: usize,
    /// Smallest and largest number of classes.
    pub classes: (usize, usize),
    /// Smallest and largest size of the largest class.
    pub largest_class: (usize, usize),
    /// Smallest and largest number of irreducible neurons.
    pub irreducible: (usize, usize),
}

/// What can be removed from a network without changing its function.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExactRemoval {
    /// Neurons by the reason; dead and unheard ones are removed.
    pub neurons: Counts,
    /// Weights that exist and are not masked after the removal.
    pub params: usize,
    /// Neurons that are equal to another one for ever.
    pub equal: usize,
}

/// What a pruned network keeps of the connectivity of the dense one.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Connectivity {
    /// Similarity of the correlations between states on test examples, over all neurons that both networks have.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub functional: Option<f64>,
    /// The same over the neurons that the method keeps.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub functional_kept: Option<f64>,
    /// Share of the ordered pairs still reachable, at a mean out-degree of 1; absent for networks with removed neurons.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reach: Option<f64>,
    /// At a mean out-degree of 2.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reach_2: Option<f64>,
}

/// One measurement. A field that was not measured is absent.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// `lattice`
    pub suite: String,
    /// Task, or name of the checkpoint.
    pub task: String,
    /// Cell.
    pub cell: Cell,
    /// Hidden sizes.
    pub hidden: Vec<usize>,
    /// Method.
    pub method: Method,
    /// Sparsity asked for.
    pub sparsity: f64,
    /// Sparsity reached by the network that was measured, over three denominators; neurons that are gone count.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reached: Option<Sparsity>,
    /// Neurons of each layer (of the wiring, where there is one) that a merged network still has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub neurons: Option<Vec<usize>>,
    /// Seed of whatever the method draws, and of fine-tuning.
    pub seed: u64,
    /// Seed that the network before pruning was trained with; absent for a network from a file. Rows of one network are not
    /// independent of each other.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<u64>,
    /// One-shot, fine-tuned or trained from scratch.
    pub stage: Stage,
    /// What was done after pruning.
    #[serde(default)]
    pub repair: Repair,
    /// Passes of fine-tuning behind the numbers.
    pub finetune_epochs: usize,
    /// Mean cross-entropy in nats, or squared error, on the test split.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss: Option<f64>,
    /// Of the unpruned network.
    pub loss_dense: f64,
    /// The loss on the validation split.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub validation: Option<f64>,
    /// Cross-entropy in bits per character, for texts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bits: Option<f64>,
    /// Of the unpruned network.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bits_dense: Option<f64>,
    /// Share of right answers on the test split; absent for regression.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub accuracy: Option<f64>,
    /// Of the unpruned network.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub accuracy_dense: Option<f64>,
    /// Area under the ROC curve on the test split, for decisions at every step.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub auc: Option<f64>,
    /// Of the unpruned network.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub auc_dense: Option<f64>,
    /// Weights that exist and are not masked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub params: Option<usize>,
    /// Of the unpruned network.
    pub params_dense: usize,
    /// Neurons of the network that was measured without recurrent connections.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dead: Option<usize>,
    /// Spectral radius of its influence matrices, layer by layer.
    pub spectral_radius: Vec<f64>,
    /// What is kept of the connectivity; for rows right after pruning.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub connectivity: Option<Connectivity>,
    /// Quality with weights and states of 8 bits, for blocks that have a kernel; for rows right after pruning.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub int8: Option<Evaluation>,
    /// What can be removed from the masked network without changing it; for rows right after pruning.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exact: Option<ExactRemoval>,
    /// The order, for lattice methods.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub order: Option<OrderSummary>,
    /// Wall-clock time: of scoring, choosing, repairing and evaluating, or of fine-tuning and evaluating.
    pub seconds: f64,
    /// Why the method could not be carried out (a degenerate order); loss and accuracy are absent then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// A method with what is done after it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Treatment {
    /// The method.
    pub method: Method,
    /// The repair.
    pub repair: Repair,
}

impl Treatment {
    /// A method with a repair.
    pub const fn new(method: Method, repair: Repair) -> Self {
        Self { method, repair }
    }
}

impl fmt::Display for Treatment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.repair {
            Repair::None => f.pad(self.method.name()),
            repair => f.pad(&format!("{} + {repair}", self.method)),
        }
    }
}

impl Row {
    /// What was done to the network.
    pub fn treatment(&self) -> Treatment {
        Treatment::new(self.method, self.repair)
    }
}

named! {
    /// The number that quality is judged by.
    pub enum Metric as "metric" {
        /// Share of right answers.
        Accuracy = "accuracy",
        /// Area under the ROC curve.
        Auc = "AUC",
        /// Cross-entropy of a text in bits per character.
        Bits = "bits",
        /// Mean loss.
        Loss = "loss",
    }
}

impl Metric {
    /// That of a task, by what its rows have: bits of texts, the area under the curve of decisions at every step, accuracy of
    /// classes, the loss of regression.
    pub fn of_rows<'a>(rows: impl IntoIterator<Item = &'a Row>) -> Self {
        let of = |row: &Row| match row {
            Row { bits: Some(_), .. } => Metric::Bits,
            Row { auc: Some(_), .. } => Metric::Auc,
            Row {
                accuracy: Some(_), ..
            } => Metric::Accuracy,
            _ => Metric::Loss,
        };
        let order = [Metric::Bits, Metric::Auc, Metric::Accuracy];
        let found: Vec<Metric> = rows.into_iter().map(of).collect();
        let first = order.into_iter().find(|m| found.contains(m));
        first.unwrap_or(Metric::Loss)
    }

    /// Its value in an evaluation.
    pub fn of_evaluation(self, evaluation: &Evaluation) -> Option<f64> {
        match self {
            Metric::Accuracy => evaluation.accuracy,
            Metric::Auc => evaluation.auc,
            Metric::Bits => Some(evaluation.bits()),
            Metric::Loss => Some(evaluation.loss),
        }
    }

    /// Its value in a row.
    pub fn of(self, row: &Row) -> Option<f64> {
        match self {
            Metric::Accuracy => row.accuracy,
            Metric::Auc => row.auc,
            Metric::Bits => row.bits,
            Metric::Loss => row.loss,
        }
    }

    /// Whether more is better.
    pub fn more_is_better(self) -> bool {
        matches!(self, Metric::Accuracy | Metric::Auc)
    }

    /// A value as text: accuracies in percent.
    pub fn text(self, value: f64) -> String {
        match self {
            Metric::Accuracy => format!("{:.1} %", 100.0 * value),
            Metric::Auc => format!("{value:.4}"),
            Metric::Bits => format!("{value:.3} bits"),
            Metric::Loss => format!("{value:.4}"),
        }
    }
}
