//! Oracle: keeps what will be attended most. For replay only, where the future is known.

use super::{Clock, Phase, Policy, Rows, Rule, Score};
use crate::error::Result;
use std::sync::Arc;

/// The attention that is still to come.
pub trait Future: std::fmt::Debug + Send + Sync {
    /// Attention of the full cache on each of `ids`, summed over the queries at `from..from + horizon` and over the group of KV head `head`.
    fn mass(&self, head: usize, from: u32, horizon: usize, ids: &[u32], out: &mut [f32]);
}

/// Largest attention over the next steps, judged every W steps.
#[derive(Debug, Clone)]
pub struct Oracle {
    /// Steps between evictions.
    pub window: usize,
    /// Steps looked ahead.
    pub horizon: usize,
    future: Arc<dyn Future>,
    buffer: Vec<f32>,
}

impl Oracle {
    /// Looks `horizon` steps ahead every `window` steps.
    pub fn new(window: usize, horizon: usize, future: Arc<dyn Future>) -> Self {
        Self {
            window,
            horizon,
            future,
            buffer: Vec::new(),
        }
    }
}

impl Policy for Oracle {
    fn name(&self) -> &'static str {
        "oracle"
    }
    fn rule(&self, _: Phase) -> Rule {
        Rule {
            recent: 0,
            ..Rule::lagged(self.window)
        }
    }
    fn score(
        &mut self,
        head: usize,
        rows: &dyn Rows,
        clock: &Clock,
        scores: &mut [Score],
    ) -> Result<()> {
        self.buffer.clear();
        self.buffer.resize(scores.len(), 0.0);
        let ids = rows.ids(head);
        self.future
            .mass(head, clock.next, self.horizon, ids, &mut self.buffer);
        for (score, &mass) in scores.iter_mut().zip(&self.buffer) {
            score.value = mass;
        }
        Ok(())
    }
    fn boxed_clone(&self) -> Box<dyn Policy> {
        Box::new(self.clone())
    }
}
