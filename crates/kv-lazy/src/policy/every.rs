//! Any policy, also one that evicts after the prompt alone, evicting every W steps and with the newest W tokens protected: the window of LazyEviction alone.

use super::{Phase, Policy, Rule, Trigger};
use crate::store::Layout;

/// Evicts every `window` steps in place of every step.
#[derive(Debug, Clone)]
pub struct EvictEvery<P> {
    inner: P,
    window: usize,
}

impl<P> EvictEvery<P> {
    /// `inner` evicts every `window` steps; a window of zero is refused when the evictor is built.
    pub fn new(inner: P, window: usize) -> Self {
        Self { inner, window }
    }
}

impl<P: Policy + Clone + 'static> Policy for EvictEvery<P> {
    fn name(&self) -> &'static str {
        self.inner.name()
    }
    fn rule(&self, phase: Phase) -> Rule {
        let rule = self.inner.rule(phase);
        Rule {
            decode: match rule.decode {
                // What cuts the prompt once does so again every `window` steps; what keeps everything keeps everything.
                Trigger::Never if !rule.after_prefill => Trigger::Never,
                _ => Trigger::Every(self.window),
            },
            recent: rule.recent.max(self.window),
            ahead: false,
            layout: match rule.layout {
                Layout::SinkRing => Layout::SlotReuse,
                layout => layout,
            },
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
