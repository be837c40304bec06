//! Any policy, sparing the tokens whose values stand out.
//!
//! A few values of huge norm or range carry more of the output than their weights say; losing them sends generation into loops (VaSE,
//! arXiv 2606.03928). The number is taken when a token joins, before its value is quantised, and costs 4 bytes a token.

use super::{Clock, Needs, Phase, Place, Policy, Rows, Rule, Score};
use crate::error::Result;
use crate::store::Relocation;
use serde::{Deserialize, Serialize};

/// What makes a value stand out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Outlier {
    /// Its Euclidean norm.
    #[default]
    Norm,
    /// Its largest element minus its smallest.
    Range,
}

impl Outlier {
    /// The number of one value.
    pub(super) fn of(self, value: &[f32]) -> f32 {
        match self {
            Self::Norm => value.iter().map(|x| x * x).sum::<f32>().sqrt(),
            Self::Range => {
                let (low, high) = value
                    .iter()
                    .fold((f32::INFINITY, f32::NEG_INFINITY), |(low, high), &x| {
                        (low.min(x), high.max(x))
                    });
                high - low
            }
        }
    }
}

/// One number per token, taken from its value when it joined.
#[derive(Debug, Clone, Default)]
pub(super) struct ValueNumbers {
    outlier: Outlier,
    heads: Vec<Vec<f32>>,
}

impl ValueNumbers {
    pub(super) fn new(outlier: Outlier) -> Self {
        Self {
            outlier,
            heads: Vec::new(),
        }
    }

    pub(super) fn start(&mut self, place: Place) {
        self.heads = vec![Vec::new(); place.heads];
    }

    /// Takes the numbers of the tokens that joined last.
    pub(super) fn joined(&mut self, rows: &dyn Rows) -> Result<()> {
        for (head, numbers) in self.heads.iter_mut().enumerate() {
            let new = rows.values(head, numbers.len())?;
            let values = new.chunks_exact(rows.head_dim());
            numbers.extend(values.map(|value| self.outlier.of(value)));
        }
        Ok(())
    }

    pub(super) fn relocate(&mut self, head: usize, moves: &Relocation) {
        moves.apply(&mut self.heads[head], 1);
    }

    pub(super) fn of(&self, head: usize) -> &[f32] {
        &self.heads[head]
    }

    pub(super) fn bytes(&self) -> usize {
        self.heads.iter().map(|numbers| numbers.len() * 4).sum()
    }
}

/// The indices of the `count` largest among `candidates`, the first of equal ones.
pub(super) fn largest(
    numbers: &[f32],
    candidates: impl Iterator<Item = usize>,
    count: usize,
) -> Vec<usize> {
    let mut order: Vec<usize> = candidates.collect();
    if (1..order.len()).contains(&count) {
        order.select_nth_unstable_by(count - 1, |&a, &b| {
            numbers[b].total_cmp(&numbers[a]).then(a.cmp(&b))
        });
    }
    order.truncate(count);
    order
}

/// Ranks the `count` values of a head that stand out most above everything else.
#[derive(Debug, Clone)]
pub struct ValueGuard<P> {
    inner: P,
    count: usize,
    numbers: ValueNumbers,
}

impl<P> ValueGuard<P> {
    /// Spares `count` tokens per head.
    pub fn new(inner: P, outlier: Outlier, count: usize) -> Self {
        Self {
            inner,
            count,
            numbers: ValueNumbers::new(outlier),
        }
    }
}

impl<P: Policy + Clone + 'static> Policy for ValueGuard<P> {
    fn name(&self) -> &'static str {
        self.inner.name()
    }
    fn needs(&self) -> Needs {
        self.inner.needs().with_new_values()
    }
    fn rule(&self, phase: Phase) -> Rule {
        // New values are looked for at the end of a row.
        let rule = self.inner.rule(phase);
        Rule {
            ahead: false,
            ..rule
        }
    }
    fn start(&mut self, place: Place) {
        self.numbers.start(place);
        self.inner.start(place);
    }
    fn joined(&mut self, rows: &dyn Rows) -> Result<()> {
        self.numbers.joined(rows)?;
        self.inner.joined(rows)
    }
    fn score(
        &mut self,
        head: usize,
        rows: &dyn Rows,
        clock: &Clock,
        scores: &mut [Score],
    ) -> Result<()> {
        self.inner.score(head, rows, clock, scores)?;
        for slot in largest(self.numbers.of(head), 0..scores.len(), self.count) {
            scores[slot] = Score {
                value: f32::INFINITY,
                tie: u32::MAX,
            };
        }
        Ok(())
    }
    fn relocate(&mut self, head: usize, moves: &Relocation) {
        self.numbers.relocate(head, moves);
        self.inner.relocate(head, moves);
    }
    fn state_bytes(&self) -> usize {
        self.numbers.bytes() + self.inner.state_bytes()
    }
    fn inner(&self) -> Option<&dyn Policy> {
        Some(&self.inner)
    }
    fn inner_mut(&mut self) -> Option<&mut dyn Policy> {
        Some(&mut self.inner)
    }
    fn boxed_clone(&self) -> Box<dyn Policy> {
        Box::new(self.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::golden::{self, D};

    #[test]
    fn ranges_equal_golden_values() {
        let values = golden::all_values();
        let ranges: Vec<f32> = values
            .chunks_exact(D)
            .take(8)
            .map(|v| Outlier::Range.of(v))
            .collect();
        let want = [
            1.980_408_19,
            1.946_769_42,
            1.950_012_8,
            1.971_954_11,
            1.923_127_06,
            1.980_411_77,
            1.980_086_21,
            17.320_344_9,
        ];
        golden::close(&ranges, &want, 1e-6);
        assert_eq!(largest(&ranges, 0..8, 1), [7]);
    }
}
