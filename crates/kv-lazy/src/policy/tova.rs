//! TOVA (Oren et al., arXiv 2401.06104): at each step drop the token that the last query attends least.
//!
//! The weights are averaged over all query heads of the layer, so that all heads keep the same tokens; nothing is
//! protected, not even the newest token.

use super::{Budget, Clock, Needs, Phase, Place, Policy, Rows, Rule, Score, Seen, Tunable};
use crate::attention::{Reduce, WeightKinds};
use crate::error::Result;
use crate::store::Relocation;
use serde::{Deserialize, Serialize};

/// There is nothing to set.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct Settings {}

impl Tunable for Settings {}

pub(super) fn build(_: &Settings, _: Budget) -> Result<Box<dyn Policy>> {
    Ok(Box::<Tova>::default())
}

/// The last query's weights, averaged over the layer's heads.
#[derive(Debug, Clone, Default)]
pub struct Tova {
    heads: usize,
    mean: Vec<f32>,
}

impl Policy for Tova {
    fn name(&self) -> &'static str {
        "tova"
    }
    fn needs(&self) -> Needs {
        Needs::weights(WeightKinds::last(Reduce::Mean)).for_all_heads()
    }
    fn rule(&self, _: Phase) -> Rule {
        Rule::STEPWISE
    }
    fn start(&mut self, place: Place) {
        self.heads = place.heads;
    }
    fn append(&mut self, clock: &Clock) {
        self.mean
            .resize(self.mean.len() + clock.tokens as usize, 0.0);
    }
    fn observe(&mut self, head: usize, seen: Seen<'_>, _: &Clock) {
        if head == 0 {
            self.mean.fill(0.0);
        }
        let share = 1.0 / self.heads as f32;
        for (mean, weight) in self.mean.iter_mut().zip(seen.weights) {
            *mean += share * weight;
        }
    }
    fn score(&mut self, _: usize, _: &dyn Rows, _: &Clock, scores: &mut [Score]) -> Result<()> {
        for (score, &mean) in scores.iter_mut().zip(&self.mean) {
            score.value = mean;
        }
        Ok(())
    }
    fn relocate(&mut self, head: usize, moves: &Relocation) {
        // All heads hold the same tokens in the same slots.
        if head == 0 {
            moves.apply(&mut self.mean, 1);
        }
    }
    fn state_bytes(&self) -> usize {
        self.mean.len() * 4
    }
    fn boxed_clone(&self) -> Box<dyn Policy> {
        Box::new(self.clone())
    }
}
