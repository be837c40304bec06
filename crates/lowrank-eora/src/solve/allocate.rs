//! Ranks of many layers under one budget of bytes.
//!
//! Rank i of a layer takes s_i² off its squared loss whatever the other ranks, and costs the bytes
//! of one column of B and one row of A. Gains fall within a layer, so taking ranks by gain per
//! byte minimises the weighted sum of squared losses, up to the last rank that no longer fits. A
//! model's perplexity need not follow that sum.

use super::Spectrum;
use crate::{Error, Result};
use std::cmp::Ordering;
use std::collections::BinaryHeap;

/// A layer that competes for ranks.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Candidate<'a> {
    /// Its spectrum, known up to the largest rank that it may get.
    pub spectrum: &'a Spectrum,
    /// What its squared loss counts.
    pub weight: f64,
    /// Bytes of one rank: (m + n) values as they will be stored.
    pub bytes_per_rank: u64,
    /// Its smallest rank.
    pub min: usize,
    /// Its largest rank.
    pub max: usize,
}

/// The next step of a layer: ranks taken at once, as kernels want multiples.
struct Step {
    layer: usize,
    ranks: usize,
    density: f64,
}

impl Ord for Step {
    fn cmp(&self, other: &Self) -> Ordering {
        // Of equals the first layer.
        (self.density.total_cmp(&other.density)).then(other.layer.cmp(&self.layer))
    }
}
impl PartialOrd for Step {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}
impl PartialEq for Step {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}
impl Eq for Step {}

/// A rank for each layer, multiples of `multiple_of` unless a minimum or maximum is none.
///
/// # Errors
/// When a weight is not a finite number ≥ 0, a minimum exceeds its maximum, a maximum exceeds the
/// known spectrum, the multiple or the bytes of a rank are zero, or the minima exceed the budget.
pub(crate) fn allocate(
    layers: &[Candidate<'_>],
    budget_bytes: u64,
    multiple_of: usize,
) -> Result<Vec<usize>> {
    let setting = |name, value: String, expected| Error::Setting {
        name,
        value,
        expected,
    };
    if multiple_of == 0 {
        return Err(setting("multiple of ranks", "0".into(), "a number ≥ 1"));
    }
    for layer in layers {
        if !(layer.weight.is_finite() && layer.weight >= 0.0) {
            let value = layer.weight.to_string();
            return Err(setting("layer weight", value, "a finite number ≥ 0"));
        }
        if layer.min > layer.max || layer.max > layer.spectrum.squares().len() {
            let value = format!("{} to {}", layer.min, layer.max);
            return Err(setting(
                "range of ranks",
                value,
                "a range within the known spectrum",
            ));
        }
        if layer.bytes_per_rank == 0 {
            return Err(setting("bytes of a rank", "0".into(), "a number ≥ 1"));
        }
    }
    let mut ranks: Vec<usize> = layers.iter().map(|layer| layer.min).collect();
    let needed = (layers.iter())
        .map(|layer| (layer.min as u64).saturating_mul(layer.bytes_per_rank))
        .fold(0u64, u64::saturating_add);
    if needed > budget_bytes {
        return Err(Error::Budget {
            budget: budget_bytes,
            needed,
        });
    }
    let mut left = budget_bytes - needed;
    let step = |index: usize, rank: usize| {
        let layer = &layers[index];
        // To the next multiple, or to the maximum.
        let end = ((rank / multiple_of + 1) * multiple_of).min(layer.max);
        let gain: f64 = layer.spectrum.squares()[rank..end].iter().sum();
        let taken = end - rank;
        (taken > 0 && gain * layer.weight > 0.0).then(|| Step {
            layer: index,
            ranks: taken,
            density: layer.weight * gain / (taken as u64 * layer.bytes_per_rank) as f64,
        })
    };
    let mut heap: BinaryHeap<Step> = (0..layers.len())
        .filter_map(|index| step(index, ranks[index]))
        .collect();
    while let Some(best) = heap.pop() {
        let cost = best.ranks as u64 * layers[best.layer].bytes_per_rank;
        // A layer whose step does not fit gets no more; cheaper ones may.
        if cost <= left {
            left -= cost;
            ranks[best.layer] += best.ranks;
            heap.extend(step(best.layer, ranks[best.layer]));
        }
    }
    Ok(ranks)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::assert_close;

    #[test]
    fn allocation_is_optimal_under_its_budget() {
        let spectra: Vec<Spectrum> = [
            [9.0, 4.0, 1.0, 0.5],
            [8.0, 7.0, 6.0, 0.1],
            [2.0, 0.3, 0.2, 0.1],
        ]
        .into_iter()
        .map(|squares| Spectrum::new(squares.to_vec(), 0.0))
        .collect();
        let layers: Vec<Candidate<'_>> = (spectra.iter())
            .map(|spectrum| Candidate {
                spectrum,
                weight: 1.0,
                bytes_per_rank: 10,
                min: 0,
                max: 4,
            })
            .collect();
        let gain = |ranks: &[usize]| -> f64 {
            ranks
                .iter()
                .zip(&spectra)
                .map(|(&r, s)| s.squares()[..r].iter().sum::<f64>())
                .sum()
        };
        for budget in 0..13 {
            let found = allocate(&layers, budget * 10, 1).expect("affordable");
            let best = (0..125)
                .map(|code| [code / 25, code / 5 % 5, code % 5])
                .filter(|ranks| ranks.iter().sum::<usize>() as u64 <= budget)
                .map(|ranks| gain(&ranks))
                .fold(0.0, f64::max);
            assert_close(gain(&found), best, 1e-12);
        }
        assert_eq!(allocate(&layers, 45, 2).expect("affordable"), [2, 2, 0]);
        let mut bounded = layers.clone();
        bounded[2].min = 2;
        bounded[1].max = 1;
        assert_eq!(allocate(&bounded, 50, 1).expect("affordable"), [2, 1, 2]);
        bounded[0].weight = 0.0;
        assert_eq!(allocate(&bounded, 50, 1).expect("affordable"), [0, 1, 4]);
        let error = allocate(&bounded, 19, 1);
        assert!(matches!(
            error,
            Err(Error::Budget {
                budget: 19,
                needed: 20
            })
        ));
        bounded[0].max = 5;
        assert!(matches!(
            allocate(&bounded, 50, 1),
            Err(Error::Setting { .. })
        ));
    }
}
