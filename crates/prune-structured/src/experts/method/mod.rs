//! Methods that choose which experts stay.
//!
//! Most score experts one by one; of equal scores the lower number stays. All sums are over every token of every window,
//! of the model as it is in front of the layer.

mod aimer;
mod drop;
mod drop_greedy;
mod ean;
mod frequency;
mod gate_sum;
mod hc_smoe;
mod m_smoe;
mod man;
mod mone;
mod msan;
mod naee;
mod prob_sum;
mod random;
mod reap;
pub(crate) mod stun;
mod stun_compat;

use super::layer::Layer;
use super::plan::Member;
use crate::Result;
use crate::methods::methods;

pub use aimer::Aimer;
pub use drop::OutputChange;
#[cfg(test)]
pub(crate) use drop::changes as drop_changes;
pub use drop_greedy::GreedyDrop;
pub use ean::Ean;
pub use frequency::Frequency;
pub use gate_sum::GateSum;
pub use hc_smoe::HcSmoe;
pub use m_smoe::MSmoe;
pub use man::Man;
pub use mone::Mone;
pub use msan::Msan;
pub use naee::Naee;
#[cfg(test)]
pub(crate) use naee::errors_of as naee_errors;
pub use prob_sum::ProbSum;
pub use random::RandomExperts;
pub use reap::Reap;
pub use stun::{Reconstruct, Representative, Stun};
pub use stun_compat::StunCompat;

methods! {
    /// How experts are chosen; g are gates as the layer uses them, f outputs, n the tokens that chose an expert.
    pub enum ExpertMethod: Choosing {
        /// Mean over an expert's tokens of `g ‖f‖` (REAP, arXiv 2510.13999, eq. 9).
        "reap" => Reap(Reap),
        /// n.
        "frequency" => Frequency(Frequency),
        /// Σ g over an expert's tokens.
        "gate-sum" => GateSum(GateSum),
        /// Σ over all tokens of the softmax over all experts.
        "prob-sum" => ProbSum(ProbSum),
        /// Σ ‖f‖ over an expert's tokens.
        "ean" => Ean(Ean),
        /// Mean of ‖f‖ over an expert's tokens.
        "man" => Man(Man),
        /// Mean of ‖f‖² over an expert's tokens.
        "msan" => Msan(Msan),
        /// Standard deviation of f times the mean gate (MoNE, arXiv 2507.00390).
        "mone" => Mone(Mone),
        /// How unevenly an expert's weights are spread (AIMER, arXiv 2603.18492). Reads no text.
        "aimer" => Aimer(Aimer),
        /// Mean squared change of the layer's output when the expert alone is dropped.
        "drop" => OutputChange(OutputChange),
        /// One expert after the other, each time the one whose absence changes the layer's output least.
        "drop-greedy" => GreedyDrop(GreedyDrop),
        /// The subset with the smallest squared change of the layer's output, by trying all (NAEE, arXiv 2402.14800).
        "naee" => Naee(Naee),
        /// Clusters of experts with similar router rows, one kept of each (STUN, arXiv 2409.06211), as many as wanted.
        "stun" => Stun(Stun),
        /// The same by the published rule, whose threshold is searched for each layer.
        "stun-compat" => StunCompat(StunCompat),
        /// Clusters of experts with similar mean outputs, merged (HC-SMoE, arXiv 2410.08589).
        "hc-smoe" => HcSmoe(HcSmoe),
        /// Rare experts merged into the frequent one with the most similar router logits (M-SMoE, arXiv 2310.01334).
        "m-smoe" => MSmoe(MSmoe),
        /// Uniform random numbers.
        "random" => Random(RandomExperts),
    }
}

/// Experts that stay.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Choice {
    /// Ascending numbers.
    pub(crate) kept: Vec<usize>,
    /// For each of them what its weights are made of; nothing: they are its own.
    pub(crate) members: Vec<Vec<Member>>,
    /// A score of each expert, where the method has one.
    pub(crate) scores: Vec<f64>,
    /// Clusters of experts of which one stays, where the method makes them.
    pub(crate) clusters: Vec<Vec<usize>>,
    /// For each expert the place in `kept` that its router row stands for from now on; empty where the rows of `kept` alone stay.
    pub(crate) rows: Vec<usize>,
}

impl From<Vec<usize>> for Choice {
    fn from(mut kept: Vec<usize>) -> Self {
        kept.sort_unstable();
        Self {
            members: vec![vec![]; kept.len()],
            kept,
            ..Self::default()
        }
    }
}

impl ExpertMethod {
    /// Whether it reads more of a layer than weights and router rows.
    pub(crate) fn reads_layers(&self) -> bool {
        match self {
            Self::Random(_) | Self::Aimer(_) => false,
            _ => self.stun().is_none_or(Stun::reads_layers),
        }
    }

    /// STUN's clusters, where it makes them.
    pub(crate) fn stun(&self) -> Option<&Stun> {
        match self {
            Self::Stun(stun) | Self::StunCompat(StunCompat { stun }) => Some(stun),
            _ => None,
        }
    }

    /// Whether it may put neurons in another order where it keeps so many experts.
    pub(crate) fn aligns(&self, kept: usize) -> bool {
        match self {
            Self::HcSmoe(method) => method.align,
            Self::MSmoe(method) => method.align,
            _ => self
                .stun()
                .is_some_and(|stun| stun.reconstruct.averages(2, kept)),
        }
    }

    /// The same, to be changed.
    pub(crate) fn stun_mut(&mut self) -> Option<&mut Stun> {
        match self {
            Self::Stun(stun) | Self::StunCompat(StunCompat { stun }) => Some(stun),
            _ => None,
        }
    }
}

/// What a method has to say.
pub(crate) trait Choosing {
    /// A score for each expert; higher is kept. Methods that choose otherwise have none.
    fn scores(&self, _layer: &Layer<'_>) -> Result<Vec<f64>> {
        Ok(vec![])
    }

    /// Whether the router rows of merged experts stay.
    fn ties(&self) -> bool {
        false
    }

    /// The `keep` experts that stay.
    fn choose(&self, layer: &Layer<'_>, keep: usize) -> Result<Choice> {
        let scores = self.scores(layer)?;
        Ok(Choice {
            scores: scores.clone(),
            ..best(&scores, keep).into()
        })
    }
}

/// The numbers of the highest scores; of equal ones the lower number.
pub(crate) fn best(scores: &[f64], keep: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]).then(a.cmp(&b)));
    order.truncate(keep);
    order
}

/// A score of each expert's statistics.
fn each(layer: &Layer<'_>, score: impl Fn(&super::ExpertStatistics) -> f64) -> Vec<f64> {
    layer.statistics.experts.iter().map(score).collect()
}

/// A sum by the number of tokens; 0 for an expert without any.
fn mean(sum: f64, count: usize) -> f64 {
    match count {
        0 => 0.0,
        count => sum / count as f64,
    }
}
