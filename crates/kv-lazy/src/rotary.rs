//! Rotary positions (RoPE) as the model applies them, for what works on keys before rotation.
//!
//! A pair of elements is a complex number c; at position p the model stores c · e^(iωp) with its own, scaled frequency ω. Rotations add:
//! a stored key moves by Δ positions when it is rotated by Δ. That is exact for frequencies that do not depend on the length of the text
//! (default, linear, Llama 3, static YaRN), up to the rounding of one rotation; it is not what the model would compute if it read the
//! shorter text, because deeper layers have already seen what was evicted. A constant factor on keys, as in YaRN, is in the key and stays there.

use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};

/// Which elements of a head are rotated together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Pairs {
    /// `i` and `i + r/2` of the r rotated elements.
    #[default]
    Halves,
    /// `2i` and `2i + 1`.
    Neighbours,
}

/// The rotation of a layer's keys.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
#[non_exhaustive]
pub struct Rotary {
    /// Radians per position of each pair, as the model scales them. Fewer pairs than half the head: the other elements are not rotated. None: a layer that does not rotate
    /// its keys (NoPE).
    pub frequencies: Vec<f64>,
    /// Which elements are pairs.
    #[serde(default)]
    pub pairs: Pairs,
}

impl Rotary {
    /// Rotation by these frequencies.
    pub fn new(frequencies: Vec<f64>, pairs: Pairs) -> Self {
        Self { frequencies, pairs }
    }

    /// θ^(−2f/d) for all pairs of a head of `head_dim`: rotation without scaling, in halves.
    pub fn plain(theta: f64, head_dim: usize) -> Self {
        let frequency = |f: usize| theta.powf(-2.0 * f as f64 / head_dim as f64);
        Self::new((0..head_dim / 2).map(frequency).collect(), Pairs::Halves)
    }

    /// Checks that the pairs fit a head and that the frequencies are numbers.
    pub(crate) fn check(&self, head_dim: usize) -> Result<()> {
        let pairs = self.frequencies.len();
        if 2 * pairs > head_dim || self.frequencies.iter().any(|f| !f.is_finite()) {
            return Err(Error::Setting {
                name: "rotary",
                value: format!("{pairs} frequencies for heads of {head_dim}"),
                expected: "finite frequencies, at most one per two elements",
            });
        }
        Ok(())
    }

    /// Whether the two rotate alike, up to the rounding of frequencies in f32.
    pub(crate) fn is_like(&self, other: &Self) -> bool {
        let near = |(a, b): (&f64, &f64)| (a - b).abs() <= 1e-6 * a.abs();
        self.pairs == other.pairs
            && self.frequencies.len() == other.frequencies.len()
            && self.frequencies.iter().zip(&other.frequencies).all(near)
    }

    /// The elements of pair `f`.
    pub(crate) fn pair(&self, f: usize) -> (usize, usize) {
        match self.pairs {
            Pairs::Halves => (f, f + self.frequencies.len()),
            Pairs::Neighbours => (2 * f, 2 * f + 1),
        }
    }

    /// Absolute values of the rotated pairs of a key or query.
    pub(crate) fn magnitudes(&self, row: &[f32], out: &mut [f32]) {
        let pairs = self.frequencies.len();
        match self.pairs {
            Pairs::Halves => {
                let (first, second) = (&row[..pairs], &row[pairs..2 * pairs]);
                for (out, (a, b)) in out.iter_mut().zip(first.iter().zip(second)) {
                    *out = (a * a + b * b).sqrt();
                }
            }
            Pairs::Neighbours => {
                for (out, [a, b]) in out.iter_mut().zip(row[..2 * pairs].as_chunks().0) {
                    *out = (a * a + b * b).sqrt();
                }
            }
        }
    }

    /// Elements that are rotated; they are the first.
    pub(crate) fn rotated(&self) -> usize {
        2 * self.frequencies.len()
    }

    /// Rotates a key or query by `positions`, forwards or backwards. Angles are computed in f64.
    pub fn rotate(&self, row: &mut [f32], positions: i64) {
        self.turn(row, &self.turns(positions));
    }

    /// Sine and cosine of each pair's rotation by `positions`, for several rows of a position.
    pub(crate) fn turns(&self, positions: i64) -> Vec<(f64, f64)> {
        let turn = |frequency: &f64| (frequency * positions as f64).sin_cos();
        self.frequencies.iter().map(turn).collect()
    }

    /// Rotates a key or query by `turns`.
    pub(crate) fn turn(&self, row: &mut [f32], turns: &[(f64, f64)]) {
        for (f, (sin, cos)) in turns.iter().enumerate() {
            let (i, j) = self.pair(f);
            let (a, b) = (f64::from(row[i]), f64::from(row[j]));
            row[i] = (a * cos - b * sin) as f32;
            row[j] = (a * sin + b * cos) as f32;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::golden;

    #[test]
    fn rotations_add_up() {
        let rotary = Rotary::plain(10_000.0, 64);
        for pairs in [Pairs::Halves, Pairs::Neighbours] {
            let rotary = Rotary::new(rotary.frequencies.clone(), pairs);
            let mut once = golden::keys(5);
            rotary.rotate(&mut once, 40);
            let mut twice = golden::keys(5);
            rotary.rotate(&mut twice, 55);
            rotary.rotate(&mut twice, -15);
            golden::close(
                &twice,
                &once.iter().map(|&x| x.into()).collect::<Vec<_>>(),
                1e-5,
            );
        }
    }

    #[test]
    fn a_key_moved_from_31_to_5_equals_golden_values() {
        let rotary = Rotary::plain(10_000.0, golden::D);
        let mut key = golden::keys(31);
        rotary.rotate(&mut key, 31);
        rotary.rotate(&mut key, 5 - 31);
        let want = [
            -0.014_167_488_5,
            0.631_144_624,
            0.576_610_462,
            -0.975_697_02,
        ];
        golden::close(&key[..4], &want, 1e-5);
        let mut query = golden::queries()[7 * golden::D..8 * golden::D].to_vec();
        rotary.rotate(&mut query, 8);
        let products = query.iter().zip(&key).map(|(q, k)| f64::from(q * k));
        let logit = products.sum::<f64>() / 8.0;
        assert!((logit + 0.648_504_203).abs() < 1e-5, "{logit}");
    }

    #[test]
    fn a_thousand_rotations_by_one_are_exact_in_f32_and_not_in_f16() {
        let rotary = Rotary::plain(10_000.0, golden::D);
        let (start, mut once) = (golden::keys(31), golden::keys(31));
        rotary.rotate(&mut once, 1000);
        let far = |rounded: &dyn Fn(f32) -> f32| {
            let mut key = start.clone();
            for _ in 0..1000 {
                rotary.rotate(&mut key, 1);
                key.iter_mut().for_each(|x| *x = rounded(*x));
            }
            let norm = |of: &dyn Fn(usize) -> f32| {
                let squares = (0..golden::D).map(|i| f64::from(of(i)).powi(2));
                squares.sum::<f64>().sqrt()
            };
            norm(&|i| key[i] - once[i]) / norm(&|i| once[i])
        };
        // 7.8e-7 and 3.9e-2 of the golden values.
        let (wide, half) = (far(&|x| x), far(&|x| half::f16::from_f32(x).to_f32()));
        assert!(wide < 2e-6, "{wide}");
        assert!((0.01..0.1).contains(&half), "{half}");
    }

    #[test]
    fn frequencies_that_do_not_fit_a_head_are_refused() {
        assert!(Rotary::plain(1e4, 64).check(64).is_ok());
        assert!(Rotary::plain(1e4, 32).check(64).is_ok(), "partial rotation");
        assert!(Rotary::plain(1e4, 64).check(32).is_err());
        assert!(
            Rotary::new(vec![f64::NAN], Pairs::Halves)
                .check(64)
                .is_err()
        );
    }
}
