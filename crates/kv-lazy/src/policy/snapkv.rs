//! SnapKV (Li et al., arXiv 2404.14469): what the end of the prompt attends to is what generation will need.
//!
//! The weights of the last w prompt queries are summed over the queries, pooled along the sequence and averaged over the group; the best
//! tokens of the prefix stay with the window itself. The prompt is compressed once; generated tokens are all kept, unless `every`
//! asks for the same again every so many steps over the last w queries.

use super::config::quarter;
use super::window::WindowLogits;
use super::{Budget, Clock, Needs, Phase, Policy, Rows, Rule, Score, Trigger, Tunable, count};
use crate::attention::products::softmax;
use crate::error::{Error, Result};
use crate::store::Layout;
use serde::{Deserialize, Serialize};

/// Smoothing of scores along the sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Pooling {
    /// Mean over the kernel, zeros beyond the ends.
    #[default]
    Mean,
    /// Maximum over the kernel.
    Max,
}

impl Pooling {
    /// `row` pooled with an odd `kernel`, centred.
    pub(super) fn apply(self, row: &[f32], kernel: usize) -> Vec<f32> {
        let half = kernel / 2;
        (0..row.len())
            .map(|i| {
                let near = &row[i.saturating_sub(half)..(i + half + 1).min(row.len())];
                match self {
                    Pooling::Mean => near.iter().sum::<f32>() / kernel as f32,
                    Pooling::Max => near.iter().copied().fold(f32::NEG_INFINITY, f32::max),
                }
            })
            .collect()
    }
}

/// Settings of [`SnapKv`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default, deny_unknown_fields)]
#[non_exhaustive]
pub struct Settings {
    /// Last queries observed; unset: 32, less in a budget below 128.
    pub window: Option<usize>,
    /// Tokens pooled; 5.
    pub kernel: usize,
    /// Mean or maximum.
    pub pooling: Pooling,
    /// Repeat every so many decode steps; unset: only after the prompt.
    pub every: Option<usize>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            window: None,
            kernel: 5,
            pooling: Pooling::Mean,
            every: None,
        }
    }
}

impl Tunable for Settings {}

pub(super) fn build(settings: &Settings, budget: Budget) -> Result<Box<dyn Policy>> {
    let window = settings.window.unwrap_or_else(|| quarter(budget, 32));
    let policy = SnapKv::new(window, settings.kernel, settings.pooling, settings.every)?;
    Ok(Box::new(policy))
}

/// The tokens that the last queries attend to most.
#[derive(Debug, Clone, Copy)]
pub struct SnapKv {
    window: usize,
    kernel: usize,
    pooling: Pooling,
    every: Option<usize>,
}

impl SnapKv {
    /// Observes the last `window` queries, pools over `kernel` tokens; `every` repeats it while decoding.
    ///
    /// # Errors
    /// A window of zero, an even kernel.
    pub fn new(
        window: usize,
        kernel: usize,
        pooling: Pooling,
        every: Option<usize>,
    ) -> Result<Self> {
        check_window(window, kernel, every)?;
        Ok(Self {
            window,
            kernel,
            pooling,
            every,
        })
    }
}

/// Windows of at least one, kernels odd.
pub(super) fn check_window(window: usize, kernel: usize, every: Option<usize>) -> Result<()> {
    if window == 0 {
        return Err(Error::ZeroWindow { name: "window" });
    }
    if every == Some(0) {
        return Err(Error::ZeroWindow { name: "every" });
    }
    if kernel.is_multiple_of(2) {
        return Err(Error::Setting {
            name: "kernel",
            value: kernel.to_string(),
            expected: "an odd number",
        });
    }
    Ok(())
}

impl Policy for SnapKv {
    fn name(&self) -> &'static str {
        "snapkv"
    }
    fn needs(&self) -> Needs {
        Needs::keys().with_queries(self.window)
    }
    fn comparable(&self) -> bool {
        true
    }
    fn rule(&self, _: Phase) -> Rule {
        Rule {
            decode: self.every.map_or(Trigger::Never, Trigger::Every),
            recent: self.window,
            layout: Layout::Compact,
            ..Rule::STEPWISE
        }
    }
    fn score(
        &mut self,
        head: usize,
        rows: &dyn Rows,
        clock: &Clock,
        scores: &mut [Score],
    ) -> Result<()> {
        let WindowLogits {
            mut logits,
            group,
            len,
            ..
        } = WindowLogits::of(rows, head)?;
        let from = clock.next.saturating_sub(count(self.window));
        let prefix = rows.ids(head).partition_point(|&id| id < from);
        let mut summed = vec![0.0; group * prefix];
        for (i, row) in logits.chunks_exact_mut(len).enumerate() {
            softmax(row);
            let sums = &mut summed[i % group * prefix..][..prefix];
            sums.iter_mut().zip(&*row).for_each(|(sum, w)| *sum += w);
        }
        for sums in summed.chunks_exact(prefix.max(1)) {
            for (score, x) in scores.iter_mut().zip(self.pooling.apply(sums, self.kernel)) {
                score.value += x / group as f32;
            }
        }
        Ok(())
    }
    fn boxed_clone(&self) -> Box<dyn Policy> {
        Box::new(*self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::golden::{self, TOKENS};

    #[test]
    fn scores_equal_golden_values() {
        let mut policy = SnapKv::new(8, 5, Pooling::Mean, None).unwrap();
        let clock = Clock {
            next: TOKENS as u32,
            step: 0,
            tokens: 1,
            prompt: TOKENS as u32,
            phase: Phase::Prefill,
        };
        let mut scores = vec![Score::default(); TOKENS];
        let rows = golden::Observed::new();
        policy.score(0, &rows, &clock, &mut scores).unwrap();
        // The golden values are means over the eight queries.
        let means: Vec<f32> = scores[..6].iter().map(|score| score.value / 8.0).collect();
        let want = [
            0.012_633_759_5,
            0.017_581_175_7,
            0.026_885_609_8,
            0.026_753_329_5,
            0.026_888_986_8,
            0.024_029_168,
        ];
        golden::close(&means, &want, 1e-5);
    }
}
