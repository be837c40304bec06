//! Full: nothing is ever evicted and nothing is looked at; the reference for all others.

use super::{Clock, Needs, Phase, Place, Policy, Rows, Rule, Score, Seen, Trigger};
use crate::error::Result;
use crate::store::{Layout, Relocation};

/// Keeps everything.
#[derive(Debug, Clone, Copy, Default)]
pub struct Full;

impl Policy for Full {
    fn name(&self) -> &'static str {
        "full"
    }
    fn needs(&self) -> Needs {
        Needs::default()
    }
    fn rule(&self, _: Phase) -> Rule {
        Rule {
            decode: Trigger::Never,
            after_prefill: false,
            layout: Layout::Compact,
            ..Rule::STEPWISE
        }
    }
    fn start(&mut self, _: Place) {}
    fn append(&mut self, _: &Clock) {}
    fn observe(&mut self, _: usize, _: Seen<'_>, _: &Clock) {}
    fn score(&mut self, _: usize, _: &dyn Rows, _: &Clock, _: &mut [Score]) -> Result<()> {
        Ok(())
    }
    fn relocate(&mut self, _: usize, _: &Relocation) {}
    fn state_bytes(&self) -> usize {
        0
    }
    fn boxed_clone(&self) -> Box<dyn Policy> {
        Box::new(*self)
    }
}
