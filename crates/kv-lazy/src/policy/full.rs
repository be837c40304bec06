//! Full: nothing is ever evicted; the reference for all others.

use super::{Budget, Phase, Policy, Rule, Trigger, Tunable};
use crate::error::Result;
use crate::store::Layout;
use serde::{Deserialize, Serialize};

/// There is nothing to set.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct Settings {}

impl Tunable for Settings {}

pub(super) fn build(_: &Settings, _: Budget) -> Result<Box<dyn Policy>> {
    Ok(Box::new(Full))
}

/// Keeps everything.
#[derive(Debug, Clone, Copy, Default)]
pub struct Full;

impl Policy for Full {
    fn name(&self) -> &'static str {
        "full"
    }
    fn rule(&self, _: Phase) -> Rule {
        Rule {
            decode: Trigger::Never,
            after_prefill: false,
            layout: Layout::Compact,
            ..Rule::STEPWISE
        }
    }
    fn boxed_clone(&self) -> Box<dyn Policy> {
        Box::new(*self)
    }
}
