//! Sampling of tokens: fewer products with the same expected sums.
//!
//! A token is taken p times on average, p a share of the tokens times its importance relative to
//! the mean importance of all tokens so far, and then counts 1/p. Tokens with p ≥ 1 are always
//! taken and count one. p depends on earlier tokens only, and the draws are stratified over Σ p
//! along the stream: sums are unbiased, and the picks do not depend on how tokens are batched.
//!
//! A few tokens of language models carry most of Σ x xᵀ: uniform sampling misses them or counts
//! them many times over. Norms cost nothing; leverage scores (ridge leverage, INK-Estimate,
//! Calandriello et al. 2016) cost as much as the products they save and serve as a control.

use super::{Accumulation, GramCollector, Rows};
use crate::{Error, Result};
use faer::Mat;
use linalg::Cholesky;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

/// What makes a token important.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Importance {
    /// Nothing.
    Uniform,
    /// ‖x‖².
    Norm,
    /// Half uniform, half ‖x‖².
    #[default]
    Mixture,
    /// xᵀ (H + γ mean(diag H) I)⁻¹ x with the H of the tokens picked so far, taken anew whenever the
    /// number of tokens has doubled; the mixture before the first.
    Leverage {
        /// γ.
        ridge: f64,
    },
}

/// A token to be taken.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pick {
    /// Its index in the batch.
    pub token: usize,
    /// What it counts.
    pub weight: f64,
}

/// Picks tokens from a stream. Its state is not saved: a run that is taken up again draws anew.
#[derive(Clone, Debug)]
pub struct Sampler {
    importance: Importance,
    share: f64,
    rng: ChaCha8Rng,
    /// Σ p of the tokens that are drawn, and where in it the next draw lies.
    position: f64,
    stratum: f64,
    next: f64,
    tokens: u64,
    /// Leverage scores so far: how many, and their sum.
    scored: u64,
    scores: f64,
    norm_sum: f64,
    sketch: Option<Sketch>,
}

/// H of the tokens picked so far and a factor of an earlier state of it.
#[derive(Clone, Debug)]
struct Sketch {
    gram: GramCollector,
    ridge: f64,
    factor: Option<Cholesky>,
    refresh_at: u64,
}

/// Tokens before the first leverage scores.
const FIRST_SKETCH: u64 = 256;

impl Sampler {
    /// A sampler that takes about `share` (in (0, 1]) of the tokens.
    ///
    /// # Errors
    /// When the share or a ridge is out of range.
    pub fn new(importance: Importance, share: f64, seed: u64) -> Result<Self> {
        if !(share > 0.0 && share <= 1.0) {
            return Err(Error::Setting {
                name: "share of sampled tokens",
                value: share.to_string(),
                expected: "a number in (0, 1]",
            });
        }
        if let Importance::Leverage { ridge } = importance
            && !(ridge.is_finite() && ridge > 0.0)
        {
            return Err(Error::Setting {
                name: "ridge of leverage scores",
                value: ridge.to_string(),
                expected: "a number > 0",
            });
        }
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let next = rng.random::<f64>();
        Ok(Self {
            importance,
            share,
            rng,
            position: 0.0,
            stratum: 0.0,
            next,
            tokens: 0,
            scored: 0,
            scores: 0.0,
            norm_sum: 0.0,
            sketch: None,
        })
    }

    /// The tokens of the next batch that are taken, in their order.
    ///
    /// # Errors
    /// When the batches of leverage scores differ in width.
    pub fn pick(&mut self, rows: &Rows) -> Result<Vec<Pick>> {
        let mut picks = Vec::new();
        let mut start = 0;
        while start < rows.tokens() {
            let end = match self.importance {
                Importance::Leverage { ridge } => self.refresh(rows, ridge, start)?,
                _ => rows.tokens(),
            };
            let scores = self.leverage(rows, start..end);
            let before = picks.len();
            for token in start..end {
                let leverage = scores.as_ref().map(|s| s[token - start]);
                if let Some(weight) = self.draw(rows, token, leverage) {
                    picks.push(Pick { token, weight });
                }
            }
            if let Some(sketch) = &mut self.sketch {
                sketch.gram.update(&rows.picked(&picks[before..])?)?;
            }
            start = end;
        }
        Ok(picks)
    }

    /// The batch without the tokens that are not taken, weighted.
    ///
    /// # Errors
    /// As [`Self::pick`].
    pub fn sample(&mut self, rows: &Rows) -> Result<Rows> {
        rows.picked(&self.pick(rows)?)
    }

    /// The weight of the token if it is taken.
    fn draw(&mut self, rows: &Rows, token: usize, leverage: Option<f64>) -> Option<f64> {
        let norm: f64 = rows.row(token).iter().map(|&x| f64::from(x).powi(2)).sum();
        self.tokens += 1;
        self.norm_sum += norm;
        if let Some(score) = leverage {
            self.scored += 1;
            self.scores += score;
        }
        let relative = |value: f64, count: u64, sum: f64| {
            if sum > 0.0 {
                value * count as f64 / sum
            } else {
                1.0
            }
        };
        let by_norm = relative(norm, self.tokens, self.norm_sum);
        let importance = match (self.importance, leverage) {
            (Importance::Uniform, _) => 1.0,
            (Importance::Norm, _) => by_norm,
            (Importance::Mixture, _) | (Importance::Leverage { .. }, None) => (1.0 + by_norm) / 2.0,
            (Importance::Leverage { .. }, Some(score)) => relative(score, self.scored, self.scores),
        };
        let p = self.share * importance;
        if p >= 1.0 {
            return Some(1.0);
        }
        // One draw in each unit of Σ p; a token may lie across two units and be drawn twice.
        let end = self.position + p;
        let mut taken = 0.0;
        while self.stratum + self.next < end {
            taken += 1.0;
            self.stratum += 1.0;
            self.next = self.rng.random::<f64>();
        }
        self.position = end;
        (taken > 0.0).then(|| taken / p)
    }

    /// Takes new scores where they are due; returns the end of the tokens they hold for.
    fn refresh(&mut self, rows: &Rows, ridge: f64, start: usize) -> Result<usize> {
        let sketch = match &mut self.sketch {
            Some(sketch) => sketch,
            none => none.insert(Sketch {
                gram: GramCollector::new(rows.width(), Accumulation::Sum)?,
                ridge,
                factor: None,
                refresh_at: FIRST_SKETCH,
            }),
        };
        if self.tokens == sketch.refresh_at {
            let mut h = sketch.gram.clone().finish().matrix().to_owned();
            let n = h.nrows();
            let mean = (0..n).map(|i| h[(i, i)]).sum::<f64>() / n as f64;
            for i in 0..n {
                h[(i, i)] += sketch.ridge * mean;
            }
            sketch.factor = Cholesky::new(h).ok();
            sketch.refresh_at *= 2;
        }
        let left = (sketch.refresh_at - self.tokens) as usize;
        Ok(rows.tokens().min(start + left))
    }

    fn leverage(&self, rows: &Rows, tokens: std::ops::Range<usize>) -> Option<Vec<f64>> {
        let factor = self.sketch.as_ref()?.factor.as_ref()?;
        let first = tokens.start;
        let x = Mat::from_fn(rows.width(), tokens.len(), |j, t| {
            f64::from(rows.row(first + t)[j])
        });
        let solved = factor.solve(x.clone());
        let dot = |t: usize| {
            x.col(t)
                .iter()
                .zip(solved.col(t).iter())
                .map(|(a, b)| a * b)
                .sum()
        };
        Some((0..x.ncols()).map(dot).collect())
    }
}
