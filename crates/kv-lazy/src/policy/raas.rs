//! RaaS (Hu et al., arXiv 2502.11147): least recently activated leaves first, the prompt stays.
//!
//! A generated token's timestamp is refreshed whenever its weight passes the threshold; over budget the oldest
//! timestamp is evicted. The paper's page variant is not implemented.

use super::{
    Budget, Clock, Needs, Phase, Place, Policy, Prompt, Rows, Rule, Score, Seen, Threshold, Tunable,
};
use crate::attention::{Reduce, WeightKinds};
use crate::error::Result;
use crate::store::Relocation;
use serde::{Deserialize, Serialize};

/// Settings of [`Raas`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default, deny_unknown_fields)]
#[non_exhaustive]
pub struct Settings {
    /// When a token counts as used; α = 1e-4.
    pub threshold: Threshold,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            threshold: Threshold::Absolute(1e-4),
        }
    }
}

impl Tunable for Settings {
    fn threshold(&mut self) -> Option<&mut Threshold> {
        Some(&mut self.threshold)
    }
}

pub(super) fn build(settings: &Settings, _: Budget) -> Result<Box<dyn Policy>> {
    settings.threshold.check()?;
    Ok(Box::new(Raas::new(settings.threshold)))
}

/// Least recently used, by attention.
#[derive(Debug, Clone)]
pub struct Raas {
    /// When a token counts as used.
    pub threshold: Threshold,
    used: Vec<Vec<u32>>,
}

impl Raas {
    /// Tokens above `threshold` count as used.
    pub fn new(threshold: Threshold) -> Self {
        Self {
            threshold,
            used: Vec::new(),
        }
    }
}

impl Policy for Raas {
    fn name(&self) -> &'static str {
        "raas"
    }
    fn needs(&self) -> Needs {
        Needs::decode(WeightKinds::last(Reduce::Max))
    }
    fn rule(&self, _: Phase) -> Rule {
        Rule {
            prompt: Prompt::Keep,
            ..Rule::STEPWISE
        }
    }
    fn start(&mut self, place: Place) {
        self.used = vec![Vec::new(); place.heads];
    }
    fn append(&mut self, clock: &Clock) {
        for used in &mut self.used {
            used.extend(clock.births());
        }
    }
    fn observe(&mut self, head: usize, seen: Seen<'_>, clock: &Clock) {
        let weights = seen.weights;
        let level = self.threshold.level(weights);
        for (used, &weight) in self.used[head].iter_mut().zip(weights) {
            *used = if weight > level { clock.step } else { *used };
        }
    }
    fn score(&mut self, head: usize, _: &dyn Rows, _: &Clock, scores: &mut [Score]) -> Result<()> {
        for (score, &used) in scores.iter_mut().zip(&self.used[head]) {
            score.tie = used;
        }
        Ok(())
    }
    fn relocate(&mut self, head: usize, moves: &Relocation) {
        moves.apply(&mut self.used[head], 1);
    }
    fn state_bytes(&self) -> usize {
        self.used.iter().map(|u| u.len() * 4).sum()
    }
    fn boxed_clone(&self) -> Box<dyn Policy> {
        Box::new(self.clone())
    }
}
