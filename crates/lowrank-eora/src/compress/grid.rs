//! The values that a quantised weight can take: w ≈ scale · (code − zero), code in 0 ..= 2^bits − 1.
//!
//! Scale and zero are fitted to the range of a group of weights of one output, which always contains 0, so that a
//! pruned weight stays exactly 0 (the quantiser of GPTQ, arXiv 2210.17323, section 2). Two grids are those of GGUF
//! blocks: [`Symmetry::Signed`] and [`Symmetry::Offset`].

use half::f16;

/// Bits of a code: 2, 3, 4 or 8.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Bits(u8);

impl Bits {
    /// 2, 3, 4 or 8; None for another number.
    pub fn new(bits: u8) -> Option<Self> {
        matches!(bits, 2 | 3 | 4 | 8).then_some(Self(bits))
    }

    /// The number of bits.
    pub fn get(self) -> usize {
        usize::from(self.0)
    }

    /// The largest code, 2^bits − 1.
    pub fn max_code(self) -> u8 {
        u8::MAX >> (8 - self.0)
    }

    /// The zero point of a symmetric grid, 2^(bits−1).
    pub fn middle(self) -> u8 {
        1 << (self.0 - 1)
    }
}

/// Which weights of an output share scale and zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Group {
    /// All of them.
    Channel,
    /// This many columns; the last group may be shorter.
    Columns(usize),
}

impl Group {
    /// Columns of a group in a weight with `columns` columns.
    pub fn width(self, columns: usize) -> usize {
        match self {
            Self::Channel => columns.max(1),
            Self::Columns(width) => width,
        }
    }

    /// Number of groups.
    pub fn count(self, columns: usize) -> usize {
        columns.div_ceil(self.width(columns))
    }
}

/// Where the zero point lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Symmetry {
    /// Anywhere: the range is that of the weights, extended to contain 0.
    Asymmetric,
    /// In the middle: the range is ± the largest magnitude.
    Symmetric,
    /// As the reference code of GPTQ does it: symmetric, but a group without negative weights keeps the range 0 ..= max
    /// while its zero point lies in the middle, which clips everything above about half the maximum. For comparison only.
    SymmetricClipped,
    /// In the middle, with a scale that may be negative: the weight of the largest magnitude has code 0, so that all
    /// codes are used. The grid of GGUF's `Q4_0`.
    Signed,
    /// None: w ≈ scale · code + offset with a float offset, from the smallest to the largest weight. The grid of GGUF's
    /// `Q4_1`. 0 need not be among its values, so that pruned weights do not stay 0.
    Offset,
}

/// How the range of a group is found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Range {
    /// From the smallest to the largest weight.
    MinMax,
    /// The best of 80 shrunken ranges, by steps of 1 %, under Σ|error|^2.4 (the `mse` option of GPTQ).
    Mse,
}

/// To what scales are rounded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ScaleDtype {
    /// f16, as files store them: the compressed weight is what a reader of the file gets.
    F16,
    /// Not at all.
    Exact,
}

/// Which values a weight can take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Grid {
    /// Bits per weight.
    pub bits: Bits,
    /// Weights that share scale and zero.
    pub group: Group,
    /// Where the zero point lies.
    pub symmetry: Symmetry,
    /// How ranges are found.
    pub range: Range,
    /// To what scales are rounded.
    pub scales: ScaleDtype,
}

/// Scale, zero and offset of one group.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Step {
    pub(crate) scale: f64,
    pub(crate) zero: u8,
    /// 0 unless the grid is [`Symmetry::Offset`].
    pub(crate) offset: f64,
    max: u8,
}

impl Step {
    /// The nearest code, halves to even.
    #[inline]
    pub(crate) fn code(self, weight: f64) -> u8 {
        let code = ((weight - self.offset) / self.scale).round_ties_even() + f64::from(self.zero);
        code.clamp(0.0, f64::from(self.max)) as u8
    }

    #[inline]
    pub(crate) fn value(self, code: u8) -> f64 {
        self.scale * (f64::from(code) - f64::from(self.zero)) + self.offset
    }
}

/// Smallest share of the range that the `mse` search tries is 1 − (STEPS − 1) / 100.
const MSE_STEPS: u32 = 80;
const MSE_POWER: f64 = 2.4;

impl Grid {
    /// Asymmetric, per output channel, f16 scales.
    pub fn new(bits: Bits) -> Self {
        Self {
            bits,
            group: Group::Channel,
            symmetry: Symmetry::Asymmetric,
            range: Range::MinMax,
            scales: ScaleDtype::F16,
        }
    }

    /// Offsets as a [`Quantised`](super::Quantised) holds them.
    pub(crate) fn stored_offsets(&self, offsets: Vec<f64>) -> Vec<f64> {
        match self.symmetry {
            Symmetry::Offset => offsets,
            _ => Vec::new(),
        }
    }

    /// Scale and zero for a group of weights.
    pub(crate) fn fit(&self, weights: &[f64]) -> Step {
        let first = match self.symmetry {
            Symmetry::Offset => weights.first().copied().unwrap_or(0.0),
            _ => 0.0,
        };
        let (mut lo, mut hi) = weights
            .iter()
            .fold((first, first), |(lo, hi), &w| (lo.min(w), hi.max(w)));
        match self.symmetry {
            Symmetry::Asymmetric | Symmetry::Offset => {}
            Symmetry::Signed => {
                // The end that code 0 stands for, of the first of equal magnitudes.
                let largest = hi.max(-lo);
                let end = weights.iter().find(|w| w.abs() == largest);
                (lo, hi) = match end {
                    Some(&end) if end > 0.0 => (largest, -largest),
                    _ => (-largest, largest),
                };
            }
            Symmetry::Symmetric => {
                hi = hi.max(-lo);
                lo = -hi;
            }
            Symmetry::SymmetricClipped => {
                hi = hi.max(-lo);
                if lo < 0.0 {
                    lo = -hi;
                }
            }
        }
        if lo == 0.0 && hi == 0.0 && self.symmetry != Symmetry::Offset {
            (lo, hi) = (-1.0, 1.0);
        }
        let full = self.step(lo, hi);
        match self.range {
            Range::MinMax => full,
            Range::Mse => {
                let mut best = (f64::INFINITY, full);
                for i in 0..MSE_STEPS {
                    let share = 1.0 - f64::from(i) / 100.0;
                    let step = self.step(share * lo, share * hi);
                    let error = weights.iter().fold(0.0, |sum, &w| {
                        sum + (step.value(step.code(w)) - w).abs().powf(MSE_POWER)
                    });
                    if error < best.0 {
                        best = (error, step);
                    }
                }
                best.1
            }
        }
    }

    fn step(&self, lo: f64, hi: f64) -> Step {
        let max = self.bits.max_code();
        let full = match self.symmetry {
            // From code 0 at one end to the middle, which is 0.
            Symmetry::Signed => -lo / f64::from(self.bits.middle()),
            _ => (hi - lo) / f64::from(max),
        };
        // Subnormal ranges must not end in a scale of 0.
        let mut size = full.abs().max(f64::MIN_POSITIVE);
        let zero = match self.symmetry {
            Symmetry::Asymmetric => (-lo / size).round_ties_even().clamp(0.0, f64::from(max)) as u8,
            Symmetry::Symmetric | Symmetry::SymmetricClipped | Symmetry::Signed => {
                self.bits.middle()
            }
            Symmetry::Offset => 0,
        };
        let mut offset = if self.symmetry == Symmetry::Offset {
            lo
        } else {
            0.0
        };
        if self.scales == ScaleDtype::F16 {
            let smallest = f16::from_bits(1).to_f64();
            let largest = f16::MAX.to_f64();
            size = f16::from_f64(size.clamp(smallest, largest)).to_f64();
            offset = f16::from_f64(offset.clamp(-largest, largest)).to_f64();
        }
        Step {
            scale: size.copysign(full),
            zero,
            offset,
            max,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn grid(bits: u8, symmetry: Symmetry) -> Grid {
        Grid {
            symmetry,
            scales: ScaleDtype::Exact,
            ..Grid::new(Bits::new(bits).expect("a width"))
        }
    }

    fn step(scale: f64, zero: u8, max: u8) -> Step {
        Step {
            scale,
            zero,
            offset: 0.0,
            max,
        }
    }

    #[test]
    fn a_signed_grid_gives_the_largest_weight_code_0_and_an_offset_grid_starts_at_the_smallest() {
        let signed = grid(4, Symmetry::Signed);
        let down = signed.fit(&[-1.0, 2.0, -2.0]);
        assert_eq!(down, step(-2.0 / 8.0, 8, 15));
        assert_eq!(
            (down.code(2.0), down.value(0), down.code(-2.0)),
            (0, 2.0, 15)
        );
        let up = signed.fit(&[1.0, -2.0, 2.0]);
        assert_eq!(up, step(2.0 / 8.0, 8, 15));
        assert_eq!((up.code(-2.0), up.value(up.code(0.0))), (0, 0.0));
        let offset = grid(4, Symmetry::Offset);
        let found = offset.fit(&[1.0, 4.0, 2.5]);
        assert_eq!(
            (found.scale, found.zero, found.offset),
            (3.0 / 15.0, 0, 1.0)
        );
        assert_eq!((found.value(found.code(1.0)), found.code(4.0)), (1.0, 15));
        // Scale and offset are both rounded before codes are chosen.
        let stored = Grid {
            scales: ScaleDtype::F16,
            ..offset
        };
        let found = stored.fit(&[0.1, 0.7, 0.33333]);
        for stored in [found.scale, found.offset] {
            assert_eq!(f16::from_f64(stored).to_f64(), stored);
        }
        let constant = stored.fit(&[0.25, 0.25]);
        assert_eq!(constant.value(constant.code(0.25)), 0.25);
        assert_eq!(stored.fit(&[0.0, 0.0]).value(0), 0.0);
    }

    #[test]
    fn ranges_contain_zero() {
        let asymmetric = grid(4, Symmetry::Asymmetric);
        assert_eq!(asymmetric.fit(&[-1.0, 2.0]), step(3.0 / 15.0, 5, 15));
        assert_eq!(asymmetric.fit(&[1.0, 3.0]), step(3.0 / 15.0, 0, 15));
        assert_eq!(asymmetric.fit(&[-3.0, -1.0]), step(3.0 / 15.0, 15, 15));
        assert_eq!(asymmetric.fit(&[0.0, 0.0]), step(2.0 / 15.0, 8, 15));
        let symmetric = grid(3, Symmetry::Symmetric);
        assert_eq!(symmetric.fit(&[-1.0, 2.0]), step(4.0 / 7.0, 4, 7));
        assert_eq!(symmetric.fit(&[1.0, 2.0]), step(4.0 / 7.0, 4, 7));
    }

    #[test]
    fn the_clipped_grid_loses_the_upper_half_of_a_group_without_negative_weights() {
        let clipped = grid(4, Symmetry::SymmetricClipped);
        let fitted = clipped.fit(&[0.1, 1.0]);
        assert_eq!(fitted, step(1.0 / 15.0, 8, 15));
        assert_eq!(fitted.value(fitted.code(1.0)), 7.0 / 15.0);
        let usual = clipped.fit(&[-0.1, 1.0]);
        assert_eq!(usual, grid(4, Symmetry::Symmetric).fit(&[-0.1, 1.0]));
    }

    #[test]
    fn halves_round_to_even_and_codes_are_clamped() {
        let step = step(1.0, 2, 7);
        let codes: Vec<u8> = [-9.0, -1.5, -0.5, 0.5, 1.5, 2.5, 9.0]
            .into_iter()
            .map(|w| step.code(w))
            .collect();
        assert_eq!(codes, [0, 0, 2, 2, 4, 4, 7]);
    }

    #[test]
    fn the_search_for_a_range_never_raises_its_error() {
        // One outlier among values that a smaller range would hold.
        let mut weights: Vec<f64> = (0..512)
            .map(|i| f64::from(i * 29 % 512) / 256.0 - 1.0)
            .collect();
        weights[5] = 2.0;
        let error = |range| {
            let grid = Grid {
                range,
                ..grid(3, Symmetry::Symmetric)
            };
            let step = grid.fit(&weights);
            let errors = weights
                .iter()
                .map(|&w| (step.value(step.code(w)) - w).abs());
            errors.map(|e| e.powf(MSE_POWER)).sum::<f64>()
        };
        assert!(error(Range::Mse) < 0.9 * error(Range::MinMax));
    }
}
