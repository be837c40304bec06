//! R-KV (Cai et al., arXiv 2505.24133): important to the last queries and not similar to a newer key.
//!
//! Importance: logits of the last queries, maximum over the group, softmax over the tokens before the window, mean over the queries,
//! max-pooled. Redundancy: cosine similarity between keys, where each row forgives the most recent of its near copies; mean
//! over rows, softmax. Z = λ·importance − (1 − λ)·redundancy. One evaluation costs n²·d multiply-adds per KV head, at a budget of B tokens B / (2·G·W) of those that G query heads'
//! attention takes in the W steps between two of them; as a product of matrices they are several times faster than there, where every key and value is read anew.

use super::config::quarter;
use super::snapkv::{Pooling, check_window};
use super::window::{WindowLogits, dot};
use super::{Budget, Clock, Needs, Phase, Policy, Rows, Rule, Score, Tunable, count};
use crate::attention::products::{products, softmax};
use crate::error::{Error, Result};
use crate::store::Layout;
use serde::{Deserialize, Serialize};

/// Settings of [`RKv`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default, deny_unknown_fields)]
#[non_exhaustive]
pub struct Settings {
    /// Last queries observed; 8.
    pub window: usize,
    /// Steps between evictions; unset: 128 as in the paper, a quarter of the budget where that is less.
    pub every: Option<usize>,
    /// Tokens pooled; 7.
    pub kernel: usize,
    /// Weight of importance; 0.1.
    pub lambda: f32,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            window: 8,
            every: None,
            kernel: 7,
            lambda: 0.1,
        }
    }
}

impl Tunable for Settings {}

pub(super) fn build(settings: &Settings, budget: Budget) -> Result<Box<dyn Policy>> {
    let every = settings.every.unwrap_or_else(|| quarter(budget, 128));
    let policy = RKv::new(settings.window, every, settings.kernel, settings.lambda)?;
    Ok(Box::new(policy))
}

/// Importance minus redundancy, every so many steps.
#[derive(Debug, Clone, Copy)]
pub struct RKv {
    window: usize,
    every: usize,
    kernel: usize,
    lambda: f32,
}

/// Similarity from which two keys count as copies.
const COPY: f32 = 0.5;

impl RKv {
    /// Observes the last `window` queries every `every` steps; `kernel` tokens are pooled; `lambda` weighs importance (0.1 in the paper, 0.07 in
    /// the program).
    ///
    /// # Errors
    /// Windows of zero, an even kernel, λ outside [0, 1].
    pub fn new(window: usize, every: usize, kernel: usize, lambda: f32) -> Result<Self> {
        check_window(window, kernel, Some(every))?;
        if !(0.0..=1.0).contains(&lambda) {
            return Err(Error::Setting {
                name: "lambda",
                value: lambda.to_string(),
                expected: "a number in [0, 1]",
            });
        }
        Ok(Self {
            window,
            every,
            kernel,
            lambda,
        })
    }
}

/// Importance of the first `prefix` tokens.
fn importance(window: &WindowLogits<'_>, prefix: usize, kernel: usize) -> Vec<f32> {
    let WindowLogits {
        logits,
        group,
        positions,
        len,
        ..
    } = window;
    let mut mean = vec![0.0; prefix];
    for heads in logits.chunks_exact((group * len).max(1)) {
        let mut row = vec![f32::NEG_INFINITY; prefix];
        for head in heads.chunks_exact(*len) {
            row.iter_mut()
                .zip(head)
                .for_each(|(max, x)| *max = max.max(*x));
        }
        softmax(&mut row);
        mean.iter_mut()
            .zip(row)
            .for_each(|(sum, x)| *sum += x / *positions as f32);
    }
    Pooling::Max.apply(&mean, kernel)
}

/// Rows of similarities that are computed at once.
const BLOCK: usize = 64;

/// The last of the similarities that make a copy.
fn newest_copy(similarities: &[f32]) -> Option<usize> {
    let mut first = similarities.len();
    for part in similarities.rchunks(BLOCK) {
        first -= part.len();
        // Without an early end, which would keep the comparison from being vectorised.
        if part.iter().fold(false, |any, &s| any | (s > COPY)) {
            return part.iter().rposition(|&s| s > COPY).map(|at| first + at);
        }
    }
    None
}

/// Redundancy of all keys `[n, d]`, oldest first.
fn redundancy(keys: &[f32], d: usize) -> Vec<f32> {
    let mut unit = keys.to_vec();
    for key in unit.chunks_exact_mut(d) {
        let norm = dot(key, key).sqrt().max(f32::MIN_POSITIVE);
        key.iter_mut().for_each(|x| *x /= norm);
    }
    let n = keys.len() / d;
    let share = 1.0 / n.max(1) as f32;
    let mut mean = vec![0.0; n];
    for (block, rows) in unit.chunks(BLOCK * d).enumerate() {
        let mut similarities = products(rows, &unit, d);
        for (i, row) in (block * BLOCK..).zip(similarities.chunks_exact_mut(n)) {
            row[i] = 0.0;
            if let Some(newest) = newest_copy(row) {
                row[newest] = 0.0;
            }
            mean.iter_mut()
                .zip(&*row)
                .for_each(|(sum, s)| *sum += s * share);
        }
    }
    softmax(&mut mean);
    mean
}

impl Policy for RKv {
    fn name(&self) -> &'static str {
        "r-kv"
    }
    fn needs(&self) -> Needs {
        Needs::keys().with_queries(self.window)
    }
    fn rule(&self, _: Phase) -> Rule {
        Rule {
            recent: self.window,
            // Importance is pooled over neighbours.
            layout: Layout::Compact,
            ..Rule::every(self.every)
        }
    }
    fn score(
        &mut self,
        head: usize,
        rows: &dyn Rows,
        clock: &Clock,
        scores: &mut [Score],
    ) -> Result<()> {
        let window = WindowLogits::of(rows, head)?;
        let from = clock.next.saturating_sub(count(self.window));
        let prefix = rows.ids(head).partition_point(|&id| id < from);
        let importance = importance(&window, prefix, self.kernel);
        let redundancy = redundancy(&window.keys, rows.head_dim());
        for ((score, important), redundant) in scores.iter_mut().zip(importance).zip(redundancy) {
            score.value = self.lambda * important - (1.0 - self.lambda) * redundant;
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

    #[test]
    fn of_planted_duplicates_the_newest_is_the_least_redundant() {
        // Three copies of one direction among orthogonal keys.
        let mut keys = vec![0.0; 8 * 8];
        for (i, direction) in [0, 1, 0, 2, 3, 0, 4, 5].into_iter().enumerate() {
            keys[i * 8 + direction] = 1.0 + i as f32;
        }
        let r = redundancy(&keys, 8);
        assert!(r[5] < r[0] && r[5] < r[2], "{r:?}");
        assert!(r[0] > r[1] && r[2] > r[7], "{r:?}");
    }
}
