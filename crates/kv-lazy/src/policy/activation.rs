//! When a token counts as attended in a step.

use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};

/// The weight from which a token is *activated*.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Threshold {
    /// A fixed weight α; 1e-4 for most models in the LazyEviction paper.
    Absolute(f32),
    /// A multiple of the uniform weight 1/n.
    Uniform(f32),
    /// The most attended share of the tokens, in (0, 1].
    Top(f32),
}

impl Threshold {
    /// Checks the range.
    pub(crate) fn check(self) -> Result<()> {
        let (value, good) = match self {
            Threshold::Absolute(x) | Threshold::Uniform(x) => (x, x.is_finite() && x >= 0.0),
            Threshold::Top(x) => (x, x > 0.0 && x <= 1.0),
        };
        if good {
            return Ok(());
        }
        Err(Error::Setting {
            name: "threshold",
            value: value.to_string(),
            expected: "a weight or multiple of at least 0, or a share in (0, 1]",
        })
    }

    /// The weight that separates activated tokens from others in a step with these weights.
    pub fn level(self, weights: &[f32]) -> f32 {
        match self {
            Threshold::Absolute(alpha) => alpha,
            Threshold::Uniform(multiple) => multiple / weights.len().max(1) as f32,
            Threshold::Top(share) => {
                let active = (share * weights.len() as f32).ceil() as usize;
                if active >= weights.len() {
                    return f32::NEG_INFINITY;
                }
                let mut sorted = weights.to_vec();
                let (_, level, _) = sorted.select_nth_unstable_by(active, |a, b| b.total_cmp(a));
                *level
            }
        }
    }
}
