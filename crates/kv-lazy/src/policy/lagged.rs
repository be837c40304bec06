//! Any policy, judged every W steps and with the newest W tokens protected: the window of LazyEviction alone.

use super::{Clock, Needs, Phase, Place, Policy, Rows, Rule, Score, Seen, Trigger};
use crate::error::Result;
use crate::store::{Layout, Relocation};

/// Evicts every `window` steps in place of every step.
#[derive(Debug, Clone)]
pub struct Lagged<P> {
    inner: P,
    window: usize,
}

impl<P> Lagged<P> {
    /// Lets `inner` judge every `window` steps; a window of zero is refused when the policy is put to work.
    pub fn new(inner: P, window: usize) -> Self {
        Self { inner, window }
    }
}

impl<P: Policy + Clone + 'static> Policy for Lagged<P> {
    fn name(&self) -> &'static str {
        self.inner.name()
    }
    fn needs(&self) -> Needs {
        self.inner.needs()
    }
    fn rule(&self, phase: Phase) -> Rule {
        let rule = self.inner.rule(phase);
        Rule {
            decode: match rule.decode {
                Trigger::Never => Trigger::Never,
                _ => Trigger::Every(self.window),
            },
            recent: rule.recent.max(self.window),
            ahead: false,
            layout: Layout::Compact,
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
