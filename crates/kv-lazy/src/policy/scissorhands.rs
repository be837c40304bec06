//! Scissorhands (Liu et al., arXiv 2305.17118): persistence of importance.
//!
//! Over a history window, count per token how often its weight was below the uniform level 1/n; when the budget is
//! exceeded, drop many of the most often unimportant at once, outside the newest tokens.

use super::{Clock, Needs, Phase, Place, Policy, PrefillNeed, Rows, Rule, Score, Seen};
use crate::attention::Reduce;
use crate::error::Result;
use crate::store::{Layout, Relocation};

/// Tokens that stayed unimportant go, in bulk.
#[derive(Debug, Clone)]
pub struct Scissorhands {
    /// Steps of history counted; 400 in the paper.
    pub history: usize,
    /// Newest tokens kept; 10 in the paper.
    pub recent: usize,
    /// Share of the budget dropped at once; 0.5 in the paper.
    pub drop: f64,
    heads: Vec<History>,
}

/// One bit per token and step of the window: unimportant or not.
#[derive(Debug, Clone, Default)]
struct History {
    bits: Vec<u64>,
    counts: Vec<u16>,
    steps: usize,
}

impl Scissorhands {
    /// `history` steps are counted, the newest `recent` tokens kept, a share `drop` of the budget dropped at once.
    pub fn new(history: usize, recent: usize, drop: f64) -> Self {
        Self {
            history,
            recent,
            drop,
            heads: Vec::new(),
        }
    }

    fn words(&self) -> usize {
        self.history.div_ceil(64)
    }
}

impl Policy for Scissorhands {
    fn name(&self) -> &'static str {
        "scissorhands"
    }
    fn needs(&self) -> Needs {
        Needs {
            weights: Some(Reduce::Max),
            prefill: PrefillNeed::LastQuery,
            ..Needs::default()
        }
    }
    fn rule(&self, _: Phase) -> Rule {
        Rule {
            recent: self.recent,
            release: self.drop,
            layout: Layout::Compact,
            ..Rule::STEPWISE
        }
    }
    fn start(&mut self, place: Place) {
        self.heads = vec![History::default(); place.heads];
    }
    fn append(&mut self, clock: &Clock) {
        let words = self.words();
        for head in &mut self.heads {
            let len = head.counts.len() + clock.tokens as usize;
            head.counts.resize(len, 0);
            head.bits.resize(len * words, 0);
        }
    }
    fn observe(&mut self, head: usize, seen: Seen<'_>, _: &Clock) {
        let (Seen::Weights(weights) | Seen::Columns(weights)) = seen;
        let words = self.words();
        let head = &mut self.heads[head];
        let slot = head.steps % self.history;
        head.steps += 1;
        let (word, mask) = (slot / 64, 1u64 << (slot % 64));
        let uniform = 1.0 / weights.len() as f32;
        for ((bits, count), &weight) in head
            .bits
            .chunks_exact_mut(words)
            .zip(&mut head.counts)
            .zip(weights)
        {
            let leaves = u16::from(bits[word] & mask != 0);
            let enters = weight < uniform;
            bits[word] = if enters {
                bits[word] | mask
            } else {
                bits[word] & !mask
            };
            *count = *count + u16::from(enters) - leaves;
        }
    }
    fn score(&mut self, head: usize, _: &dyn Rows, _: &Clock, scores: &mut [Score]) -> Result<()> {
        for (score, &count) in scores.iter_mut().zip(&self.heads[head].counts) {
            score.value = -f32::from(count);
        }
        Ok(())
    }
    fn relocate(&mut self, head: usize, moves: &Relocation) {
        let words = self.words();
        let head = &mut self.heads[head];
        moves.apply(&mut head.counts, 1);
        moves.apply(&mut head.bits, words);
    }
    fn state_bytes(&self) -> usize {
        self.heads
            .iter()
            .map(|h| h.bits.len() * 8 + h.counts.len() * 2)
            .sum()
    }
    fn boxed_clone(&self) -> Box<dyn Policy> {
        Box::new(self.clone())
    }
}
