//! Scissorhands (Liu et al., arXiv 2305.17118): persistence of importance.
//!
//! Over a history window, count per token how often its weight was below the uniform level 1/n; when the budget is
//! exceeded, drop many of the most often unimportant at once, but none of the newest tokens.

use super::config::quarter;
use super::{Budget, Clock, Needs, Phase, Place, Policy, Rows, Rule, Score, Seen, Tunable};
use crate::attention::{Reduce, WeightKinds};
use crate::error::{Error, Result};
use crate::store::{Layout, Relocation};
use serde::{Deserialize, Serialize};

/// The longest history: each step takes a bit per token, 8 KiB a token at this length.
pub const LONGEST_HISTORY: usize = u16::MAX as usize;

/// Settings of [`Scissorhands`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default, deny_unknown_fields)]
#[non_exhaustive]
pub struct Settings {
    /// Steps of history; 400.
    pub history: usize,
    /// Newest tokens kept; unset: 10, less in a budget below 40.
    pub recent: Option<usize>,
    /// Share of the budget dropped at once; 0.5.
    pub drop: f64,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            history: 400,
            recent: None,
            drop: 0.5,
        }
    }
}

impl Tunable for Settings {}

pub(super) fn build(settings: &Settings, budget: Budget) -> Result<Box<dyn Policy>> {
    let recent = settings.recent.unwrap_or_else(|| quarter(budget, 10));
    let policy = Scissorhands::new(settings.history, recent, settings.drop)?;
    Ok(Box::new(policy))
}

/// Evicts tokens that were unimportant for long, in bulk.
#[derive(Debug, Clone)]
pub struct Scissorhands {
    history: usize,
    recent: usize,
    drop: f64,
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
    ///
    /// # Errors
    /// A history of 0 or beyond [`LONGEST_HISTORY`], a share outside [0, 1).
    pub fn new(history: usize, recent: usize, drop: f64) -> Result<Self> {
        if history == 0 {
            return Err(Error::ZeroWindow { name: "history" });
        }
        if history > LONGEST_HISTORY {
            return Err(Error::Setting {
                name: "history",
                value: history.to_string(),
                expected: "at most 65535 steps",
            });
        }
        if !(0.0..1.0).contains(&drop) {
            return Err(Error::Setting {
                name: "drop",
                value: drop.to_string(),
                expected: "a share in [0, 1)",
            });
        }
        Ok(Self {
            history,
            recent,
            drop,
            heads: Vec::new(),
        })
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
        Needs::weights(WeightKinds::last(Reduce::Max))
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
        let weights = seen.weights;
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
            // In this order a count stays within the history.
            *count = *count - leaves + u16::from(enters);
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
