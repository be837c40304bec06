//! StreamingLLM (Xiao et al., arXiv 2309.17453): the first tokens as attention sinks and the newest ones.
//!
//! Room is made before a token is appended, so single tokens never exceed the budget; of a step of several tokens, which must see each other, what
//! exceeds it leaves after the step. Keys keep the rotation of their original
//! positions; the reference code re-rotates to positions inside the cache instead, which matters once the text is
//! longer than the model's context.

use super::{Budget, Clock, Phase, Policy, Rows, Rule, Score, Tunable};
use crate::error::Result;
use crate::store::Layout;
use serde::{Deserialize, Serialize};

/// Settings of [`Streaming`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default, deny_unknown_fields)]
#[non_exhaustive]
pub struct Settings {
    /// First tokens kept; 4, as in the paper.
    pub sinks: usize,
}

impl Default for Settings {
    fn default() -> Self {
        Self { sinks: 4 }
    }
}

impl Tunable for Settings {}

pub(super) fn build(settings: &Settings, _: Budget) -> Result<Box<dyn Policy>> {
    Ok(Box::new(Streaming {
        sinks: settings.sinks,
    }))
}

/// Sinks and a window of the newest tokens.
#[derive(Debug, Clone, Copy)]
pub struct Streaming {
    /// First tokens kept.
    pub sinks: usize,
}

impl Policy for Streaming {
    fn name(&self) -> &'static str {
        "streaming"
    }
    fn rule(&self, _: Phase) -> Rule {
        Rule {
            sinks: self.sinks,
            ahead: true,
            layout: Layout::SinkRing,
            ..Rule::STEPWISE
        }
    }
    fn score(
        &mut self,
        head: usize,
        rows: &dyn Rows,
        _: &Clock,
        scores: &mut [Score],
    ) -> Result<()> {
        for (score, &id) in scores.iter_mut().zip(rows.ids(head)) {
            score.tie = id;
        }
        Ok(())
    }
    fn boxed_clone(&self) -> Box<dyn Policy> {
        Box::new(*self)
    }
}
