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
    let top = largest(influence.values(), most);
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

/// Values looked at to guess where the largest ones begin.
const SAMPLE: usize = 1 << 16;

/// The `count` largest values, descending (fewer where there are not as many). The guess from a sample only limits how many
/// values are selected from; the result is exact.
fn largest(values: &[f32], count: usize) -> Vec<f32> {
    let count = count.min(values.len());
    if count == 0 {
        return Vec::new();
    }
    let stride = values.len() / SAMPLE;
    let mut top = Vec::new();
    if stride > 1 {
        let mut sample: Vec<f32> = values.iter().step_by(stride).copied().collect();
        let at = (2 * count / stride + 16).min(sample.len() - 1);
        let (_, &mut guess, _) = sample.select_nth_unstable_by(at, |a, b| b.total_cmp(a));
        top.extend(values.iter().copied().filter(|v| *v >= guess));
    }
    if top.len() < count {
        top = values.to_vec();
    }
    if count < top.len() {
        top.select_nth_unstable_by(count, |a, b| b.total_cmp(a));
        top.truncate(count);
    }
    top.sort_unstable_by(|a, b| b.total_cmp(a));
    top
}

fn cut_error(reason: String) -> Error {
    Error::Setting {
        setting: "cut",
        reason,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::seed;
    use rand::Rng;

    #[test]
    fn the_largest_values_are_those_of_a_full_sort_with_and_without_a_useful_sample() {
        let mut rng = seed::rng(1, "cut");
        for len in [5, 1000, 300_000] {
            let spread: Vec<f32> = (0..len).map(|_| rng.random::<f32>().powi(3)).collect();
            // The sample sees none of the large values.
            let hidden: Vec<f32> = (0..len)
                .map(|k| if k % 4 == 1 { 1.0 + k as f32 } else { 0.5 })
                .collect();
            for values in [spread, hidden, vec![2.0; len]] {
                let mut sorted = values.clone();
                sorted.sort_unstable_by(|a, b| b.total_cmp(a));
                for count in [1, len / 7, len] {
                    assert_eq!(largest(&values, count), sorted[..count]);
                }
            }
        }
    }
}
