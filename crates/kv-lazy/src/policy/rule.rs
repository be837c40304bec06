//! When a policy evicts and what it never evicts, as data.

use super::Phase;
use crate::error::{Error, Result};
use crate::store::Layout;
use serde::{Deserialize, Serialize};

/// Tokens a layer may hold per sequence and KV head, right after an eviction.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Budget {
    /// A fixed number.
    Tokens(usize),
    /// A share of the logical length, in (0, 1], rounded up.
    Ratio(f64),
}

impl Budget {
    /// The budget at a logical length.
    pub fn tokens(self, logical: usize) -> usize {
        match self {
            Budget::Tokens(tokens) => tokens,
            Budget::Ratio(ratio) => (ratio * logical as f64).ceil() as usize,
        }
    }

    /// Checks the range, and that a fixed budget holds what is protected plus one.
    pub(crate) fn check(self, sinks: usize, recent: usize) -> Result<()> {
        match self {
            Budget::Tokens(budget) if budget <= sinks.saturating_add(recent) => {
                Err(Error::BudgetTooSmall {
                    budget,
                    sinks,
                    recent,
                })
            }
            Budget::Ratio(ratio) if !(ratio > 0.0 && ratio <= 1.0) => Err(Error::Setting {
                name: "budget",
                value: ratio.to_string(),
                expected: "a ratio in (0, 1]",
            }),
            _ => Ok(()),
        }
    }
}

/// What happens to the prompt's tokens.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Prompt {
    /// They are tokens like any other.
    Evictable,
    /// They stay and count against the budget. Where the prompt leaves no room, the layer holds prompt + recent + 1 tokens.
    Keep,
    /// They stay and the budget is for generated tokens only.
    KeepBeside,
    /// After prefill the prompt is compressed to this many tokens, which then stay and count against the budget.
    CompressOnce(usize),
}

/// When evictions happen while decoding.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Trigger {
    /// Never.
    Never,
    /// After every step that leaves the cache over budget.
    EveryStep,
    /// At steps t = W, 2W, … that find the cache over budget.
    Every(usize),
}

/// When a policy evicts and what it never evicts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rule {
    /// While decoding.
    pub decode: Trigger,
    /// Whether a prompt over budget is cut down after each of its chunks.
    pub after_prefill: bool,
    /// The first positions, never evicted.
    pub sinks: usize,
    /// The newest positions, never evicted.
    pub recent: usize,
    /// The prompt.
    pub prompt: Prompt,
    /// Tokens that an eviction removes beyond what the budget asks, as a share of the budget.
    pub release: f64,
    /// Evict before a step's tokens are appended, so that the budget is never exceeded.
    pub ahead: bool,
    /// How slots are freed.
    pub layout: Layout,
}

impl Rule {
    /// Evicts one token per step over budget, protects nothing.
    pub const STEPWISE: Self = Self {
        decode: Trigger::EveryStep,
        after_prefill: true,
        sinks: 0,
        recent: 0,
        prompt: Prompt::Evictable,
        release: 0.0,
        ahead: false,
        layout: Layout::SlotReuse,
    };

    /// Evicts at every `window`-th step and protects the newest `window` tokens.
    pub const fn every(window: usize) -> Self {
        Self {
            decode: Trigger::Every(window),
            recent: window,
            ..Self::STEPWISE
        }
    }

    /// Evicts at every `every`-th step and protects the first `sinks` and the newest `recent` tokens.
    pub const fn periodic(sinks: usize, recent: usize, every: usize) -> Self {
        Self {
            decode: Trigger::Every(every),
            sinks,
            recent,
            ..Self::STEPWISE
        }
    }

    /// The newest positions that an eviction in `phase` leaves alone: of a prompt that is cut to a few, no more than leave room for one that is chosen.
    pub(crate) fn newest(&self, phase: Phase) -> usize {
        match (self.prompt, phase) {
            (Prompt::CompressOnce(tokens), Phase::Prefill) => {
                self.recent.min(tokens.saturating_sub(self.sinks + 1))
            }
            _ => self.recent,
        }
    }

    /// Tokens that may join, one by one, between two evictions.
    pub(crate) fn headroom(&self) -> usize {
        match self.decode {
            Trigger::Every(window) => window,
            Trigger::EveryStep if self.ahead => 0,
            Trigger::EveryStep => 1,
            Trigger::Never => 32,
        }
    }
}
