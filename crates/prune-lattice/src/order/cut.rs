//! Where an influence counts as an edge: cuts by mean out-degree, quantile or value.

use crate::{
    error::{Error, Result},
    influence::Influence,
};
use serde::{Deserialize, Serialize};

/// A threshold on influences. Values equal to the threshold are in; a zero influence never is an edge.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Cut {
    /// The largest threshold that lets in at least `degree * n` edges (ties let in more).
    Degree(f64),
    /// The threshold below which this share of the off-diagonal influences lies.
    Quantile(f64),
    /// The threshold itself, in units of the influence (not comparable across layers or networks).
    Value(f32),
}

/// The default grid: mean out-degrees 0.25, 0.5, ..., 4, the range in which reachability tells neurons apart.
pub fn default_cuts() -> Vec<Cut> {
    (1..=16).map(|k| Cut::Degree(0.25 * f64::from(k))).collect()
}

/// The threshold of every cut. Selects the top of the influences and sorts only that.
pub fn thresholds(influence: &Influence, cuts: &[Cut]) -> Result<Vec<f32>> {
    let n = influence.len();
    let pairs = n * n.saturating_sub(1);
    // How many edges a cut lets in; None for a cut by value.
    let edges = |cut: Cut| -> Result<Option<usize>> {
        let (count, what) = match cut {
            Cut::Value(v) if v.is_finite() && v >= 0.0 => return Ok(None),
            Cut::Value(v) => {
                return Err(cut_error(format!("value {v} is not a finite number ≥ 0")));
            }
            Cut::Degree(d) => (d * n as f64, d > 0.0 && d.is_finite()),
            Cut::Quantile(q) => ((1.0 - q) * pairs as f64, (0.0..1.0).contains(&q)),
        };
        if !what {
            return Err(cut_error(format!(
                "{cut:?}: a degree must be > 0 and a quantile in [0, 1)"
            )));
        }
        Ok(Some((count.round() as usize).clamp(1, pairs.max(1))))
    };
    let counts = cuts.iter().map(|&c| edges(c)).collect::<Result<Vec<_>>>()?;
    let most = counts.iter().flatten().copied().max().unwrap_or(0);
    let mut top: Vec<f32> = Vec::new();
    if most > 0 && pairs > 0 {
        top = influence.off_diagonal().collect();
        if most < top.len() {
            top.select_nth_unstable_by(most, |a, b| b.total_cmp(a));
            top.truncate(most);
        }
        top.sort_unstable_by(|a, b| b.total_cmp(a));
    }
    Ok(cuts
        .iter()
        .zip(counts)
        .map(|(cut, count)| match (cut, count) {
            (Cut::Value(v), _) => *v,
            (_, Some(count)) if !top.is_empty() => top[count - 1],
            _ => 0.0,
        })
        .collect())
}

fn cut_error(reason: String) -> Error {
    Error::Setting {
        setting: "cut",
        reason,
    }
}
