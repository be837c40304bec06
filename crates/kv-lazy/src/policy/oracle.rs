//! Oracle: keeps what will be attended most. For replay only, where future attention is known.

use super::{Budget, Clock, Phase, Place, Policy, Rows, Rule, Score, Tunable};
use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// Settings of [`Oracle`].
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default, deny_unknown_fields)]
#[non_exhaustive]
pub struct Settings {
    /// Steps between evictions; unset: a quarter of the budget, at most 128.
    pub window: Option<usize>,
    /// Steps looked ahead; unset: the best of one, two, four and eight windows.
    pub horizon: Option<usize>,
}

impl Tunable for Settings {}

/// Refuses: only a replay knows the future.
pub(super) fn build(_: &Settings, _: Budget) -> Result<Box<dyn Policy>> {
    Err(Error::NeedUnavailable {
        policy: "oracle".into(),
        need: "the attention of the future",
        path: "anything but the replay of a trace",
    })
}

/// The attention that is still to come.
pub trait Future: std::fmt::Debug + Send + Sync {
    /// Attention of the full cache on each of `ids`, summed over the queries at `from..from + horizon` and over the group of KV head `head`.
    fn mass(&self, head: usize, from: u32, horizon: usize, ids: &[u32], out: &mut [f32]);
}

/// Largest attention over the next steps, evicting every W steps.
#[derive(Debug, Clone)]
pub struct Oracle {
    /// Steps between evictions.
    pub window: usize,
    /// Steps looked ahead.
    pub horizon: usize,
    future: Arc<dyn Future>,
    /// The KV head that is the first here.
    first_head: usize,
    buffer: Vec<f32>,
}

impl Oracle {
    /// Looks `horizon` steps ahead every `window` steps.
    pub fn new(window: usize, horizon: usize, future: Arc<dyn Future>) -> Self {
        Self {
            window,
            horizon,
            future,
            first_head: 0,
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
            ..Rule::every(self.window)
        }
    }
    fn start(&mut self, place: Place) {
        self.first_head = place.first_head;
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
        self.future.mass(
            self.first_head + head,
            clock.next,
            self.horizon,
            ids,
            &mut self.buffer,
        );
        for (score, &mass) in scores.iter_mut().zip(&self.buffer) {
            score.value = mass;
        }
        Ok(())
    }
    fn boxed_clone(&self) -> Box<dyn Policy> {
        Box::new(self.clone())
    }
}
