//! DropKV: how far each of the last queries' outputs would move if a token were evicted.
//!
//! Without token j the weights are renormalised and the output o moves by p/(1 − p) · (o − v_j), exactly. The score is the square of that,
//! summed over the last w queries, averaged over the group and pooled along the sequence. It is a number in units of the output, so that heads can be
//! compared; for sets of tokens it is not additive. The authors cut the prompt once; `every` repeats it while decoding.

use super::config::quarter;
use super::snapkv::{Pooling, check_window};
use super::window::WindowLogits;
use super::{Budget, Clock, Needs, Phase, Policy, Rows, Rule, Score, Tunable};
use crate::attention::products::{mixes, products, softmax, squares};
use crate::error::Result;
use crate::store::Layout;
use serde::{Deserialize, Serialize};

/// Settings of [`DropKv`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default, deny_unknown_fields)]
#[non_exhaustive]
pub struct Settings {
    /// Last queries observed and newest tokens kept; 8.
    pub window: usize,
    /// Tokens pooled; 11.
    pub kernel: usize,
    /// First tokens kept; 4.
    pub sinks: usize,
    /// Steps between evictions; unset: 64, a quarter of the budget where that is less.
    pub every: Option<usize>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            window: 8,
            kernel: 11,
            sinks: 4,
            every: None,
        }
    }
}

impl Tunable for Settings {}

pub(super) fn build(settings: &Settings, budget: Budget) -> Result<Box<dyn Policy>> {
    let every = settings.every.unwrap_or_else(|| quarter(budget, 64));
    let (window, kernel) = (settings.window, settings.kernel);
    let policy = DropKv::new(window, kernel, settings.sinks, every)?;
    Ok(Box::new(policy))
}

/// Keeps the tokens without which outputs would move most.
#[derive(Debug, Clone, Copy)]
pub struct DropKv {
    window: usize,
    kernel: usize,
    sinks: usize,
    every: usize,
}

impl DropKv {
    /// Observes the last `window` queries every `every` steps, pools over `kernel` tokens.
    ///
    /// # Errors
    /// Windows of zero, an even kernel.
    pub fn new(window: usize, kernel: usize, sinks: usize, every: usize) -> Result<Self> {
        check_window(window, kernel, Some(every))?;
        Ok(Self {
            window,
            kernel,
            sinks,
            every,
        })
    }
}

/// Keeps 1 − p away from 0.
const EPSILON: f32 = 1e-6;

/// How far outputs move without each token: mean over the group of sums over the window's queries. `values` is `[n, d]`.
fn displacement(window: WindowLogits<'_>, values: &[f32], d: usize) -> Vec<f32> {
    let WindowLogits {
        mut logits,
        group,
        len,
        ..
    } = window;
    let rows = len.max(1);
    logits.chunks_exact_mut(rows).for_each(softmax);
    let outputs = mixes(&logits, values, d);
    let along = products(&outputs, values, d);
    let (lengths, own) = (squares(values, d), squares(&outputs, d));
    let mut moved = vec![0.0f64; len];
    let queries = logits.chunks_exact(rows).zip(along.chunks_exact(rows));
    for ((weights, along), &own) in queries.zip(&own) {
        let tokens = weights.iter().zip(along).zip(&lengths);
        for (moved, ((&p, &along), &length)) in moved.iter_mut().zip(tokens) {
            let distance = (length - 2.0 * along + own).max(0.0);
            let odds = p / (1.0 - p + EPSILON);
            *moved += f64::from(odds * odds * distance);
        }
    }
    moved.iter().map(|x| (x / group as f64) as f32).collect()
}

impl Policy for DropKv {
    fn name(&self) -> &'static str {
        "dropkv"
    }
    fn needs(&self) -> Needs {
        Needs::keys().with_values().with_queries(self.window)
    }
    fn rule(&self, _: Phase) -> Rule {
        Rule {
            // Scores are pooled over neighbours.
            layout: Layout::Compact,
            ..Rule::periodic(self.sinks, self.window, self.every)
        }
    }
    fn comparable(&self) -> bool {
        true
    }
    fn score(&mut self, head: usize, rows: &dyn Rows, _: &Clock, out: &mut [Score]) -> Result<()> {
        let window = WindowLogits::of(rows, head)?;
        let moved = displacement(window, &rows.values(head, 0)?, rows.head_dim());
        for (score, value) in out.iter_mut().zip(Pooling::Mean.apply(&moved, self.kernel)) {
            score.value = value;
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
    fn scores_equal_golden_values() {
        let rows = golden::Observed::new();
        let moved = displacement(
            WindowLogits::of(&rows, 0).unwrap(),
            &golden::all_values(),
            D,
        );
        let want = [
            0.083_532_049_4,
            0.127_332_769,
            0.470_089_129,
            0.240_399_537,
            1.780_044_68,
            0.085_924_890_3,
        ];
        golden::close(&moved[..6], &want, 1e-4);
        let pooled = Pooling::Mean.apply(&moved, 11);
        let want = [
            0.253_393_005,
            0.262_947_116,
            0.637_250_82,
            0.655_242_768,
            0.657_767_899,
            0.703_932_192,
        ];
        golden::close(&pooled[..6], &want, 1e-4);
    }

    #[test]
    fn what_leaving_a_token_out_moves_equals_the_golden_value() {
        let rows = golden::Observed::new();
        let mut window = WindowLogits::of(&rows, 0).unwrap();
        // Of eight positions and two heads, the first head's query at the fourth position.
        let from = 6 * window.len;
        window.logits = window.logits[from..from + window.len].to_vec();
        (window.group, window.positions) = (1, 1);
        let moved = displacement(window, &golden::all_values(), D)[11];
        assert!(
            (f64::from(moved) / 4.921_114_69e-5 - 1.0).abs() < 1e-4,
            "{moved}"
        );
    }

    #[test]
    fn one_token_s_score_is_the_square_of_what_its_removal_moves() {
        let rows = golden::Observed::new();
        let (values, removed) = (golden::all_values(), 17);
        let mut window = WindowLogits::of(&rows, 0).unwrap();
        // One query alone.
        window.logits.truncate(window.len);
        (window.group, window.positions) = (1, 1);
        let mut weights = window.logits.clone();
        let score = displacement(window, &values, D)[removed];
        let output = |weights: &[f32]| {
            let mut sum = vec![0.0; D];
            for (value, w) in values.chunks_exact(D).zip(weights) {
                sum.iter_mut().zip(value).for_each(|(sum, x)| *sum += w * x);
            }
            sum
        };
        let mut without = weights.clone();
        without[removed] = f32::NEG_INFINITY;
        softmax(&mut weights);
        softmax(&mut without);
        let (all, rest) = (output(&weights), output(&without));
        let moved: f32 = all.iter().zip(&rest).map(|(a, b)| (a - b) * (a - b)).sum();
        assert!((score - moved).abs() < 1e-4 * moved, "{score} {moved}");
    }
}
