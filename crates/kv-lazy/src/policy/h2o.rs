//! H2O (Zhang et al., arXiv 2306.14048): heavy hitters, the tokens with the largest attention received so far.
//!
//! The sum favours old tokens, who were seen by more queries: under uniform attention the i-th token holds H_t − H_{i−1}
//! (harmonic numbers). The mean divides by the number of queries that could see the token.

use super::config::RATIO_WINDOW;
use super::{Budget, Clock, Needs, Phase, Place, Policy, Prompt, Rows, Rule, Score, Seen, Tunable};
use crate::attention::WeightKinds;
use crate::error::Result;
use crate::store::Relocation;
use serde::{Deserialize, Serialize};

/// How attention received becomes a score.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Normalise {
    /// The sum over all queries, as the authors have it.
    #[default]
    Sum,
    /// The sum divided by the queries that could see the token.
    Mean,
}

/// Settings of [`H2o`].
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default, deny_unknown_fields)]
#[non_exhaustive]
pub struct Settings {
    /// Newest tokens kept; unset: half the budget, 32 for a ratio.
    pub recent: Option<usize>,
    /// Sum or mean of the attention received.
    pub normalise: Normalise,
}

impl Tunable for Settings {}

pub(super) fn build(settings: &Settings, budget: Budget) -> Result<Box<dyn Policy>> {
    let half = match budget {
        Budget::Tokens(tokens) => tokens / 2,
        Budget::Ratio(_) => RATIO_WINDOW,
    };
    let recent = settings.recent.unwrap_or(half);
    Ok(Box::new(H2o::new(recent, settings.normalise)))
}

/// Largest accumulated attention, plus the newest tokens.
#[derive(Debug, Clone)]
pub struct H2o {
    /// Newest tokens kept; the authors give them half the budget.
    pub recent: usize,
    /// Sum or mean.
    pub normalise: Normalise,
    received: Vec<Vec<f32>>,
}

impl H2o {
    /// Keeps the newest `recent` tokens beside the heavy hitters.
    pub fn new(recent: usize, normalise: Normalise) -> Self {
        Self {
            recent,
            normalise,
            received: Vec::new(),
        }
    }
}

impl Policy for H2o {
    fn name(&self) -> &'static str {
        "h2o"
    }
    fn needs(&self) -> Needs {
        Needs::weights(WeightKinds::COLUMNS)
    }
    fn comparable(&self) -> bool {
        self.normalise == Normalise::Mean
    }
    fn rule(&self, _: Phase) -> Rule {
        Rule {
            recent: self.recent,
            prompt: Prompt::Evictable,
            ..Rule::STEPWISE
        }
    }
    fn start(&mut self, place: Place) {
        self.received = vec![Vec::new(); place.heads];
    }
    fn append(&mut self, clock: &Clock) {
        for received in &mut self.received {
            received.resize(received.len() + clock.tokens as usize, 0.0);
        }
    }
    fn observe(&mut self, head: usize, seen: Seen<'_>, _: &Clock) {
        for (sum, weight) in self.received[head].iter_mut().zip(seen.weights) {
            *sum += weight;
        }
    }
    fn score(
        &mut self,
        head: usize,
        rows: &dyn Rows,
        clock: &Clock,
        scores: &mut [Score],
    ) -> Result<()> {
        for ((score, &sum), &id) in scores
            .iter_mut()
            .zip(&self.received[head])
            .zip(rows.ids(head))
        {
            score.value = match self.normalise {
                Normalise::Sum => sum,
                Normalise::Mean => sum / (clock.next - id) as f32,
            };
        }
        Ok(())
    }
    fn relocate(&mut self, head: usize, moves: &Relocation) {
        moves.apply(&mut self.received[head], 1);
    }
    fn state_bytes(&self) -> usize {
        self.received.iter().map(|r| r.len() * 4).sum()
    }
    fn boxed_clone(&self) -> Box<dyn Policy> {
        Box::new(self.clone())
    }
}
