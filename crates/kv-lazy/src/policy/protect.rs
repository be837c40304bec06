//! Any policy with more protected: sinks, newest tokens, the prompt.

use super::{Clock, Needs, Phase, Place, Policy, Prompt, Rows, Rule, Score, Seen};
use crate::error::Result;
use crate::store::Relocation;

/// Protects tokens that `inner` might evict.
#[derive(Debug, Clone)]
pub struct Protect<P> {
    inner: P,
    sinks: usize,
    recent: usize,
    prompt: Option<Prompt>,
}

impl<P> Protect<P> {
    /// Protects at least the first `sinks` and the newest `recent` tokens; `prompt` replaces the policy's own rule for the prompt.
    pub fn new(inner: P, sinks: usize, recent: usize, prompt: Option<Prompt>) -> Self {
        Self {
            inner,
            sinks,
            recent,
            prompt,
        }
    }
}

impl<P: Policy + Clone + 'static> Policy for Protect<P> {
    fn name(&self) -> &'static str {
        self.inner.name()
    }
    fn needs(&self) -> Needs {
        self.inner.needs()
    }
    fn rule(&self, phase: Phase) -> Rule {
        let rule = self.inner.rule(phase);
        Rule {
            sinks: rule.sinks.max(self.sinks),
            recent: rule.recent.max(self.recent),
            prompt: self.prompt.unwrap_or(rule.prompt),
            ..rule
        }
    }
    fn start(&mut self, place: Place) {
        self.inner.start(place);
    }
    fn append(&mut self, clock: &Clock) {
        self.inner.append(clock);
    }
    fn observe(&mut self, head: usize, seen: Seen<'_>, clock: &Clock) {
        self.inner.observe(head, seen, clock);
    }
    fn score(
        &mut self,
        head: usize,
        rows: &dyn Rows,
        clock: &Clock,
        scores: &mut [Score],
    ) -> Result<()> {
        self.inner.score(head, rows, clock, scores)
    }
    fn relocate(&mut self, head: usize, moves: &Relocation) {
        self.inner.relocate(head, moves);
    }
    fn state_bytes(&self) -> usize {
        self.inner.state_bytes()
    }
    fn boxed_clone(&self) -> Box<dyn Policy> {
        Box::new(self.clone())
    }
}
