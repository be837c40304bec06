//! Losses with their gradients.

use serde::{Deserialize, Serialize};

/// Quality on a set of examples.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Evaluation {
    /// Mean cross-entropy in nats, or mean squared error.
    pub loss: f64,
    /// Share of right classes or next symbols; absent for regression.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub accuracy: Option<f64>,
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
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Sums {
    pub(crate) loss: f64,
    pub(crate) right: usize,
    pub(crate) targets: usize,
}

impl Sums {
    pub(crate) fn add(&mut self, other: Sums) {
        self.loss += other.loss;
        self.right += other.right;
        self.targets += other.targets;
    }

    pub(crate) fn mean(&self, classes: bool) -> Evaluation {
        let n = self.targets.max(1) as f64;
        Evaluation {
            loss: self.loss / n,
            accuracy: classes.then(|| self.right as f64 / n),
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
