//! What each rank of a correction gains.

use serde::{Deserialize, Serialize};

/// Squared singular values of D X.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Spectrum {
    leading: Vec<f64>,
    rest: f64,
}

impl Spectrum {
    /// From the leading squares, falling, and the sum of all others.
    ///
    /// Negative values, which rounding leaves of zeros, become zero.
    pub fn new(mut leading: Vec<f64>, rest: f64) -> Self {
        for square in &mut leading {
            *square = square.max(0.0);
        }
        Self {
            leading,
            rest: rest.max(0.0),
        }
    }

    /// s₁² ≥ s₂² ≥ …: what the first, second, … rank takes off the squared loss. At least as many
    /// as the rank that was solved for.
    pub fn squares(&self) -> &[f64] {
        &self.leading
    }

    /// ‖D X‖²_F = Σ s².
    pub fn total(&self) -> f64 {
        self.tail(0)
    }

    fn tail(&self, rank: usize) -> f64 {
        let known = self.leading.get(rank..).unwrap_or_default();
        // From the smallest up, which keeps a tail far below the head.
        self.rest + known.iter().rev().sum::<f64>()
    }

    /// ‖(D − B A) X‖_F of the best correction of a rank, for ranks up to the number of known
    /// squares; beyond them an upper bound.
    pub fn loss(&self, rank: usize) -> f64 {
        self.tail(rank).sqrt()
    }

    /// The rank that a criterion picks from the known values.
    pub fn rank(&self, criterion: Criterion) -> usize {
        let known = &self.leading;
        match criterion {
            Criterion::Energy(share) => {
                let wanted = share * self.total();
                first_prefix(known.iter().copied(), wanted)
            }
            Criterion::Sum(share) => {
                let values = || known.iter().map(|square| square.sqrt());
                first_prefix(values(), share * values().sum::<f64>())
            }
            Criterion::Ratio(share) => (share * known.len() as f64) as usize,
            Criterion::Value(least) => known.iter().take_while(|s| s.sqrt() >= least).count(),
        }
    }
}

/// The shortest prefix with at least this sum; all where there is none.
fn first_prefix(values: impl ExactSizeIterator<Item = f64>, wanted: f64) -> usize {
    let all = values.len();
    let mut sum = 0.0;
    let mut values = values.enumerate();
    if wanted <= 0.0 {
        return 0;
    }
    values
        .find_map(|(i, value)| {
            sum += value;
            (sum >= wanted).then_some(i + 1)
        })
        .unwrap_or(all)
}

/// Simple rules for one layer's rank, as trained rank pruning uses them (arXiv 1910.04576), here on
/// the spectrum of D X.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Criterion {
    /// The fewest ranks with this share of Σ s².
    Energy(f64),
    /// The fewest ranks with this share of Σ s over the known values.
    Sum(f64),
    /// This share of the known values, rounded down.
    Ratio(f64),
    /// All s of at least this size.
    Value(f64),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rank_criteria_follow_their_definitions() {
        let spectrum = Spectrum::new(vec![16.0, 4.0, 1.0, 1.0], 0.0);
        assert_eq!(spectrum.rank(Criterion::Energy(0.9)), 2);
        assert_eq!(spectrum.rank(Criterion::Sum(0.9)), 4);
        assert_eq!(spectrum.rank(Criterion::Ratio(0.6)), 2);
        assert_eq!(spectrum.rank(Criterion::Value(2.0)), 2);
        assert_eq!(spectrum.rank(Criterion::Energy(1.0)), 4);
    }
}
