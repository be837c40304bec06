//! How tokens are rounded.
//!
//! *Symmetric*: s = f16(max|x| / m) with m = 2^(b−1) − 1, c = x / s rounded to even and clamped to ±m, stored as c + 2^(b−1). *Asymmetric*: lo =
//! f16(min x), s = f16((max x − lo) / (2^b − 1)), c = (x − lo) / s. A group is a run of elements of one token, or one channel of
//! some consecutive tokens.

use half::f16;

/// How one side of a cache, its keys or its values, is packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Format {
    /// Elements of a head; a multiple of 8.
    pub(crate) head_dim: usize,
    /// Bits of a code: 4 or 8.
    pub(crate) bits: usize,
    pub(crate) symmetric: bool,
    /// Elements of a token that share a scale; a multiple of 8 that divides `head_dim`.
    pub(crate) group: usize,
    /// Block of the rotation before quantising; 1 for none.
    pub(crate) rotation: usize,
    /// Tokens of a group where groups run along channels; 0 where they run along tokens.
    pub(crate) channel: usize,
}

impl Format {
    /// Codes of a word.
    pub(crate) fn per_word(self) -> usize {
        32 / self.bits
    }

    /// Words of a token.
    pub(crate) fn words(self) -> usize {
        self.head_dim / self.per_word()
    }

    /// Groups of a token.
    pub(crate) fn groups(self) -> usize {
        self.head_dim / self.group
    }

    /// Scales of `tokens` tokens.
    pub(super) fn scales(self, tokens: usize) -> usize {
        if self.channel > 0 {
            tokens.div_ceil(self.channel).saturating_mul(self.head_dim)
        } else {
            tokens.saturating_mul(self.groups())
        }
    }

    /// Bytes of `tokens` tokens.
    pub(crate) fn bytes(self, tokens: usize) -> usize {
        let per_scale = if self.symmetric { 2 } else { 4 };
        tokens * self.words() * 4 + self.scales(tokens) * per_scale
    }

    /// Largest code.
    fn top(self) -> f64 {
        ((1u32 << self.bits) - 1).into()
    }

    /// Factor and offset of the codes of a group: x̂ = factor · code + offset.
    pub(crate) fn line(self, scale: f32, low: f32) -> (f32, f32) {
        let offset = if self.symmetric {
            -scale * (1u32 << (self.bits - 1)) as f32
        } else {
            low
        };
        (scale, offset)
    }
}

/// Scale and low of one group, whose codes go to `codes`; false where scale or low are beyond f16.
#[inline(always)]
pub(super) fn round(format: Format, x: &[f64], codes: &mut [u32]) -> (f16, f16, bool) {
    let top = format.top();
    let pairs = codes.iter_mut().zip(x);
    if format.symmetric {
        let m = (top - 1.0) / 2.0;
        let zero = (top + 1.0) / 2.0;
        let [_, most] = extremes(x, f64::abs);
        let scale = f16::from_f64(most / m);
        let s = scale.to_f64();
        if s == 0.0 {
            codes.fill(zero as u32);
        } else {
            for (code, x) in pairs {
                *code = ((x / s).round_ties_even().clamp(-m, m) + zero) as u32;
            }
        }
        return (scale, f16::ZERO, s.is_finite());
    }
    let [least, most] = extremes(x, |x| x);
    let low = f16::from_f64(least);
    let lo = low.to_f64();
    let scale = f16::from_f64((most - lo) / top);
    let s = scale.to_f64();
    if s == 0.0 {
        codes.fill(0);
    } else {
        for (code, x) in pairs {
            *code = ((x - lo) / s).round_ties_even().clamp(0.0, top) as u32;
        }
    }
    (scale, low, s.is_finite() && lo.is_finite())
}

/// The least and the greatest of `of(x)`, in lanes that the compiler makes vectors of.
#[inline(always)]
fn extremes(x: &[f64], of: impl Fn(f64) -> f64) -> [f64; 2] {
    let mut lanes = [[f64::INFINITY, f64::NEG_INFINITY]; 8];
    // Groups along tokens are multiples of 8, those along channels 32.
    for eight in x.chunks(8) {
        for (lane, &x) in lanes.iter_mut().zip(eight) {
            let x = of(x);
            *lane = [lane[0].min(x), lane[1].max(x)];
        }
    }
    lanes
        .into_iter()
        .fold([f64::INFINITY, f64::NEG_INFINITY], |all, lane| {
            [all[0].min(lane[0]), all[1].max(lane[1])]
        })
}
