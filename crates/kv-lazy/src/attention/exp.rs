//! Vectorised `exp` for softmax: argument reduction by powers of two and a degree-six polynomial.
//!
//! In a softmax arguments are at most 0 (a maximum was subtracted). Below [`LOWEST`] the result is exactly 0, so that
//! masked scores of −∞ weigh nothing; NaN stays NaN, so that it is found in the sum.
//!
//! prune-lattice's networks have an `exp` of their own: between its products are plain loops over slices, which the compiler
//! vectorises without `pulp`, and neither crate may depend on the other.

use pulp::Simd;

/// Below this the result would be subnormal.
const LOWEST: f32 = -87.0;
/// 1.5·2²³ plus the exponent bias: adding it leaves the rounded integer, biased, in the low mantissa bits.
const ROUND: f32 = 12_582_912.0 + 127.0;
const LN2_HIGH: f32 = 0.693_359_4;
const LN2_LOW: f32 = -2.121_944_4e-4;
/// Minimax coefficients of (eʳ − 1 − r)/r² on |r| ≤ ln2/2, highest first.
const POLYNOMIAL: [f32; 6] = [
    1.987_569_1e-4,
    1.398_199_9e-3,
    8.333_452e-3,
    4.166_579_6e-2,
    1.666_666_5e-1,
    0.5,
];

/// eˣ for each lane, x ≤ 88; relative error below 3e-7. Exactly 0 below −87, NaN for NaN.
#[inline(always)]
pub fn exp<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    let round = simd.splat_f32s(ROUND);
    let shifted = simd.mul_add_f32s(x, simd.splat_f32s(std::f32::consts::LOG2_E), round);
    let scale = simd.transmute_f32s_u32s(
        simd.wrapping_dyn_shl_u32s(simd.transmute_u32s_f32s(shifted), simd.splat_u32s(23)),
    );
    let n = simd.sub_f32s(shifted, round);
    let r = simd.mul_add_f32s(n, simd.splat_f32s(-LN2_HIGH), x);
    let r = simd.mul_add_f32s(n, simd.splat_f32s(-LN2_LOW), r);
    let mut p = simd.splat_f32s(POLYNOMIAL[0]);
    for &c in &POLYNOMIAL[1..] {
        p = simd.mul_add_f32s(p, r, simd.splat_f32s(c));
    }
    let p = simd.mul_add_f32s(simd.mul_f32s(p, r), r, r);
    let e = simd.mul_add_f32s(p, scale, scale);
    simd.select_f32s(
        simd.less_than_f32s(x, simd.splat_f32s(LOWEST)),
        simd.splat_f32s(0.0),
        e,
    )
}

/// The same function for the elements that fill no vector.
#[inline(always)]
fn exp_scalar(x: f32) -> f32 {
    if x < LOWEST { 0.0 } else { x.exp() }
}

/// Replaces every score by e^(score − max) and returns their sum; lanes summed in a fixed order.
#[inline(always)]
pub(crate) fn exp_in_place<S: Simd>(simd: S, scores: &mut [f32], max: f32) -> f32 {
    let (head, tail) = S::as_mut_simd_f32s(scores);
    let offset = simd.splat_f32s(max);
    let mut sums = [simd.splat_f32s(0.0); 4];
    for (i, x) in head.iter_mut().enumerate() {
        *x = exp(simd, simd.sub_f32s(*x, offset));
        sums[i % 4] = simd.add_f32s(sums[i % 4], *x);
    }
    let sum = simd.add_f32s(
        simd.add_f32s(sums[0], sums[1]),
        simd.add_f32s(sums[2], sums[3]),
    );
    let mut total = simd.reduce_sum_f32s(sum);
    for x in tail {
        *x = exp_scalar(*x - max);
        total += *x;
    }
    total
}

#[cfg(test)]
mod tests {
    use super::*;
    use pulp::{Arch, WithSimd};

    struct Softmax<'a>(&'a mut [f32], f32);
    impl WithSimd for Softmax<'_> {
        type Output = f32;
        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) -> f32 {
            exp_in_place(simd, self.0, self.1)
        }
    }

    #[test]
    fn exp_is_within_a_few_ulps_and_minus_infinity_gives_zero() {
        let xs: Vec<f32> = (0..5000).map(|i| -0.0171 * i as f32).collect();
        let mut got = xs.clone();
        got.extend([f32::NEG_INFINITY, -1000.0]);
        let sum = Arch::new().dispatch(Softmax(&mut got, 0.0));
        for (x, e) in xs.iter().zip(&got) {
            let want = f64::from(*x).exp();
            assert!(
                (f64::from(*e) - want).abs() <= 3e-7 * want + 2e-38,
                "{x}: {e} {want}"
            );
        }
        assert_eq!(&got[5000..], [0.0, 0.0]);
        let want: f64 = xs.iter().map(|&x| f64::from(x).exp()).sum();
        assert!((f64::from(sum) - want).abs() < 1e-5 * want);
    }

    #[test]
    fn exp_holds_its_accuracy_up_to_88() {
        let xs: Vec<f32> = (0..=88_000).map(|i| 0.001 * i as f32).collect();
        let mut got = xs.clone();
        Arch::new().dispatch(Softmax(&mut got, 0.0));
        for (x, e) in xs.iter().zip(&got) {
            let want = f64::from(*x).exp();
            assert!(
                (f64::from(*e) - want).abs() <= 3e-7 * want,
                "{x}: {e} {want}"
            );
        }
    }

    #[test]
    fn nan_survives_to_the_sum() {
        let mut scores = vec![0.0; 37];
        scores[3] = f32::NAN;
        assert!(Arch::new().dispatch(Softmax(&mut scores, 0.0)).is_nan());
    }
}
