//! One factor for each expert that stays.
//!
//! With v_e = g'_e f_e what expert e adds behind the new routing, and y the dense output, the factors solve
//! `(M + ρ diag M) s = b + ρ diag M · 1`, where M_ef = Σ ⟨v_e, v_f⟩ and b_e = Σ ⟨v_e, y⟩ over tokens. They go into the
//! down projections, so that the router and all shapes stay those of the stock model.

use super::Compensate;
use crate::experts::layer::{Batch, Layer};
use crate::experts::method::Choice;
use crate::experts::routing::restricted;
use crate::{Error, Result};
use causal_lm::Decoder;
use causal_lm::mixture::RoutingRule;
use faer::Mat;
use linalg::Cholesky;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

/// Factors on experts' outputs by least squares.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct ExpertScale {
    /// ρ: how strongly factors are drawn to 1.
    pub ridge: f64,
}

impl Default for ExpertScale {
    fn default() -> Self {
        Self { ridge: 0.01 }
    }
}

impl Compensate for ExpertScale {
    fn factors(&self, layer: &Layer<'_>, choice: &Choice) -> Result<Vec<Vec<f64>>> {
        if choice.members.iter().any(|members| !members.is_empty()) {
            return Err(merged_are_not_run(layer.decoder));
        }
        let moments = Moments::of(layer, layer.rule, &choice.kept)?;
        let factors = moments.solve(self.ridge, layer.index)?;
        Ok(factors.into_iter().map(|factor| vec![factor]).collect())
    }
}

/// What is said of factors for merged experts.
fn merged_are_not_run(decoder: &Decoder<'_>) -> Error {
    Error::Unsupported {
        method: "expert-scale",
        model_type: decoder.config().model_type,
        reason: "it needs the outputs of the experts that stay, and merged ones are not run",
    }
}

/// Second moments of what experts add to a layer's output.
pub(crate) struct Moments {
    /// Σ ⟨v_e, v_f⟩, row by row.
    pub(crate) products: Vec<f64>,
    /// Σ ⟨v_e, y⟩.
    pub(crate) targets: Vec<f64>,
    /// Σ ‖y‖².
    pub(crate) energy: f64,
}

impl Moments {
    pub(crate) fn new(experts: usize) -> Self {
        Self {
            products: vec![0.0; experts * experts],
            targets: vec![0.0; experts],
            energy: 0.0,
        }
    }

    /// Of tokens that are routed by `rule` among `kept`.
    pub(crate) fn of(layer: &Layer<'_>, rule: RoutingRule, kept: &[usize]) -> Result<Self> {
        let mut moments = Self::new(kept.len());
        layer.for_each_rerouted(kept, |batch| {
            moments.add(batch, rule, kept);
            Ok(())
        })?;
        Ok(moments)
    }

    pub(crate) fn add(&mut self, batch: Batch<'_>, rule: RoutingRule, kept: &[usize]) {
        let count = self.targets.len();
        let place = |expert: usize| kept.binary_search(&expert).ok();
        let of_token = |token: usize| {
            let y = batch.sum(token, batch.gates(token));
            let gates = restricted(rule, batch.logits(token), |e| place(e).is_some());
            let added: Vec<(usize, Vec<f64>)> = gates
                .into_iter()
                .filter_map(|(e, gate)| {
                    let row = batch.outputs.row(token, e).iter();
                    Some((place(e)?, row.map(|&x| gate * f64::from(x)).collect()))
                })
                .collect();
            (y, added)
        };
        // Few tokens at a time: each holds the outputs of its experts.
        for first in (0..batch.outputs.tokens).step_by(256) {
            let last = (first + 256).min(batch.outputs.tokens);
            let tokens: Vec<_> = (first..last).into_par_iter().map(of_token).collect();
            for (y, added) in tokens {
                self.energy += dot(&y, &y);
                for (at, (a, v)) in added.iter().enumerate() {
                    self.targets[*a] += dot(v, &y);
                    for (b, w) in &added[at..] {
                        let product = dot(v, w);
                        self.products[a * count + b] += product;
                        if a != b {
                            self.products[b * count + a] += product;
                        }
                    }
                }
            }
        }
    }

    /// Σ ‖y − Σ s v‖².
    pub(crate) fn error(&self, factors: &[f64]) -> f64 {
        let count = factors.len();
        let mut error = self.energy;
        for (a, &s) in factors.iter().enumerate() {
            let row = &self.products[a * count..][..count];
            error += s * (dot(row, factors) - 2.0 * self.targets[a]);
        }
        error.max(0.0)
    }

    /// The best single factor for all experts.
    pub(crate) fn one_factor(&self) -> f64 {
        let square: f64 = self.products.iter().sum();
        match square > 0.0 {
            true => self.targets.iter().sum::<f64>() / square,
            false => 1.0,
        }
    }

    /// The best factors; 1 for experts that add nothing.
    pub(crate) fn solve(&self, ridge: f64, layer: usize) -> Result<Vec<f64>> {
        let count = self.targets.len();
        let active: Vec<usize> = (0..count)
            .filter(|&e| self.products[e * count + e] > 0.0)
            .collect();
        let diagonal = |e: usize| self.products[e * count + e];
        let matrix = Mat::from_fn(active.len(), active.len(), |i, j| {
            let (a, b) = (active[i], active[j]);
            let damping = if i == j { ridge * diagonal(a) } else { 0.0 };
            self.products[a * count + b] + damping
        });
        let right = Mat::from_fn(active.len(), 1, |i, _| {
            self.targets[active[i]] + ridge * diagonal(active[i])
        });
        let solved = Cholesky::new(matrix)
            .map_err(|_| Error::Singular { layer })?
            .solve(right);
        let mut factors = vec![1.0; count];
        for (i, &expert) in active.iter().enumerate() {
            factors[expert] = solved[(i, 0)];
        }
        Ok(factors)
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(x, y)| x * y).sum()
}
