//! Random eviction with the prompt kept: the baseline that every scorer must beat.
//!
//! Uniform per head; the draw is a function of (seed, layer, sequence, head, step, token), so that a run can be repeated, a
//! snapshot needs no generator state and slots do not matter.

use super::draw::Draw;
use super::{Budget, Clock, Phase, Place, Policy, Prompt, Rows, Rule, Score, Tunable};
use crate::error::Result;
use serde::{Deserialize, Serialize};

/// Settings of [`Random`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default, deny_unknown_fields)]
#[non_exhaustive]
pub struct Settings {
    /// Seed of the draw; 0.
    pub seed: u64,
    /// Whether the prompt is kept; it is.
    pub protect_prompt: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            seed: 0,
            protect_prompt: true,
        }
    }
}

impl Tunable for Settings {
    fn seed(&mut self) -> Option<&mut u64> {
        Some(&mut self.seed)
    }
}

pub(super) fn build(settings: &Settings, _: Budget) -> Result<Box<dyn Policy>> {
    Ok(Box::new(Random::new(
        settings.seed,
        settings.protect_prompt,
    )))
}

/// Uniformly random among what is not protected.
#[derive(Debug, Clone, Copy)]
pub struct Random {
    /// Seed of the request.
    pub seed: u64,
    /// Whether the prompt stays.
    pub protect_prompt: bool,
    place: Place,
}

impl Random {
    /// Draws from `seed`.
    pub fn new(seed: u64, protect_prompt: bool) -> Self {
        Self {
            seed,
            protect_prompt,
            place: Place::default(),
        }
    }
}

impl Policy for Random {
    fn name(&self) -> &'static str {
        "random"
    }
    fn rule(&self, _: Phase) -> Rule {
        let prompt = if self.protect_prompt {
            Prompt::Keep
        } else {
            Prompt::Evictable
        };
        // The newest token would otherwise leave before the next query could see it.
        Rule {
            prompt,
            recent: 1,
            ..Rule::STEPWISE
        }
    }
    fn start(&mut self, place: Place) {
        self.place = place;
    }
    fn score(
        &mut self,
        head: usize,
        rows: &dyn Rows,
        clock: &Clock,
        scores: &mut [Score],
    ) -> Result<()> {
        let draw = Draw::new(self.seed, self.place, head, clock);
        for (score, &id) in scores.iter_mut().zip(rows.ids(head)) {
            score.tie = draw.bits(id);
        }
        Ok(())
    }
    fn boxed_clone(&self) -> Box<dyn Policy> {
        Box::new(*self)
    }
}
