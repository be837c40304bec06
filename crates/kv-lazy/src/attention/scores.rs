//! From q·k to the argument of the softmax: a factor, and a cap where the model has one.

use super::exp::exp;
use pulp::Simd;
use serde::{Deserialize, Serialize};

/// What happens to q·k before the softmax: it is multiplied by `scale`, then squeezed to `cap · tanh(x / cap)`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Scores {
    /// Factor on q·k, usually 1/√d.
    pub scale: f64,
    /// Largest absolute score, for models that cap them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub softcap: Option<f64>,
}

impl From<f64> for Scores {
    /// A factor without a cap.
    fn from(scale: f64) -> Self {
        Self {
            scale,
            softcap: None,
        }
    }
}

impl Scores {
    /// The score of a scaled product.
    pub fn capped(self, scaled: f64) -> f64 {
        match self.softcap {
            Some(cap) => cap * (scaled / cap).tanh(),
            None => scaled,
        }
    }

    pub(crate) fn cap(self) -> Option<f32> {
        self.softcap.map(|cap| cap as f32)
    }
}

/// Replaces every x by `cap · tanh(x / cap)`; absolute error below 1e-6 of the cap. NaN stays NaN.
#[inline(always)]
pub fn softcap_in_place<S: Simd>(simd: S, scores: &mut [f32], cap: f32) {
    let (head, tail) = S::as_mut_simd_f32s(scores);
    let (caps, one) = (simd.splat_f32s(cap), simd.splat_f32s(1.0));
    let factor = simd.splat_f32s(-2.0 / cap);
    for x in head {
        // tanh|y| = (1 − e^(−2|y|)) / (1 + e^(−2|y|)), with the sign put back.
        let e = exp(simd, simd.mul_f32s(simd.abs_f32s(*x), factor));
        let tanh = simd.div_f32s(simd.sub_f32s(one, e), simd.add_f32s(one, e));
        let capped = simd.mul_f32s(caps, tanh);
        let negative = simd.less_than_f32s(*x, simd.splat_f32s(0.0));
        *x = simd.select_f32s(negative, simd.neg_f32s(capped), capped);
    }
    for x in tail {
        *x = cap * (*x / cap).tanh();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pulp::{Arch, WithSimd};

    struct Run<'a>(&'a mut [f32], f32);

    impl WithSimd for Run<'_> {
        type Output = ();

        fn with_simd<S: Simd>(self, simd: S) {
            softcap_in_place(simd, self.0, self.1);
        }
    }

    #[test]
    fn a_cap_squeezes_scores_as_tanh_does_and_leaves_infinite_and_undefined_ones_apart() {
        for cap in [5.0f32, 50.0] {
            let scores: Vec<f32> = (-211..212).map(|i| i as f32 * 1.37).collect();
            let mut capped = scores.clone();
            Arch::new().dispatch(Run(&mut capped, cap));
            let rule = Scores {
                scale: 1.0,
                softcap: Some(cap.into()),
            };
            for (x, y) in scores.iter().zip(capped) {
                let expected = rule.capped(f64::from(*x));
                assert!(
                    (f64::from(y) - expected).abs() < 1e-6 * f64::from(cap),
                    "{x}: {y}"
                );
            }
        }
        let mut special = vec![f32::NAN; 40];
        special[..20].fill(f32::NEG_INFINITY);
        Arch::new().dispatch(Run(&mut special, 5.0));
        assert!(special[..20].iter().all(|x| *x == -5.0));
        assert!(special[20..].iter().all(|x| x.is_nan()));
    }
}
