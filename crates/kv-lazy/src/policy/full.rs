//! Full: nothing is ever evicted and nothing is looked at; the reference for all others.

use super::{Phase, Policy, Rule, Trigger};
use crate::store::Layout;

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
