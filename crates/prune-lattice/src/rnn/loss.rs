//! Losses with their gradients.

use serde::{Deserialize, Serialize};

/// Quality on a set of examples.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Evaluation {
    /// Mean cross-entropy in nats, or mean squared error.
    pub loss: f64,
    /// Share of right classes, next symbols or decisions at 0.5; absent for regression.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub accuracy: Option<f64>,
    /// Area under the ROC curve, for targets that are 0 or 1 at every step and not all the same.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub auc: Option<f64>,
    /// Number of targets.
    pub targets: usize,
}

impl Evaluation {
    /// Cross-entropy in bits (per character, for a character model).
    pub fn bits(&self) -> f64 {
        self.loss / std::f64::consts::LN_2
    }
}

/// Sums over targets.
#[derive(Debug, Clone, Default)]
pub(crate) struct Sums {
    pub(crate) loss: f64,
    pub(crate) right: usize,
    pub(crate) targets: usize,
    /// Logit and target of every binary decision.
    pub(crate) decisions: Vec<(f32, f32)>,
}

impl Sums {
    pub(crate) fn add(&mut self, other: Sums) {
        self.loss += other.loss;
        self.right += other.right;
        self.targets += other.targets;
        self.decisions.extend(other.decisions);
    }

    pub(crate) fn mean(&self, classes: bool) -> Evaluation {
        let n = self.targets.max(1) as f64;
        Evaluation {
            loss: self.loss / n,
            accuracy: classes.then(|| self.right as f64 / n),
            auc: auc(&self.decisions),
            targets: self.targets,
        }
    }
}

/// Cross-entropy of rows of logits; the logits become the gradient of `scale` times the summed loss.
pub(crate) fn cross_entropy(
    logits: &mut [f32],
    classes: usize,
    targets: &[u32],
    scale: f32,
) -> Sums {
    let mut sums = Sums {
        targets: targets.len(),
        ..Sums::default()
    };
    for (row, &target) in logits.chunks_exact_mut(classes).zip(targets) {
        let target = target as usize;
        let best = (1..classes).fold(0, |b, k| if row[k] > row[b] { k } else { b });
        sums.right += usize::from(best == target);
        let (largest, own) = (row[best], row[target]);
        let mut total = 0f64;
        for v in row.iter_mut() {
            *v = (*v - largest).exp();
            total += f64::from(*v);
        }
        sums.loss += total.ln() - f64::from(own - largest);
        let inverse = scale / total as f32;
        row.iter_mut().for_each(|v| *v *= inverse);
        row[target] -= scale;
    }
    sums
}

/// Squared error; the predictions become the gradient of `scale` times the summed loss.
pub(crate) fn squared_error(predictions: &mut [f32], targets: &[f32], scale: f32) -> Sums {
    let mut sums = Sums {
        targets: targets.len(),
        ..Sums::default()
    };
    for (p, &t) in predictions.iter_mut().zip(targets) {
        let d = *p - t;
        sums.loss += f64::from(d) * f64::from(d);
        *p = 2.0 * scale * d;
    }
    sums
}

/// Binary cross-entropy of logits against probabilities; the logits become the gradient of `scale` times the summed loss.
pub(crate) fn binary_cross_entropy(logits: &mut [f32], targets: &[f32], scale: f32) -> Sums {
    let mut sums = Sums {
        targets: targets.len(),
        decisions: logits
            .iter()
            .copied()
            .zip(targets.iter().copied())
            .collect(),
        ..Sums::default()
    };
    for (z, &t) in logits.iter_mut().zip(targets) {
        let x = f64::from(*z);
        sums.right += usize::from((x > 0.0) == (t > 0.5));
        // -t ln σ(x) - (1 - t) ln(1 - σ(x)) without overflow.
        sums.loss += x.max(0.0) - x * f64::from(t) + (-x.abs()).exp().ln_1p();
        *z = scale * ((1.0 / (1.0 + (-x).exp())) as f32 - t);
    }
    sums
}

/// Area under the ROC curve of scores against targets of 0 and 1: the share of pairs (one of each) in the right order, ties
/// counted half. `None` where a target is neither 0 nor 1, or all are the same.
pub(crate) fn auc(decisions: &[(f32, f32)]) -> Option<f64> {
    let positive = decisions.iter().filter(|d| d.1 == 1.0).count();
    let negative = decisions.iter().filter(|d| d.1 == 0.0).count();
    if positive == 0 || negative == 0 || positive + negative != decisions.len() {
        return None;
    }
    let mut sorted = decisions.to_vec();
    sorted.sort_by(|a, b| a.0.total_cmp(&b.0));
    let (mut below, mut pairs) = (0usize, 0f64);
    for ties in sorted.chunk_by(|a, b| a.0 == b.0) {
        let ones = ties.iter().filter(|d| d.1 == 1.0).count();
        let zeros = ties.len() - ones;
        pairs += ones as f64 * (below as f64 + 0.5 * zeros as f64);
        below += zeros;
    }
    Some(pairs / (positive as f64 * negative as f64))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_area_under_the_curve_is_the_share_of_ordered_pairs_with_ties_counted_half() {
        let decisions: Vec<(f32, f32)> = (0..60)
            .map(|k| (((k * 37) % 11) as f32, ((k * k * 7) % 5 < 2) as u8 as f32))
            .collect();
        let (mut pairs, mut right) = (0.0, 0.0);
        for a in decisions.iter().filter(|d| d.1 == 1.0) {
            for b in decisions.iter().filter(|d| d.1 == 0.0) {
                pairs += 1.0;
                right += match a.0.total_cmp(&b.0) {
                    std::cmp::Ordering::Greater => 1.0,
                    std::cmp::Ordering::Equal => 0.5,
                    std::cmp::Ordering::Less => 0.0,
                };
            }
        }
        assert!((auc(&decisions).unwrap() - right / pairs).abs() < 1e-12);
        assert_eq!(auc(&[(1.0, 1.0), (0.5, 1.0)]), None);
        assert_eq!(auc(&[(1.0, 1.0), (0.5, 0.25)]), None);
    }

    #[test]
    fn binary_cross_entropy_and_its_gradient_agree_with_their_definitions() {
        let logits = [-3.0f32, 0.2, 40.0, -90.0];
        let targets = [0.0f32, 1.0, 0.25, 1.0];
        let mut gradient = logits;
        let sums = binary_cross_entropy(&mut gradient, &targets, 0.5);
        let loss = |z: f64, t: f64| {
            // ln σ(z) by its own formula on the side where it does not overflow.
            let log_sigmoid = |z: f64| {
                if z < -30.0 {
                    z
                } else {
                    -(1.0 + (-z).exp()).ln()
                }
            };
            -t * log_sigmoid(z) - (1.0 - t) * log_sigmoid(-z)
        };
        let expected: f64 = logits
            .iter()
            .zip(&targets)
            .map(|(z, t)| loss(f64::from(*z), f64::from(*t)))
            .sum();
        assert!(
            (sums.loss - expected).abs() < 1e-9,
            "{} {expected}",
            sums.loss
        );
        for k in 0..2 {
            let (z, t) = (f64::from(logits[k]), f64::from(targets[k]));
            let slope = (loss(z + 1e-4, t) - loss(z - 1e-4, t)) / 2e-4;
            assert!((f64::from(gradient[k]) - 0.5 * slope).abs() < 1e-6);
        }
        assert_eq!(sums.right, 2);
    }
}
