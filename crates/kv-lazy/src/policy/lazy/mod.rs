//! LazyEviction (arXiv 2506.15969): tokens recur, so wait a window before evicting them.
//!
//! Per token two numbers are kept: TS, the last step at which its weight passed the threshold, and MRI, the longest interval
//! between two such steps. Every W steps, with the newest W tokens protected, a token's importance is H1 (is it still inside its
//! usual interval?) plus H2 (does it recur often?), see [`importance`](Importance).
//!
//! Modes: `Paper` follows the paper's formulas. `Reference` follows the reference code, which caps H1 at 0.538 and
//! starts a token's clock one step early. `Guarded` is the paper's with three repairs: H2 counts only as far as H1 says that the token is still inside
//! its interval, four sinks, and the prompt kept. The first matters: a token active only in two consecutive steps has MRI = 1 and scores 1
//! however long ago that was, and so outranks live recurring tokens wherever the threshold is large against 1/n. In all modes state
//! is kept per KV head, over the group's reduced weights, where the authors keep it per query head on expanded caches.

mod history;
mod importance;

pub use history::History;
pub use importance::{Combine, Importance};

use super::config::quarter;
use super::{
    Budget, Clock, Needs, Phase, Place, Policy, Prompt, Rows, Rule, Score, Seen, Threshold,
    Trigger, Tunable,
};
use crate::attention::{Reduce, WeightKinds};
use crate::error::{Error, Result};
use crate::store::Relocation;
use serde::{Deserialize, Serialize};

/// Whose rules are followed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// The paper's formulas.
    #[default]
    Paper,
    /// The reference code.
    Reference,
    /// The paper's H1 · (1 + H2), sinks and prompt kept.
    Guarded,
}

/// Settings of the three modes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default, deny_unknown_fields)]
#[non_exhaustive]
pub struct Settings {
    /// W, steps between evictions and newest tokens protected. Unset: a quarter of the budget, at most 128; 32 for a ratio. The paper uses the 80th percentile
    /// of the MRI, which the module `calibrate` measures.
    pub window: Option<usize>,
    /// When a token counts as active; α = 1e-4 in the paper for most models.
    pub threshold: Threshold,
    /// How weights are reduced over a group before they are compared with the threshold.
    pub reduce: Reduce,
    /// How H1 and H2 combine; unset: the mode's.
    pub combine: Option<Combine>,
    /// Smallest MRI that earns H2; unset: 1.
    pub h2_min_mri: Option<u32>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            window: None,
            threshold: Threshold::Absolute(1e-4),
            reduce: Reduce::Max,
            combine: None,
            h2_min_mri: None,
        }
    }
}

impl Tunable for Settings {
    fn threshold(&mut self) -> Option<&mut Threshold> {
        Some(&mut self.threshold)
    }
}

pub(super) fn build_paper(settings: &Settings, budget: Budget) -> Result<Box<dyn Policy>> {
    build(Mode::Paper, settings, budget)
}

pub(super) fn build_reference(settings: &Settings, budget: Budget) -> Result<Box<dyn Policy>> {
    build(Mode::Reference, settings, budget)
}

pub(super) fn build_guarded(settings: &Settings, budget: Budget) -> Result<Box<dyn Policy>> {
    build(Mode::Guarded, settings, budget)
}

fn build(mode: Mode, settings: &Settings, budget: Budget) -> Result<Box<dyn Policy>> {
    let window = settings.window.unwrap_or_else(|| quarter(budget, 128));
    let mut importance = Importance::of(mode);
    importance.combine = settings.combine.unwrap_or(importance.combine);
    importance.h2_min_mri = settings.h2_min_mri.unwrap_or(importance.h2_min_mri);
    let lazy = Lazy::new(mode, window, settings.threshold, settings.reduce)?;
    Ok(Box::new(lazy.with_importance(importance)))
}

/// Recurrence-aware eviction every W steps.
#[derive(Debug, Clone)]
pub struct Lazy {
    mode: Mode,
    window: usize,
    threshold: Threshold,
    reduce: Reduce,
    importance: Importance,
    heads: Vec<History>,
}

impl Lazy {
    /// Window W in steps, activation threshold α, and how weights are reduced over a group.
    ///
    /// # Errors
    /// A window of zero, a threshold out of range.
    pub fn new(mode: Mode, window: usize, threshold: Threshold, reduce: Reduce) -> Result<Self> {
        if window == 0 {
            return Err(Error::ZeroWindow { name: "window" });
        }
        threshold.check()?;
        let importance = Importance::of(mode);
        Ok(Self {
            mode,
            window,
            threshold,
            reduce,
            importance,
            heads: Vec::new(),
        })
    }

    /// The same with another importance.
    pub fn with_importance(mut self, importance: Importance) -> Self {
        self.importance = importance;
        self
    }
}

impl Policy for Lazy {
    fn name(&self) -> &'static str {
        match self.mode {
            Mode::Paper => "lazy",
            Mode::Reference => "lazy-reference",
            Mode::Guarded => "lazy-guarded",
        }
    }

    fn needs(&self) -> Needs {
        // Prefill attention is not used: t counts decode steps.
        Needs::decode(WeightKinds::last(self.reduce))
    }

    fn rule(&self, _: Phase) -> Rule {
        let guarded = self.mode == Mode::Guarded;
        Rule {
            decode: Trigger::Every(self.window),
            after_prefill: false,
            sinks: if guarded { 4 } else { 0 },
            prompt: if guarded {
                Prompt::Keep
            } else {
                Prompt::Evictable
            },
            ..Rule::every(self.window)
        }
    }

    fn start(&mut self, place: Place) {
        self.heads = vec![History::default(); place.heads];
    }

    fn append(&mut self, clock: &Clock) {
        for head in &mut self.heads {
            for birth in clock.births() {
                let early = u32::from(self.mode == Mode::Reference);
                head.append(1, birth.saturating_sub(early));
            }
        }
    }

    fn observe(&mut self, head: usize, seen: Seen<'_>, clock: &Clock) {
        let weights = seen.weights;
        let level = self.threshold.level(weights);
        // The paper activates above the threshold, the program at or above it.
        match self.mode {
            Mode::Reference => self.heads[head].record(clock.step, weights, |w| w >= level),
            Mode::Paper | Mode::Guarded => {
                self.heads[head].record(clock.step, weights, |w| w > level);
            }
        }
    }

    fn score(
        &mut self,
        head: usize,
        _: &dyn Rows,
        clock: &Clock,
        scores: &mut [Score],
    ) -> Result<()> {
        let history = &mut self.heads[head];
        history.fold();
        for (score, (&seen, &mri)) in scores
            .iter_mut()
            .zip(history.last_active().iter().zip(history.mri()))
        {
            score.value = self.importance.of_token(clock.step - seen, mri);
            score.tie = seen;
        }
        Ok(())
    }

    fn relocate(&mut self, head: usize, moves: &Relocation) {
        self.heads[head].relocate(moves);
    }

    fn state_bytes(&self) -> usize {
        self.heads.iter().map(History::bytes).sum()
    }

    fn boxed_clone(&self) -> Box<dyn Policy> {
        Box::new(self.clone())
    }
}
