//! A block of each type from its values: scales, minimums and codes.

use half::f16;

use super::search::{Starts, extreme, nearest, positive, symmetric, three_bits, with_minimum};
use crate::block::{Block, Form, IQ4_NL_LEVELS};
use crate::block_type::BlockType;

/// What the weights of a block need to know of its row.
pub(crate) struct RowStats {
    mean_square: f32,
}

impl RowStats {
    pub(crate) fn of(row: &[f32]) -> Self {
        Self {
            mean_square: sum_of_squares(row) / row.len() as f32,
        }
    }
}

fn sum_of_squares(x: &[f32]) -> f32 {
    x.iter().fold(0.0, |sum, &x| sum + x * x)
}

/// Scales, minimums and the codes that the search for them found. Codes of K types are to be made again with the scales
/// as stored, by [`recode`].
pub(crate) fn fit(ty: BlockType, x: &[f32], importance: Option<&[f32]>, row: &RowStats) -> Block {
    match ty {
        BlockType::F32 | BlockType::F16 | BlockType::BF16 => unreachable!("floats have no blocks"),
        BlockType::Q8_0 => eight_bits(x),
        BlockType::Q4_0 | BlockType::Q5_0 => {
            let form = Form::of(ty).expect("a quantised type");
            match importance {
                None => signed(x, form.zero),
                Some(v) => signed_weighted(x, v, row, form.zero),
            }
        }
        BlockType::Q4_1 | BlockType::Q5_1 => {
            let form = Form::of(ty).expect("a quantised type");
            match importance {
                None => offset(x, form.max_code()),
                Some(v) => offset_weighted(x, v, row, form.max_code()),
            }
        }
        BlockType::IQ4_NL => uneven(x, importance),
        BlockType::Q2_K => two_bits(x, importance),
        BlockType::Q3_K => sixteenths_symmetric(x, importance),
        BlockType::Q4_K | BlockType::Q5_K => four_or_five_bits(ty, x, importance),
        BlockType::Q6_K => six_bits(x, importance),
    }
}

/// Makes the codes again with the scales as stored. Where a scale is 0 the codes stay.
pub(crate) fn recode(ty: BlockType, form: &Form, x: &[f32], block: &mut Block) {
    debug_assert!(form.has_sub_scales(), "{ty}");
    for b in 0..form.len / form.sub {
        let step = block.step(form, b);
        if step == 0.0 {
            continue;
        }
        let offset = block.offset(form, b);
        let (zero, most) = (f32::from(form.zero), f32::from(form.max_code()));
        let values = b * form.sub..(b + 1) * form.sub;
        for (code, &x) in block.codes[values.clone()].iter_mut().zip(&x[values]) {
            *code = nearest_code((x - offset) / step, zero, most);
        }
    }
}

/// The code of a value in steps from that of code `zero`.
pub(crate) fn nearest_code(steps: f32, zero: f32, most: f32) -> u8 {
    (nearest(steps).clamp(-zero, most - zero) + zero) as u8
}

fn inverse_or_zero(x: f32) -> f32 {
    if x == 0.0 { 0.0 } else { 1.0 / x }
}

fn eight_bits(x: &[f32]) -> Block {
    let d = extreme(x).abs() / 127.0;
    let inverse = inverse_or_zero(d);
    let mut block = Block {
        d: f16::from_f32(d),
        ..Block::default()
    };
    for (code, &x) in block.codes.iter_mut().zip(x) {
        *code = ((x * inverse).round() + 128.0) as u8;
    }
    block
}

/// `Q4_0` and `Q5_0`: the extreme value gets the extreme code, 0.
fn signed(x: &[f32], zero: u8) -> Block {
    let zero = f32::from(zero);
    let d = extreme(x) / -zero;
    let inverse = inverse_or_zero(d);
    let mut block = Block {
        d: f16::from_f32(d),
        ..Block::default()
    };
    for (code, &x) in block.codes.iter_mut().zip(x) {
        *code = (x * inverse + (zero + 0.5)).min(2.0 * zero - 1.0) as u8;
    }
    block
}

fn signed_weighted(x: &[f32], importance: &[f32], row: &RowStats, zero: u8) -> Block {
    let w = weights(x, importance, row.mean_square);
    let mut block = Block::default();
    let codes = &mut block.codes[..x.len()];
    block.d = f16::from_f32(symmetric(x, &w[..x.len()], f32::from(zero), codes));
    block
}

/// `Q4_1` and `Q5_1`: from the least value to the largest.
fn offset(x: &[f32], most: u8) -> Block {
    let (min, max) = x
        .iter()
        .fold((f32::INFINITY, f32::NEG_INFINITY), |(min, max), &x| {
            (min.min(x), max.max(x))
        });
    let most = f32::from(most);
    let d = (max - min) / most;
    let inverse = inverse_or_zero(d);
    let mut block = Block {
        d: f16::from_f32(d),
        m: f16::from_f32(min),
        ..Block::default()
    };
    for (code, &x) in block.codes.iter_mut().zip(x) {
        *code = ((x - min) * inverse + 0.5).min(most) as u8;
    }
    block
}

fn offset_weighted(x: &[f32], importance: &[f32], row: &RowStats, most: u8) -> Block {
    let w = weights(x, importance, row.mean_square);
    let mut block = Block::default();
    let codes = &mut block.codes[..x.len()];
    let (d, min) = with_minimum(x, &w[..x.len()], f32::from(most), WEIGHTED, codes);
    block.d = f16::from_f32(d);
    block.m = f16::from_f32(-min);
    block
}

/// Importances times √(σ² + x²).
fn weights(x: &[f32], importance: &[f32], variance: f32) -> [f32; 32] {
    let mut weights = [0.0; 32];
    for ((w, &x), &v) in weights.iter_mut().zip(x).zip(importance) {
        *w = v * (variance + x * x).sqrt();
    }
    weights
}

/// The searches with importances.
const WEIGHTED: Starts = Starts {
    first: -0.9,
    step: 0.05,
    steps: 36,
    absolute: false,
};

fn two_bits(x: &[f32], importance: Option<&[f32]>) -> Block {
    const PLAIN: Starts = Starts {
        first: -0.5,
        step: 0.1,
        steps: 15,
        absolute: true,
    };
    let mut block = Block::default();
    let (mut scales, mut mins, mut sums) = ([0.0f32; 16], [0.0f32; 16], [0.0f32; 16]);
    let variance = sum_of_squares(x) / x.len() as f32;
    for (b, x) in x.chunks(16).enumerate() {
        let codes = &mut block.codes[16 * b..][..16];
        let (w, starts) = match importance {
            None => (abs(x), PLAIN),
            Some(v) => (weights(x, &v[16 * b..][..16], variance), WEIGHTED),
        };
        sums[b] = w[..16].iter().fold(0.0, |sum, w| sum + w);
        (scales[b], mins[b]) = with_minimum(x, &w[..16], 3.0, starts, codes);
    }
    let weights = importance.map(|_| sums.as_slice());
    let mut stored = [0; 16];
    block.d = positive_integers(&scales, weights, 15.0, &mut stored);
    block.scales = stored.map(|scale| scale as i8);
    block.m = positive_integers(&mins, weights, 15.0, &mut block.mins);
    block
}

fn abs(x: &[f32]) -> [f32; 32] {
    let mut w = [0.0; 32];
    w.iter_mut().zip(x).for_each(|(w, x)| *w = x.abs());
    w
}

/// Integers `0 ..= most` in place of scales, and the float that they multiply.
fn positive_integers(x: &[f32], weights: Option<&[f32]>, most: f32, stored: &mut [u8]) -> f16 {
    if let Some(weights) = weights {
        return f16::from_f32(positive(x, weights, most, &mut stored[..x.len()]));
    }
    let max = x.iter().fold(0.0f32, |max, &x| max.max(x));
    if max <= 0.0 {
        stored.fill(0);
        return f16::ZERO;
    }
    let inverse = most / max;
    for (stored, &x) in stored.iter_mut().zip(x) {
        *stored = nearest(inverse * x).min(most) as u8;
    }
    f16::from_f32(max / most)
}

/// `Q3_K`.
fn sixteenths_symmetric(x: &[f32], importance: Option<&[f32]>) -> Block {
    let mut block = Block::default();
    let (mut scales, mut sums) = ([0.0f32; 16], [0.0f32; 16]);
    let variance = 2.0 * sum_of_squares(x) / x.len() as f32;
    for (b, x) in x.chunks(16).enumerate() {
        let codes = &mut block.codes[16 * b..][..16];
        scales[b] = match importance {
            None => three_bits(x, codes),
            Some(v) => {
                let w = weights(x, &v[16 * b..][..16], variance);
                sums[b] = w[..16].iter().fold(0.0, |sum, w| sum + w);
                symmetric(x, &w[..16], 4.0, codes)
            }
        };
    }
    let mut stored = [0u8; 16];
    if importance.is_some() {
        block.d = f16::from_f32(symmetric(&scales, &sums, 32.0, &mut stored));
    } else {
        let largest = extreme(&scales);
        if largest != 0.0 {
            let inverse = -32.0 / largest;
            for (stored, &scale) in stored.iter_mut().zip(&scales) {
                *stored = nearest_code(inverse * scale, 32.0, 63.0);
            }
            block.d = f16::from_f32(1.0 / inverse);
        }
    }
    block.scales = stored.map(|scale| scale as i8 - 32);
    block
}

fn four_or_five_bits(ty: BlockType, x: &[f32], importance: Option<&[f32]>) -> Block {
    let (most, plain) = match ty {
        BlockType::Q4_K => (15.0, (-1.0, 20)),
        _ => (31.0, (-0.5, 15)),
    };
    let plain = Starts {
        first: plain.0,
        step: 0.1,
        steps: plain.1,
        absolute: false,
    };
    let mut block = Block::default();
    let (mut scales, mut mins, mut sums) = ([0.0f32; 8], [0.0f32; 8], [0.0f32; 8]);
    let variance = 2.0 * sum_of_squares(x) / x.len() as f32;
    for (b, x) in x.chunks(32).enumerate() {
        let codes = &mut block.codes[32 * b..][..32];
        let (w, starts) = match importance {
            Some(v) => (weights(x, &v[32 * b..][..32], variance), WEIGHTED),
            None => {
                let root = (sum_of_squares(x) / 32.0).sqrt();
                let mut w = [0.0; 32];
                w.iter_mut().zip(x).for_each(|(w, x)| *w = root + x.abs());
                (w, plain)
            }
        };
        sums[b] = w.iter().fold(0.0, |sum, w| sum + w);
        (scales[b], mins[b]) = with_minimum(x, &w, most, starts, codes);
    }
    let weights = importance.map(|_| sums.as_slice());
    let mut stored = [0; 16];
    block.d = positive_integers(&scales, weights, 63.0, &mut stored[..8]);
    block.scales = stored.map(|scale| scale as i8);
    block.m = positive_integers(&mins, weights, 63.0, &mut block.mins[..8]);
    block
}

fn six_bits(x: &[f32], importance: Option<&[f32]>) -> Block {
    let mut block = Block::default();
    let mut scales = [0.0f32; 16];
    for (b, x) in x.chunks(16).enumerate() {
        let codes = &mut block.codes[16 * b..][..16];
        scales[b] = match importance {
            Some(v) => symmetric(x, &v[16 * b..][..16], 32.0, codes),
            None => {
                let mut squares = [0.0; 16];
                squares.iter_mut().zip(x).for_each(|(w, x)| *w = x * x);
                symmetric(x, &squares, 32.0, codes)
            }
        };
    }
    let largest = extreme(&scales);
    if largest.abs() < 1e-15 {
        // All bytes are 0 then, the codes too.
        return Block::default();
    }
    let inverse = -128.0 / largest;
    block.d = f16::from_f32(1.0 / inverse);
    for (stored, &scale) in block.scales.iter_mut().zip(&scales) {
        *stored = nearest(inverse * scale).min(127.0) as i8;
    }
    block
}

/// `IQ4_NL`: the level nearest to each value.
fn uneven(x: &[f32], importance: Option<&[f32]>) -> Block {
    let extreme = extreme(x);
    let mut block = Block::default();
    if extreme.abs() < 1e-15 {
        block.codes[..x.len()].fill(nearest_level(0.0));
        return block;
    }
    let w = match importance {
        Some(v) => weights(x, v, 2.0 * sum_of_squares(x) / x.len() as f32),
        None => {
            let mut w = [0.0; 32];
            w.iter_mut().zip(x).for_each(|(w, x)| *w = x * x);
            w
        }
    };
    let sums = |inverse: f32| {
        let (mut xq, mut qq) = (0.0f32, 0.0f32);
        for (&x, &w) in x.iter().zip(&w) {
            let q = f32::from(IQ4_NL_LEVELS[usize::from(nearest_level(inverse * x))]);
            xq += w * q * x;
            qq += w * q * q;
        }
        (xq, qq)
    };
    let end = f32::from(IQ4_NL_LEVELS[0]);
    let (xq, qq) = sums(1.0 / (-extreme / end));
    let mut d = if qq > 0.0 { xq / qq } else { 0.0 };
    let mut best = d * xq;
    for step in -7..=7 {
        let (xq, qq) = sums((step as f32 + end) / extreme);
        if qq > 0.0 && xq * xq > best * qq {
            d = xq / qq;
            best = d * xq;
        }
    }
    let inverse = inverse_or_zero(d);
    for (code, &x) in block.codes.iter_mut().zip(x) {
        *code = nearest_level(inverse * x);
    }
    block.d = f16::from_f32(d);
    block
}

/// Index of the level nearest to `x`; the upper one at the middle.
pub(crate) fn nearest_level(x: f32) -> u8 {
    let above = IQ4_NL_LEVELS.partition_point(|&level| f32::from(level) <= x);
    match above {
        0 => 0,
        16 => 15,
        _ => {
            let (low, high) = (IQ4_NL_LEVELS[above - 1], IQ4_NL_LEVELS[above]);
            let nearer_low = x - f32::from(low) < f32::from(high) - x;
            (if nearer_low { above - 1 } else { above }) as u8
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_level_is_nearest_to_itself_and_the_ends_take_the_rest() {
        for (code, &level) in IQ4_NL_LEVELS.iter().enumerate() {
            assert_eq!(usize::from(nearest_level(f32::from(level))), code);
        }
        assert_eq!(nearest_level(-1e9), 0);
        assert_eq!(nearest_level(1e9), 15);
        assert_eq!(nearest_level(-4.6), 7);
        assert_eq!(nearest_level(-4.4), 8);
    }
}
