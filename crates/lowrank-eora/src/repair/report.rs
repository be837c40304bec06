//! What a repair did to each linear.

use super::LayerId;
use crate::compress::SweepReport;
use crate::solve::Spectrum;
use serde::{Deserialize, Serialize};
use std::iter::Sum;
use std::ops::Add;

/// Squared norms of the outputs of a linear, and of their errors, over a set of tokens.
///
/// X is what the layer is fed behind the repaired blocks before it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Energy {
    /// ‖W X‖².
    pub target: f64,
    /// ‖(W − W_c) X‖².
    pub before: f64,
    /// ‖(W − W_c − B A) X‖², with B and A as they are stored.
    pub after: f64,
}

impl Energy {
    /// Relative loss without B A: √(‖(W − W_c) X‖² / ‖W X‖²).
    pub fn loss_before(&self) -> f64 {
        ratio(self.before, self.target)
    }

    /// Relative loss: √(‖(W − W_c − B A) X‖² / ‖W X‖²).
    pub fn loss(&self) -> f64 {
        ratio(self.after, self.target)
    }
}

fn ratio(error: f64, target: f64) -> f64 {
    if error == 0.0 {
        return 0.0;
    }
    (error / target).sqrt()
}

impl Add for Energy {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            target: self.target + other.target,
            before: self.before + other.before,
            after: self.after + other.after,
        }
    }
}

impl Sum for Energy {
    fn sum<I: Iterator<Item = Self>>(energies: I) -> Self {
        energies.fold(Self::default(), Add::add)
    }
}

/// Seconds of wall time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Seconds {
    /// Collecting statistics: this linear's share of the passes that it shares with others.
    pub collect: f64,
    /// Compressing or reading W_c.
    pub compress: f64,
    /// Finding B and A, and their loss.
    pub solve: f64,
}

/// Bytes of a linear.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bytes {
    /// W as the dense checkpoint stores it.
    pub dense: u64,
    /// W_c, by the convention of [`StoredWeight::bytes`](super::StoredWeight::bytes).
    pub compressed: u64,
    /// B and A.
    pub factors: u64,
}

impl Add for Bytes {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            dense: self.dense + other.dense,
            compressed: self.compressed + other.compressed,
            factors: self.factors + other.factors,
        }
    }
}

impl Sum for Bytes {
    fn sum<I: Iterator<Item = Self>>(bytes: I) -> Self {
        bytes.fold(Self::default(), Add::add)
    }
}

/// The damping that the sweeps of a model ended with.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct Damping {
    /// The largest, as a share of the mean diagonal of H.
    pub largest: f64,
    /// Linears where it had to grow because H was not positive definite.
    pub raised: usize,
}

impl Damping {
    pub(crate) fn of(sweeps: impl Iterator<Item = SweepReport>) -> Option<Self> {
        sweeps.fold(None, |damping: Option<Self>, sweep| {
            let Self { largest, raised } = damping.unwrap_or(Self {
                largest: 0.0,
                raised: 0,
            });
            Some(Self {
                largest: largest.max(sweep.damping),
                raised: raised + usize::from(sweep.retries > 0),
            })
        })
    }
}

/// What merging by requantisation, W_c' = quantise(W_c + B A), leaves of a repair.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Requantised {
    /// ‖(W − W_c') X‖² on the calibration windows.
    pub calibration: f64,
    /// The same on the held-out windows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub held_out: Option<f64>,
    /// Bytes of W_c'.
    pub bytes: u64,
    /// What the last sweep of SparseGPT or GPTQ met.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sweep: Option<SweepReport>,
}

/// One linear.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct LayerReport {
    /// Which.
    pub layer: LayerId,
    /// m.
    pub outputs: usize,
    /// n.
    pub inputs: usize,
    /// Rank of B A; 0 where there is none.
    pub rank: usize,
    /// Calibration tokens.
    pub tokens: u64,
    /// On the tokens that the repair was fitted to.
    pub calibration: Energy,
    /// On tokens that calibration never saw.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub held_out: Option<Energy>,
    /// On the same tokens against what the dense model computes: ‖W X − (W_c + B A) X̂‖² with X the
    /// dense model's inputs. For drift-aware repairs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub held_out_drift: Option<Energy>,
    /// Merging by requantisation, where asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub requantised: Option<Requantised>,
    /// What the last sweep of SparseGPT or GPTQ met, where one compressed W: the damping that it ended with among it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sweep: Option<SweepReport>,
    /// What each rank gains in the method's norm, for [`Ranks::allocate`](super::Ranks::allocate).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spectrum: Option<Spectrum>,
    /// Seconds.
    pub seconds: Seconds,
    /// Bytes.
    pub bytes: Bytes,
    /// Bytes that the sums over tokens of its input held at most, in any pass; linears that read one
    /// input share them.
    #[serde(default)]
    pub statistics_bytes: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn losses_add_up_as_squares_and_a_layer_that_computes_nothing_has_none() {
        let layer = |target, after| Energy {
            target,
            before: 2.0 * after,
            after,
        };
        let all: Energy = [layer(3.0, 1.0), layer(13.0, 3.0)].into_iter().sum();
        assert_eq!((all.loss(), all.loss_before()), (0.5, 0.5f64.sqrt()));
        assert_eq!(layer(0.0, 0.0).loss(), 0.0);
    }
}
