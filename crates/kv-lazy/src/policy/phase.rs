//! One policy for the prompt, another for generation.
//!
//! Each is shown, in either phase, the weights that it declared for that phase, so that the second knows the prompt's tokens when its turn comes.

use super::{Clock, Needs, Phase, Place, Policy, Rows, Rule, Score, Seen};
use crate::LayerShape;
use crate::error::Result;
use crate::rotary::Rotary;
use crate::store::Relocation;

/// `prefill` evicts while the prompt is read, `decode` afterwards.
#[derive(Debug, Clone)]
pub struct PerPhase<A, B> {
    prefill: A,
    decode: B,
}

impl<A, B> PerPhase<A, B> {
    /// Combines two policies.
    pub fn new(prefill: A, decode: B) -> Self {
        Self { prefill, decode }
    }
}

impl<A: Policy + Clone + 'static, B: Policy + Clone + 'static> Policy for PerPhase<A, B> {
    fn name(&self) -> &'static str {
        self.decode.name()
    }
    fn needs(&self) -> Needs {
        self.prefill.needs().union(self.decode.needs())
    }
    fn admits(&self, layer: usize, shape: &LayerShape) -> Result<()> {
        self.prefill.admits(layer, shape)?;
        self.decode.admits(layer, shape)
    }
    fn admits_rotary(&self, layer: usize, rotary: &Rotary) -> Result<()> {
        self.prefill.admits_rotary(layer, rotary)?;
        self.decode.admits_rotary(layer, rotary)
    }
    fn comparable(&self) -> bool {
        self.prefill.comparable() && self.decode.comparable()
    }
    fn joined(&mut self, rows: &dyn Rows) -> Result<()> {
        self.prefill.joined(rows)?;
        self.decode.joined(rows)
    }
    fn rule(&self, phase: Phase) -> Rule {
        match phase {
            // The prompt is cut down by this policy's rule alone.
            Phase::Prefill => self.prefill.rule(phase),
            Phase::Decode => self.decode.rule(phase),
        }
    }
    fn start(&mut self, place: Place) {
        self.prefill.start(place);
        self.decode.start(place);
    }
    fn append(&mut self, clock: &Clock) {
        self.prefill.append(clock);
        self.decode.append(clock);
    }
    fn observe(&mut self, head: usize, seen: Seen<'_>, clock: &Clock) {
        if self.prefill.needs().of(clock.phase).contains(seen.kind) {
            self.prefill.observe(head, seen, clock);
        }
        if self.decode.needs().of(clock.phase).contains(seen.kind) {
            self.decode.observe(head, seen, clock);
        }
    }
    fn score(
        &mut self,
        head: usize,
        rows: &dyn Rows,
        clock: &Clock,
        scores: &mut [Score],
    ) -> Result<()> {
        match clock.phase {
            Phase::Prefill => self.prefill.score(head, rows, clock, scores),
            Phase::Decode => self.decode.score(head, rows, clock, scores),
        }
    }
    fn relocate(&mut self, head: usize, moves: &Relocation) {
        self.prefill.relocate(head, moves);
        self.decode.relocate(head, moves);
    }
    fn state_bytes(&self) -> usize {
        self.prefill.state_bytes() + self.decode.state_bytes()
    }
    fn boxed_clone(&self) -> Box<dyn Policy> {
        Box::new(self.clone())
    }
}
