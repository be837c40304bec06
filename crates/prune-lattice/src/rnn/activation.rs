//! Sigmoid and tanh over slices, written so that the compiler vectorises them; absolute error below 2e-7.
//!
//! kv-lazy has another `exp`, for lanes of `pulp` within a softmax; this one is for single numbers in loops, saturates where
//! that one gives 0, and neither crate may depend on the other.

/// e^x for |x| < 87, by Cody–Waite reduction to |r| ≤ ln2/2 and the Taylor polynomial of degree 6.
#[inline(always)]
fn exp(x: f32) -> f32 {
    // Adding 1.5 * 2^23 rounds to an integer, which then stands in the low bits.
    const ROUND: f32 = 12_582_912.0;
    const LN2_HIGH: f32 = 355.0 / 512.0;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let x = x.clamp(-87.0, 87.0);
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = x - n * LN2_HIGH - n * LN2_LOW;
    let p = 1.0 / 720.0;
    let p = p * r + 1.0 / 120.0;
    let p = p * r + 1.0 / 24.0;
    let p = p * r + 1.0 / 6.0;
    let p = p * r + 0.5;
    let p = p * r + 1.0;
    let p = p * r + 1.0;
    p * f32::from_bits((shifted.to_bits() << 23).wrapping_add(127 << 23))
}

#[inline(always)]
fn sigmoid_of(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

#[inline(always)]
pub(crate) fn tanh_of(x: f32) -> f32 {
    1.0 - 2.0 / (1.0 + exp(2.0 * x))
}

pub(crate) fn sigmoid(values: &mut [f32]) {
    values.iter_mut().for_each(|v| *v = sigmoid_of(*v));
}

pub(crate) fn tanh(values: &mut [f32]) {
    values.iter_mut().for_each(|v| *v = tanh_of(*v));
}

pub(crate) fn tanh_into(dst: &mut [f32], src: &[f32]) {
    dst.iter_mut().zip(src).for_each(|(d, s)| *d = tanh_of(*s));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sigmoid_and_tanh_agree_with_f64_to_single_precision() {
        for k in -40_000..=40_000 {
            let x = k as f32 * 0.0025;
            let (mut s, mut t) = ([x], [x]);
            sigmoid(&mut s);
            tanh(&mut t);
            assert!(
                (f64::from(s[0]) - 1.0 / (1.0 + (-f64::from(x)).exp())).abs() < 2e-7,
                "{x}"
            );
            assert!((f64::from(t[0]) - f64::from(x).tanh()).abs() < 2e-7, "{x}");
        }
    }

    #[test]
    fn nan_stays_nan() {
        let mut v = [f32::NAN];
        sigmoid(&mut v);
        assert!(v[0].is_nan());
    }
}
