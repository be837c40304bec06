//! Searches for the scale, and the minimum, of a few values: those of ggml.
//!
//! All arithmetic is f32 in the order written; `x` are the values, `w` their weights, `codes` receives the codes.

/// Below this magnitude a group of values counts as zero.
const TINY: f32 = 1e-15;
/// Passes over the values that improve one code at a time.
const PASSES: usize = 5;
/// Most values of a search: the sub-blocks of a block, or the values of one.
const MOST: usize = 32;

/// To the nearest integer, halves to even.
#[inline(always)]
pub(super) fn nearest(x: f32) -> f32 {
    x.round_ties_even()
}

/// The value of the largest magnitude, with its sign; the first of several.
pub(super) fn extreme(x: &[f32]) -> f32 {
    let mut extreme = 0.0f32;
    for &value in x {
        if value.abs() > extreme.abs() {
            extreme = value;
        }
    }
    extreme
}

/// Which codes a search may use: `-half .. half` stored as `code + half`.
#[inline(always)]
fn clamp_symmetric(x: f32, half: f32) -> f32 {
    nearest(x).clamp(-half, half - 1.0)
}

/// A scale for codes `-half .. half`; of 19 starting scales the one with the least error after its least-squares fit.
pub(super) fn symmetric(x: &[f32], w: &[f32], half: f32, codes: &mut [u8]) -> f32 {
    let extreme = extreme(x);
    if extreme.abs() < TINY {
        codes.fill(0);
        return 0.0;
    }
    let (mut scale, mut best) = (0.0, 0.0);
    for tenths in std::iter::once(0).chain((-9..=9).filter(|&tenths| tenths != 0)) {
        let inverse = match tenths {
            0 => -half / extreme,
            _ => -(half + 0.1 * tenths as f32) / extreme,
        };
        let (mut xl, mut ll) = (0.0f32, 0.0f32);
        for (&x, &w) in x.iter().zip(w) {
            let l = clamp_symmetric(inverse * x, half);
            xl += w * x * l;
            ll += w * l * l;
        }
        let first = tenths == 0;
        if first || (ll > 0.0 && xl * xl > best * ll) {
            for (code, &x) in codes.iter_mut().zip(x) {
                *code = (clamp_symmetric(inverse * x, half) + half) as u8;
            }
            scale = if ll > 0.0 { xl / ll } else { 0.0 };
            best = scale * xl;
        }
    }
    scale
}

/// A scale for codes -4 .. 4 with weights x², from the fit of the largest value improved code by code.
pub(super) fn three_bits(x: &[f32], codes: &mut [u8]) -> f32 {
    let extreme = extreme(x);
    if extreme.abs() < TINY {
        codes.fill(0);
        return 0.0;
    }
    const HALF: f32 = 4.0;
    let inverse = -HALF / extreme;
    let mut levels = [0.0f32; MOST];
    let levels = &mut levels[..x.len()];
    let (mut xl, mut ll) = (0.0f32, 0.0f32);
    for (level, &x) in levels.iter_mut().zip(x) {
        let l = clamp_symmetric(inverse * x, HALF);
        *level = l;
        let w = x * x;
        xl += w * x * l;
        ll += w * l * l;
    }
    for _ in 0..PASSES {
        let mut changed = false;
        for (level, &x) in levels.iter_mut().zip(x) {
            let w = x * x;
            let mut xl_other = xl - w * x * *level;
            if xl_other > 0.0 {
                let mut ll_other = ll - w * *level * *level;
                let l = clamp_symmetric(x * ll_other / xl_other, HALF);
                if l != *level {
                    xl_other += w * x * l;
                    ll_other += w * l * l;
                    if ll_other > 0.0 && xl_other * xl_other * ll > xl * xl * ll_other {
                        (*level, xl, ll) = (l, xl_other, ll_other);
                        changed = true;
                    }
                }
            }
        }
        if !changed {
            break;
        }
    }
    for (code, level) in codes.iter_mut().zip(levels) {
        *code = (*level + HALF) as u8;
    }
    xl / ll
}

/// Which starting scales a search with minimum tries: `(first + step·k + n) / range` for k in `0 ..= steps`.
#[derive(Clone, Copy)]
pub(super) struct Starts {
    pub(super) first: f32,
    pub(super) step: f32,
    pub(super) steps: u32,
    /// Whether errors count by magnitude, not squared.
    pub(super) absolute: bool,
}

/// A scale and a minimum of at most 0, returned with its sign turned, for codes `0 ..= most`.
pub(super) fn with_minimum(
    x: &[f32],
    w: &[f32],
    most: f32,
    starts: Starts,
    codes: &mut [u8],
) -> (f32, f32) {
    let (mut min, mut max) = (x[0], x[0]);
    let (mut sum_w, mut sum_x) = (w[0], w[0] * x[0]);
    for (&x, &w) in x.iter().zip(w).skip(1) {
        min = min.min(x);
        max = max.max(x);
        sum_w += w;
        sum_x += w * x;
    }
    min = min.min(0.0);
    if max <= min {
        codes.fill(0);
        return (0.0, -min);
    }
    let error = |scale: f32, min: f32, levels: &[f32]| {
        let mut sum = 0.0f32;
        for ((&l, &x), &w) in levels.iter().zip(x).zip(w) {
            let difference = scale * l + min - x;
            sum += match starts.absolute {
                true => w * difference.abs(),
                false => w * (difference * difference),
            };
        }
        sum
    };
    let mut levels = [0.0f32; MOST];
    let levels = &mut levels[..x.len()];
    let inverse = most / (max - min);
    for (level, &x) in levels.iter_mut().zip(x) {
        *level = nearest(inverse * (x - min)).clamp(0.0, most);
    }
    let keep = |codes: &mut [u8], levels: &[f32]| {
        for (code, &level) in codes.iter_mut().zip(levels) {
            *code = level as u8;
        }
    };
    keep(codes, levels);
    let mut scale = 1.0 / inverse;
    let mut best = error(scale, min, levels);
    for k in 0..=starts.steps {
        // From the best minimum so far, not the least value: ggml's search does so.
        let inverse = (starts.first + starts.step * k as f32 + most) / (max - min);
        let (mut sum_l, mut sum_ll, mut sum_xl) = (0.0f32, 0.0f32, 0.0f32);
        for ((level, &x), &w) in levels.iter_mut().zip(x).zip(w) {
            let l = nearest(inverse * (x - min)).clamp(0.0, most);
            *level = l;
            sum_l += w * l;
            sum_ll += w * l * l;
            sum_xl += w * l * x;
        }
        let determinant = sum_w * sum_ll - sum_l * sum_l;
        if determinant > 0.0 {
            let mut fitted = (sum_w * sum_xl - sum_x * sum_l) / determinant;
            let mut least = (sum_ll * sum_x - sum_l * sum_xl) / determinant;
            if least > 0.0 {
                least = 0.0;
                fitted = sum_xl / sum_ll;
            }
            let found = error(fitted, least, levels);
            if found < best {
                keep(codes, levels);
                (best, scale, min) = (found, fitted, least);
            }
        }
    }
    (scale, -min)
}

/// A scale for codes `0 ..= most` of values of at least 0.
pub(super) fn positive(x: &[f32], w: &[f32], most: f32, codes: &mut [u8]) -> f32 {
    let max = x.iter().fold(0.0f32, |max, &x| max.max(x));
    if max < TINY {
        codes.fill(0);
        return 0.0;
    }
    let error = |inverse: f32| {
        let scale = 1.0 / inverse;
        let mut sum = 0.0f32;
        for (&x, &w) in x.iter().zip(w) {
            let difference = x - scale * nearest(inverse * x).min(most);
            sum += w * difference * difference;
        }
        sum
    };
    let mut inverse = most / max;
    let mut best = error(inverse);
    for tenths in (-4..=4).filter(|&tenths| tenths != 0) {
        let other = (0.1 * tenths as f32 + most) / max;
        let found = error(other);
        if found < best {
            (best, inverse) = (found, other);
        }
    }
    let mut levels = [0.0f32; MOST];
    let levels = &mut levels[..x.len()];
    let (mut xl, mut ll) = (0.0f32, 0.0f32);
    for ((level, &x), &w) in levels.iter_mut().zip(x).zip(w) {
        let l = nearest(inverse * x).min(most);
        *level = l;
        xl += w * x * l;
        ll += w * l * l;
    }
    for _ in 0..PASSES {
        let mut changed = false;
        for ((level, &x), &w) in levels.iter_mut().zip(x).zip(w) {
            let mut xl_other = xl - w * x * *level;
            let mut ll_other = ll - w * *level * *level;
            if xl_other > 0.0 && ll_other > 0.0 {
                let l = nearest(x * ll_other / xl_other).min(most);
                if l != *level {
                    xl_other += w * x * l;
                    ll_other += w * l * l;
                    if xl_other * xl_other * ll > xl * xl * ll_other {
                        (*level, xl, ll) = (l, xl_other, ll_other);
                        changed = true;
                    }
                }
            }
        }
        if !changed {
            break;
        }
    }
    for (code, level) in codes.iter_mut().zip(levels) {
        *code = *level as u8;
    }
    match ll > 0.0 {
        true => xl / ll,
        false => 0.0,
    }
}
