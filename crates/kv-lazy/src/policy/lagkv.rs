//! LagKV (Liang et al., arXiv 2504.04704) in its causal form: how widely a token's channels spread, measured against the chunk before.
//!
//! After the sinks, resident tokens are cut into chunks of L in the order of their positions. Each channel of keys and values is scaled by the minimum and
//! maximum that it has in the previous chunk (the first chunk: in itself); a token's spread is the standard deviation over its channels; spreads become a softmax over the
//! chunk, and the score is the mean over keys and values. Tokens are ranked within their chunk, so that every chunk loses the same share. The
//! authors scale by the *next* chunk, which is not known while decoding. The newest whole chunk and what follows it stay.

use super::config::quarter;
use super::{Budget, Clock, Needs, Phase, Policy, Rows, Rule, Score, Tunable};
use crate::attention::products::softmax;
use crate::error::{Error, Result};
use crate::store::Layout;
use pulp::{Arch, Simd, WithSimd};
use serde::{Deserialize, Serialize};

/// Settings of [`LagKv`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default, deny_unknown_fields)]
#[non_exhaustive]
pub struct Settings {
    /// First tokens kept; 4.
    pub sinks: usize,
    /// L, tokens of a chunk, newest tokens kept and steps between evictions; unset: 128, a quarter of the budget where that is less.
    pub lag: Option<usize>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            sinks: 4,
            lag: None,
        }
    }
}

impl Tunable for Settings {}

pub(super) fn build(settings: &Settings, budget: Budget) -> Result<Box<dyn Policy>> {
    let lag = settings.lag.unwrap_or_else(|| quarter(budget, 128));
    Ok(Box::new(LagKv::new(settings.sinks, lag)?))
}

/// Keeps the tokens whose channels spread most against the chunk before.
#[derive(Debug, Clone, Copy)]
pub struct LagKv {
    sinks: usize,
    lag: usize,
}

impl LagKv {
    /// Chunks of `lag` tokens after `sinks` first ones.
    ///
    /// # Errors
    /// A chunk of no tokens.
    pub fn new(sinks: usize, lag: usize) -> Result<Self> {
        if lag == 0 {
            return Err(Error::ZeroWindow { name: "lag" });
        }
        Ok(Self { sinks, lag })
    }
}

/// Softmax of the spread of each token of `chunk` against `reference`, both `[tokens, d]`, with the machine's widest vectors.
fn spreads(chunk: &[f32], reference: &[f32], d: usize) -> Vec<f32> {
    let mut spreads = Arch::new().dispatch(Spreads {
        chunk,
        reference,
        d,
    });
    softmax(&mut spreads);
    spreads
}

struct Spreads<'a> {
    chunk: &'a [f32],
    reference: &'a [f32],
    d: usize,
}

impl WithSimd for Spreads<'_> {
    type Output = Vec<f32>;

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> Vec<f32> {
        let d = self.d;
        let mut low = vec![f32::INFINITY; d];
        let mut high = vec![f32::NEG_INFINITY; d];
        for row in self.reference.chunks_exact(d) {
            for ((low, high), &x) in low.iter_mut().zip(&mut high).zip(row) {
                *low = if x < *low { x } else { *low };
                *high = if x > *high { x } else { *high };
            }
        }
        // A channel that is constant in the reference says nothing.
        let mut inverses = vec![0.0f32; d];
        for (inverse, (&low, &high)) in inverses.iter_mut().zip(low.iter().zip(&high)) {
            let of_range = 1.0 / (high - low);
            *inverse = if of_range.is_finite() { of_range } else { 0.0 };
        }
        let mut scaled = vec![0.0f32; d];
        let mut spreads = vec![0.0f32; self.chunk.len() / d];
        for (spread, row) in spreads.iter_mut().zip(self.chunk.chunks_exact(d)) {
            let channels = row.iter().zip(&low).zip(&inverses);
            for (scaled, ((x, low), inverse)) in scaled.iter_mut().zip(channels) {
                *scaled = (x - low) * inverse;
            }
            let mean = sum(&scaled, |x| x) / d as f32;
            let squares = sum(&scaled, |x| (x - mean) * (x - mean));
            *spread = (squares / (d.max(2) - 1) as f32).sqrt();
        }
        spreads
    }
}

/// The sum of what `of` makes of each element, in lanes that the compiler makes vectors of.
#[inline(always)]
fn sum(row: &[f32], of: impl Fn(f32) -> f32) -> f32 {
    let mut lanes = [0.0f32; 16];
    let (chunks, tail) = row.as_chunks::<16>();
    for chunk in chunks {
        for (lane, &x) in lanes.iter_mut().zip(chunk) {
            *lane += of(x);
        }
    }
    let tail: f32 = tail.iter().map(|&x| of(x)).sum();
    lanes.iter().sum::<f32>() + tail
}

/// Scores of a chunk of keys and values against its reference.
fn scores(chunk: [&[f32]; 2], reference: [&[f32]; 2], d: usize) -> Vec<f32> {
    let [keys, values] = [0, 1].map(|side| spreads(chunk[side], reference[side], d));
    keys.iter()
        .zip(&values)
        .map(|(k, v)| (k + v) / 2.0)
        .collect()
}

/// The place of each score among all, smallest first; of equal ones the first is smaller.
fn ranks(scores: &[f32]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|&a, &b| scores[a].total_cmp(&scores[b]).then(a.cmp(&b)));
    let mut ranks = vec![0; scores.len()];
    for (rank, at) in order.into_iter().enumerate() {
        ranks[at] = rank;
    }
    ranks
}

impl Policy for LagKv {
    fn name(&self) -> &'static str {
        "lagkv"
    }
    fn needs(&self) -> Needs {
        Needs::keys().with_values()
    }
    fn rule(&self, _: Phase) -> Rule {
        Rule {
            // Chunks are runs of neighbours.
            layout: Layout::Compact,
            ..Rule::periodic(self.sinks, self.lag, self.lag)
        }
    }
    fn score(&mut self, head: usize, rows: &dyn Rows, _: &Clock, out: &mut [Score]) -> Result<()> {
        let d = rows.head_dim();
        let (keys, values) = (rows.keys(head, 0)?, rows.values(head, 0)?);
        let sinks = rows
            .ids(head)
            .partition_point(|&id| (id as usize) < self.sinks);
        let chunks = out.len().saturating_sub(sinks) / self.lag;
        let part = |index: usize| {
            let from = (sinks + index * self.lag) * d;
            let to = from + self.lag * d;
            [&keys[from..to], &values[from..to]]
        };
        for score in out.iter_mut() {
            *score = Score::new(1.0);
        }
        for index in 0..chunks.saturating_sub(1) {
            let scores = scores(part(index), part(index.saturating_sub(1)), d);
            let first = sinks + index * self.lag;
            for (score, rank) in out[first..].iter_mut().zip(ranks(&scores)) {
                score.value = rank as f32 / self.lag as f32;
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
    use crate::golden::{self, D};

    #[test]
    fn scores_and_ranks_equal_golden_values() {
        let (keys, values) = (golden::all_keys(), golden::all_values());
        let part = |index: usize| {
            let range = (4 + 11 * index) * D..(15 + 11 * index) * D;
            [&keys[range.clone()], &values[range]]
        };
        let next = scores(part(0), part(1), D);
        let want = [
            0.064_112_222_9,
            0.063_111_560_5,
            0.063_887_687_5,
            0.357_838_079,
            0.065_211_164_3,
            0.064_788_314_7,
        ];
        golden::close(&next[..6], &want, 1e-5);
        assert_eq!(ranks(&next), [3, 0, 1, 10, 9, 8, 4, 6, 2, 5, 7]);
        let previous = scores(part(1), part(0), D);
        let want = [
            0.088_015_120_2,
            0.092_031_063_3,
            0.088_658_952_4,
            0.090_180_851_4,
            0.089_591_592_4,
            0.088_947_787_7,
        ];
        golden::close(&previous[..6], &want, 1e-5);
        assert_eq!(ranks(&previous), [0, 7, 1, 4, 3, 2, 6, 5, 8, 10, 9]);
    }
}
