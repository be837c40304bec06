//! What is known of experts after one pass of windows.

use super::routing::{logits, softmax};
use causal_lm::mixture::Routing;
use serde::{Deserialize, Serialize};

/// Sums over the tokens that chose an expert; f are its outputs, g its gates.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ExpertStatistics {
    /// Tokens.
    pub count: usize,
    /// Σ g.
    pub gates: f64,
    /// Σ of the softmax over all experts, over all tokens.
    pub probabilities: f64,
    /// Σ ‖f‖.
    pub norms: f64,
    /// Σ ‖f‖².
    pub squares: f64,
    /// Σ g ‖f‖.
    pub gated_norms: f64,
    /// Σ f, channel by channel.
    #[serde(skip)]
    pub sum: Vec<f64>,
}

/// Statistics of the experts of one layer.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct LayerStatistics {
    /// Tokens of all windows.
    pub tokens: usize,
    /// Each expert.
    pub experts: Vec<ExpertStatistics>,
    /// For each pair of experts, row by row, the tokens that chose both.
    pub together: Vec<u64>,
}

impl ExpertStatistics {
    /// Adds tokens that chose the expert: gates, and outputs of `width` channels each.
    pub(crate) fn add(&mut self, gates: &[f32], outputs: &[f32], width: usize) {
        self.sum.resize(width, 0.0);
        for (&gate, output) in gates.iter().zip(outputs.chunks(width)) {
            let square: f64 = output.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
            let gate = f64::from(gate);
            self.count += 1;
            self.gates += gate;
            self.norms += square.sqrt();
            self.squares += square;
            self.gated_norms += gate * square.sqrt();
            for (sum, &x) in self.sum.iter_mut().zip(output) {
                *sum += f64::from(x);
            }
        }
    }

    /// Mean output; zeros for an expert that no token chose.
    pub fn mean(&self) -> Vec<f64> {
        let count = self.count.max(1) as f64;
        self.sum.iter().map(|sum| sum / count).collect()
    }

    /// Unbiased variance of the output, summed over channels; 0 for fewer than two tokens.
    pub fn variance(&self) -> f64 {
        if self.count < 2 {
            return 0.0;
        }
        let count = self.count as f64;
        let of_mean: f64 = self.sum.iter().map(|sum| sum * sum).sum::<f64>() / count;
        ((self.squares - of_mean) / (count - 1.0)).max(0.0)
    }
}

impl LayerStatistics {
    pub(crate) fn new(experts: usize) -> Self {
        Self {
            tokens: 0,
            experts: vec![ExpertStatistics::default(); experts],
            together: vec![0; experts * experts],
        }
    }

    /// Adds what the router made of some tokens.
    pub(crate) fn add_routing(&mut self, routing: &Routing) {
        let experts = self.experts.len();
        self.tokens += routing.tokens();
        for token in 0..routing.tokens() {
            for (expert, p) in self.experts.iter_mut().zip(softmax(logits(routing, token))) {
                expert.probabilities += p;
            }
            let ids = &routing.ids[token * routing.chosen..][..routing.chosen];
            for (at, &a) in ids.iter().enumerate() {
                for &b in &ids[at + 1..] {
                    let (a, b) = (a as usize, b as usize);
                    self.together[a * experts + b] += 1;
                    self.together[b * experts + a] += 1;
                }
            }
        }
    }

    /// Smallest and median number of tokens of an expert.
    pub fn tokens_per_expert(&self) -> (usize, usize) {
        let mut counts: Vec<usize> = self.experts.iter().map(|e| e.count).collect();
        counts.sort_unstable();
        let median = counts.get(counts.len() / 2).copied().unwrap_or(0);
        (counts.first().copied().unwrap_or(0), median)
    }

    /// Tokens of the most used expert, in units of what each would get if all were used equally; 0 without tokens.
    pub fn imbalance(&self) -> f64 {
        let all: usize = self.experts.iter().map(|expert| expert.count).sum();
        let most = self.experts.iter().map(|expert| expert.count).max();
        most.unwrap_or(0) as f64 * self.experts.len() as f64 / all.max(1) as f64
    }

    /// Experts that fewer than `tokens` tokens chose.
    pub fn rarer_than(&self, tokens: usize) -> usize {
        let rare = self.experts.iter().filter(|expert| expert.count < tokens);
        rare.count()
    }
}
