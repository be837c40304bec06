//! Any policy with more protected: sinks, newest tokens, the prompt.

use super::{Phase, Policy, Prompt, Rule};

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
    fn rule(&self, phase: Phase) -> Rule {
        let rule = self.inner.rule(phase);
        Rule {
            sinks: rule.sinks.max(self.sinks),
            recent: rule.recent.max(self.recent),
            prompt: self.prompt.unwrap_or(rule.prompt),
            ..rule
        }
    }
    fn inner(&self) -> Option<&dyn Policy> {
        Some(&self.inner)
    }
    fn inner_mut(&mut self) -> Option<&mut dyn Policy> {
        Some(&mut self.inner)
    }
    fn boxed_clone(&self) -> Box<dyn Policy> {
        Box::new(self.clone())
    }
}
