//! What a cache holds of a context, and what is answered from it.

use causal_lm::CacheSet;
use eval_report::{Row, Stopwatch};
use lm_eval::long_context::Answer;
use serde::{Deserialize, Serialize};

/// The questions of one context.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub(super) struct Outcome {
    /// Share of exact answers.
    pub(super) exact: f64,
    /// Share of answers that are chosen among the candidates; none where there are none.
    pub(super) choice: Option<f64>,
    /// Nats of all answers.
    pub(super) nats: f64,
    /// Tokens of all answers.
    pub(super) tokens: usize,
    /// Tokens of the context.
    pub(super) context: usize,
    pub(super) kv_bytes: usize,
    pub(super) peak_bytes: usize,
    pub(super) state_bytes: usize,
    pub(super) position_bytes: usize,
    /// Tokens that a head holds at most.
    pub(super) held: usize,
}

impl Outcome {
    /// What a cache holds after a context.
    pub(super) fn of(cache: &CacheSet, context: usize) -> Self {
        let layers = cache.shapes().len();
        let held = (0..layers).map(|layer| cache.physical_len(layer)).max();
        Self {
            context,
            kv_bytes: cache.bytes(),
            peak_bytes: cache.peak_bytes(),
            state_bytes: cache.state_bytes(),
            position_bytes: cache.position_bytes(),
            held: held.unwrap_or(0),
            ..Self::default()
        }
    }

    /// Takes in the answer to one of `questions`.
    pub(super) fn answered(&mut self, answer: &Answer, questions: usize) {
        let share = 1.0 / questions as f64;
        self.exact += share * answer.exact;
        if let Some(choice) = answer.choice {
            *self.choice.get_or_insert(0.0) += share * choice;
        }
        self.nats += answer.nats;
        self.tokens += answer.tokens;
    }

    /// Everything that stays in memory.
    pub(super) fn bytes(&self) -> usize {
        self.kv_bytes + self.state_bytes + self.position_bytes
    }
}

/// An outcome and what it took.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(super) struct Answered {
    pub(super) outcome: Outcome,
    pub(super) seconds: f64,
    pub(super) peak_rss_bytes: Option<u64>,
}

impl Answered {
    pub(super) fn new(outcome: Outcome, watch: Stopwatch) -> Self {
        let mut row = Row::default();
        watch.stop(&mut row);
        Self {
            outcome,
            seconds: row.seconds,
            peak_rss_bytes: row.peak_rss_bytes,
        }
    }
}
