//! Products on every set of instructions of this machine, bit for bit against the definition of the arithmetic, which is
//! written out here on the blocks and floats themselves.

use half::{bf16, f16};
use packed::{
    Activations, Block, BlockType, Context, GroupBits, GroupParts, Groups, IQ4_NL_LEVELS, Level,
    Linear, LowRank, Matrix, QuantRows, Team, forward, quantise,
};
use proptest::prelude::*;

/// Numbers without a pattern.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        self.0 >> 33
    }

    /// In -1 to 1.
    fn float(&mut self) -> f32 {
        self.next() as f32 / (1u64 << 30) as f32 - 1.0
    }

    fn floats(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.float()).collect()
    }
}

/// A block's 32 columns as the arithmetic sees them: codes less the zero, and for each 16 or 32 columns an integer scale.
struct Part {
    codes: [i32; 32],
    /// A float for the first and second 16 columns, the same unless these are groups, times the integers.
    d: [f32; 2],
    scales: [i32; 2],
    /// Added for the first and second 16 columns, if there are minimums; one for both if `scales` are one.
    minimums: Option<[f32; 2]>,
    /// Whether each 16 columns have their own.
    halves: bool,
}

/// The parts of a row of blocks.
fn parts(rows: &QuantRows<'_>, row: usize) -> Vec<Part> {
    let ty = rows.block_type();
    let zero = match ty {
        BlockType::Q4_0 => 8,
        BlockType::Q5_0 => 16,
        BlockType::Q8_0 => 128,
        BlockType::Q3_K => 4,
        BlockType::Q6_K => 32,
        _ => 0,
    };
    let mut parts = Vec::new();
    for bytes in rows.row(row).chunks(ty.block_bytes()) {
        let block = Block::decode(ty, bytes);
        let (d, m) = (block.d.to_f32(), block.m.to_f32());
        for b in 0..ty.block_len() / 32 {
            let codes = std::array::from_fn(|i| match ty {
                BlockType::IQ4_NL => i32::from(IQ4_NL_LEVELS[usize::from(block.codes[i])]),
                _ => i32::from(block.codes[32 * b + i]) - zero,
            });
            let k = ty.block_len() == 256;
            let halves = matches!(ty, BlockType::Q2_K | BlockType::Q3_K | BlockType::Q6_K);
            let at = if halves { [2 * b, 2 * b + 1] } else { [b, b] };
            let scales = match k {
                true => at.map(|b| i32::from(block.scales[b])),
                false => [1, 1],
            };
            let minimums = match ty {
                BlockType::Q4_1 | BlockType::Q5_1 => Some([m, m]),
                BlockType::Q2_K | BlockType::Q4_K | BlockType::Q5_K => {
                    Some(at.map(|b| -m * f32::from(block.mins[b])))
                }
                _ => None,
            };
            parts.push(Part {
                codes,
                d: [d, d],
                scales,
                minimums,
                halves,
            });
        }
    }
    parts
}

/// The parts of a row of groups, columns in the order of the groups.
fn group_parts(groups: &Groups, parts: &GroupParts, row: usize) -> Vec<Part> {
    let order: Vec<u32> = match groups.order() {
        Some(order) => order.to_vec(),
        None => (0..parts.cols as u32).collect(),
    };
    let code = |position: usize| match order.get(position) {
        Some(&column) => i32::from(parts.codes[row * parts.cols + column as usize]),
        None => 0,
    };
    let middle = i32::from(parts.bits.middle());
    (0..parts.cols.div_ceil(32))
        .map(|b| {
            let d = [0, 1].map(|half| scale_and_zero(groups, row, b, half).0);
            let zero = [0, 1].map(|half| scale_and_zero(groups, row, b, half).1);
            Part {
                codes: std::array::from_fn(|i| code(32 * b + i) - middle),
                d,
                scales: [1, 1],
                minimums: (zero != [middle; 2] || parts.zeros.is_some())
                    .then(|| [0, 1].map(|half| d[half] * (middle - zero[half]) as f32)),
                halves: are_halves(groups),
            }
        })
        .collect()
}

/// Whether two groups make 32 columns.
fn are_halves(groups: &Groups) -> bool {
    groups.width() == 16 && groups.groups() > 1
}

/// Of half a block of 32 columns. A half behind the last group has neither.
fn scale_and_zero(groups: &Groups, row: usize, b: usize, half: usize) -> (f32, i32) {
    let group = match are_halves(groups) {
        true => 2 * b + half,
        false => 32 * b / groups.width(),
    };
    match group < groups.groups() {
        true => (
            groups.scale(row, group).to_f32(),
            i32::from(groups.zero(row, group)),
        ),
        false => (0.0, 0),
    }
}

/// 32 values of a token, rounded.
fn round(x: &[f32]) -> ([i32; 32], f32) {
    let max = x.iter().fold(0f32, |max, x| max.max(x.abs()));
    let d = max / 127.0;
    let inverse = if d == 0.0 { 0.0 } else { 1.0 / d };
    let q = |i: usize| x.get(i).map_or(0.0, |x| (x * inverse).round_ties_even());
    (std::array::from_fn(|i| q(i) as i32), d)
}

fn int8(parts: &[Part], x: &[f32]) -> f32 {
    let mut acc = 0f32;
    for (part, x) in parts.iter().zip(x.chunks(32)) {
        let (q, d) = round(x);
        let dot = |range: std::ops::Range<usize>| range.map(|i| part.codes[i] * q[i]).sum::<i32>();
        let dot = part.scales[0] * dot(0..16) + part.scales[1] * dot(16..32);
        acc = (part.d[0] * d).mul_add(dot as f32, acc);
        if let Some([first, second]) = part.minimums {
            let sum = |range: std::ops::Range<usize>| d * q[range].iter().sum::<i32>() as f32;
            match part.halves {
                true => {
                    acc = first.mul_add(sum(0..16), acc);
                    acc = second.mul_add(sum(16..32), acc);
                }
                false => acc = first.mul_add(sum(0..32), acc),
            }
        }
    }
    acc
}

/// Grouped integers with zeros take them off the integer sum.
fn int8_groups(parts: &[Part], zeros: &[[i32; 2]], x: &[f32]) -> f32 {
    let mut acc = 0f32;
    for ((part, zeros), x) in parts.iter().zip(zeros).zip(x.chunks(32)) {
        let (q, d) = round(x);
        let width = if part.halves { 16 } else { 32 };
        for (half, start) in (0..32).step_by(width).enumerate() {
            let columns = start..start + width;
            let dot: i32 = columns.map(|i| (part.codes[i] - zeros[half]) * q[i]).sum();
            acc = (part.d[half] * d).mul_add(dot as f32, acc);
        }
    }
    acc
}

/// Four sums, of every fourth column each.
fn quarters(terms: impl Iterator<Item = (f32, f32)>) -> f32 {
    let mut sums = [0f32; 4];
    for (i, (a, b)) in terms.enumerate() {
        sums[i % 4] = a.mul_add(b, sums[i % 4]);
    }
    (sums[0] + sums[1]) + (sums[2] + sums[3])
}

fn floats(parts: &[Part], x: &[f32]) -> f32 {
    let mut acc = 0f32;
    for (part, x) in parts.iter().zip(x.chunks(32)) {
        let x: [f32; 32] = std::array::from_fn(|i| x.get(i).copied().unwrap_or(0.0));
        let width = if part.halves { 16 } else { 32 };
        let ranges = (0..32).step_by(width).map(|start| start..start + width);
        for (half, range) in ranges.clone().enumerate() {
            let sum = quarters(range.map(|i| (part.codes[i] as f32, x[i])));
            acc = (part.d[half] * part.scales[half] as f32).mul_add(sum, acc);
        }
        if let Some(minimums) = part.minimums {
            for (range, minimum) in ranges.zip(minimums) {
                acc = minimum.mul_add(quarters(range.map(|i| (1.0, x[i]))), acc);
            }
        }
    }
    acc
}

/// The arithmetic of many tokens: parts of 256 columns.
fn panels(values: &[f32], x: &[f32]) -> f32 {
    let mut total = 0f32;
    for (i, (values, x)) in values.chunks(256).zip(x.chunks(256)).enumerate() {
        let sum = values
            .iter()
            .zip(x)
            .fold(0f32, |sum, (v, x)| v.mul_add(*x, sum));
        total = if i == 0 { sum } else { total + sum };
    }
    total
}

/// The same of values rounded to bf16, two columns at once.
fn brain_panels(values: &[f32], x: &[f32]) -> f32 {
    let normal = |value: f32| match value.is_subnormal() {
        true => 0f32.copysign(value),
        false => value,
    };
    let rounded = |v: &[f32], i: usize| {
        let value = v.get(i).copied().unwrap_or(0.0);
        bf16::from_f32(normal(value)).to_f32()
    };
    let mut total = 0f32;
    for (i, (values, x)) in values.chunks(256).zip(x.chunks(256)).enumerate() {
        let mut sum = 0f32;
        for even in (0..values.len()).step_by(2) {
            for column in [even + 1, even] {
                sum = normal(rounded(values, column).mul_add(rounded(x, column), sum));
            }
        }
        total = if i == 0 { sum } else { total + sum };
    }
    total
}

/// Floats with many tokens.
fn many(activations: Activations, values: &[f32], x: &[f32]) -> f32 {
    match activations {
        Activations::Bf16 => brain_panels(values, x),
        Activations::F32 | Activations::Int8 => panels(values, x),
    }
}

fn dense(ty: BlockType, values: &[f32], x: &[f32]) -> f32 {
    let mut sums = [0f32; 32];
    let padded = |v: &[f32], i: usize| v.get(i).copied().unwrap_or(0.0);
    for start in (0..values.len()).step_by(32) {
        for (lane, sum) in sums.iter_mut().enumerate() {
            let column = match ty {
                BlockType::BF16 => start + lane % 16 * 2 + lane / 16,
                _ => start + lane,
            };
            *sum = padded(values, column).mul_add(padded(x, column), *sum);
        }
    }
    let mut sums: Vec<f32> = (0..16).map(|i| sums[i] + sums[i + 16]).collect();
    for half in [8, 4, 2, 1] {
        for i in 0..half {
            sums[i] += sums[i + half];
        }
    }
    sums[0]
}

/// Tokens from which on floats are multiplied in panels.
const MANY: usize = 16;

fn check(found: &[f32], expected: impl Fn(usize, usize) -> f32, rows: usize, what: &str) {
    for (i, &found) in found.iter().enumerate() {
        let expected = expected(i / rows, i % rows);
        assert!(
            found.to_bits() == expected.to_bits(),
            "{what}: token {} row {}: {found} instead of {expected}",
            i / rows,
            i % rows
        );
    }
}

fn all_ways(linear: &Linear, x: &[f32], mut check: impl FnMut(Activations, &[f32], &str)) {
    let tokens = x.len() / linear.cols();
    for threads in [1, 3] {
        let team = Team::new(threads);
        for level in Level::available() {
            for activations in [Activations::F32, Activations::Int8, Activations::Bf16] {
                let context = Context::new(activations).with_level(level).with_team(&team);
                let mut y = vec![f32::NAN; tokens * linear.rows()];
                linear.forward(x, &mut y, &context).unwrap();
                let what = format!("{level}, {activations:?}, {threads} threads, {tokens} tokens");
                check(activations, &y, &what);
            }
        }
    }
}

fn quantised() -> impl Strategy<Value = BlockType> {
    let types: Vec<_> = BlockType::ALL
        .into_iter()
        .filter(|ty| ty.is_quantised())
        .collect();
    prop::sample::select(types)
}

/// Any bytes with finite scales are a matrix.
fn any_matrix(
    ty: BlockType,
    rows: usize,
    cols: usize,
    numbers: &mut Numbers,
) -> QuantRows<'static> {
    let count = rows * ty.row_bytes(cols).unwrap();
    let mut bytes: Vec<u8> = (0..count).map(|_| numbers.next() as u8).collect();
    for bytes in bytes.chunks_mut(ty.block_bytes()) {
        let mut block = Block::decode(ty, bytes);
        block.d = f16::from_f32(numbers.float());
        block.m = f16::from_f32(numbers.float());
        block.encode(ty, bytes);
    }
    QuantRows::new(ty, rows, cols, bytes).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn blocks_are_multiplied_as_defined(
        ty in quantised(),
        rows in prop::sample::select(vec![1usize, 7, 8, 9, 16, 33, 50]),
        blocks in 1..12usize,
        tokens in 1..20usize,
        seed: u64,
    ) {
        let mut numbers = Numbers(seed);
        let cols = blocks * ty.block_len();
        let matrix = any_matrix(ty, rows, cols, &mut numbers);
        let x = numbers.floats(tokens * cols);
        let values = matrix.dequantise();
        let parts: Vec<_> = (0..rows).map(|row| parts(&matrix, row)).collect();
        let linear = Linear::from(Matrix::from_rows(&matrix).unwrap());
        all_ways(&linear, &x, |activations, y, what| {
            let expected = |token: usize, row: usize| {
                let x = &x[token * cols..][..cols];
                match activations {
                    Activations::Int8 => int8(&parts[row], x),
                    _ if tokens >= MANY => many(activations, &values[row * cols..][..cols], x),
                    _ => floats(&parts[row], x),
                }
            };
            check(y, expected, rows, &format!("{ty}, {what}"));
        });
        let weight = linear.weight();
        prop_assert_eq!(weight.to_rows().unwrap(), matrix);
        prop_assert_eq!(weight.dequantise(), values);
    }

    #[test]
    fn groups_are_multiplied_as_defined(
        bits in prop::sample::select(vec![2u32, 3, 4, 8]),
        rows in prop::sample::select(vec![1usize, 16, 37]),
        width in prop::sample::select(vec![16usize, 32, 64, 128, 1000]),
        cols in 1..400usize,
        tokens in 1..18usize,
        asymmetric: bool,
        act_order: bool,
        seed: u64,
    ) {
        let mut numbers = Numbers(seed);
        let bits = GroupBits::new(bits).unwrap();
        let count = cols.div_ceil(width.min(cols));
        let width = width.min(cols);
        let mut group_index: Vec<u32> = (0..cols).map(|column| (column / width) as u32).collect();
        for i in (1..cols).rev() {
            group_index.swap(i, numbers.next() as usize % (i + 1));
        }
        let code = |numbers: &mut Numbers| numbers.next() as u8 & bits.max_code();
        let parts = GroupParts {
            bits,
            rows,
            cols,
            width,
            codes: (0..rows * cols).map(|_| code(&mut numbers)).collect(),
            scales: (0..rows * count).map(|_| f16::from_f32(numbers.float())).collect(),
            zeros: asymmetric.then(|| (0..rows * count).map(|_| code(&mut numbers)).collect()),
            group_index: act_order.then_some(group_index),
        };
        let groups = Groups::new(parts.clone()).unwrap();
        let x = numbers.floats(tokens * cols);
        let values = groups.dequantise();
        let row_parts: Vec<_> = (0..rows).map(|row| group_parts(&groups, &parts, row)).collect();
        let zeros = |row: usize| -> Vec<[i32; 2]> {
            let zero = |b: usize, half: usize| scale_and_zero(&groups, row, b, half).1;
            let middle = i32::from(bits.middle());
            let zeros = |b: usize| [0, 1].map(|half| zero(b, half) - middle);
            (0..cols.div_ceil(32)).map(zeros).collect()
        };
        // All zeros may happen to be in the middle; then none are stored.
        let stored = matches!(
            Matrix::from_groups(&groups).kind(),
            packed::Kind::Groups { zeros: true, .. }
        );
        let row_parts: Vec<Vec<Part>> = row_parts
            .into_iter()
            .map(|parts| {
                parts
                    .into_iter()
                    .map(|part| Part { minimums: part.minimums.filter(|_| stored), ..part })
                    .collect()
            })
            .collect();
        let ordered = |v: &[f32]| -> Vec<f32> {
            match groups.order() {
                Some(order) => order.iter().map(|&column| v[column as usize]).collect(),
                None => v.to_vec(),
            }
        };
        let linear = Linear::from(Matrix::from_groups(&groups));
        all_ways(&linear, &x, |activations, y, what| {
            let expected = |token: usize, row: usize| {
                let x = ordered(&x[token * cols..][..cols]);
                match activations {
                    Activations::Int8 => int8_groups(&row_parts[row], &zeros(row), &x),
                    _ if tokens >= MANY => {
                        many(activations, &ordered(&values[row * cols..][..cols]), &x)
                    }
                    _ => floats(&row_parts[row], &x),
                }
            };
            check(y, expected, rows, what);
        });
        prop_assert_eq!(linear.weight().dequantise(), values);
    }

    #[test]
    fn floats_are_multiplied_in_place_as_defined(
        ty in prop::sample::select(vec![BlockType::F32, BlockType::F16, BlockType::BF16]),
        rows in 1..40usize,
        cols in 1..300usize,
        tokens in 1..20usize,
        seed: u64,
    ) {
        let mut numbers = Numbers(seed);
        let matrix = quantise(ty, &numbers.floats(rows * cols), cols, None).unwrap();
        let x = numbers.floats(tokens * cols);
        let values = matrix.dequantise();
        let linear = Linear::from(Matrix::from_rows(&matrix).unwrap());
        all_ways(&linear, &x, |activations, y, what| {
            let expected = |token: usize, row: usize| {
                let (x, row) = (&x[token * cols..][..cols], &values[row * cols..][..cols]);
                match tokens >= MANY {
                    true => many(activations, row, x),
                    false => dense(ty, row, x),
                }
            };
            check(y, expected, rows, &format!("{ty}, {what}"));
        });
    }

    #[test]
    fn bias_and_low_rank_are_added_after_the_product(
        rows in 1..40usize,
        rank in 1..9usize,
        tokens in 1..20usize,
        float in prop::sample::select(vec![BlockType::F32, BlockType::F16, BlockType::BF16]),
        seed: u64,
    ) {
        let cols = 96;
        let mut numbers = Numbers(seed);
        let weight = any_matrix(BlockType::Q4_1, rows, cols, &mut numbers);
        let mut factor = |rows: usize, cols: usize| {
            let rows = quantise(float, &numbers.floats(rows * cols), cols, None).unwrap();
            (rows.dequantise(), Matrix::from_rows(&rows).unwrap())
        };
        let ((a_values, a), (b_values, b)) = (factor(rank, cols), factor(rows, rank));
        let bias = numbers.floats(rows);
        let x = numbers.floats(tokens * cols);
        let plain = Linear::from(Matrix::from_rows(&weight).unwrap());
        let linear = plain.clone()
            .with_low_rank(LowRank::new(&a, &b, 0.3).unwrap()).unwrap()
            .with_bias(&bias).unwrap();
        prop_assert_eq!(linear.bias(), Some(bias.as_slice()));
        all_ways(&linear, &x, |activations, y, what| {
            let mut product = vec![0.0; tokens * rows];
            plain.forward(&x, &mut product, &Context::new(activations)).unwrap();
            let expected = |token: usize, row: usize| {
                let x = &x[token * cols..][..cols];
                let side = (0..rank).fold(0f32, |sum, k| {
                    let a = &a_values[k * cols..][..cols];
                    let ax = if tokens >= MANY { many(activations, a, x) } else { dense(float, a, x) };
                    b_values[row * rank + k].mul_add(ax * 0.3, sum)
                });
                product[token * rows + row] + side + bias[row]
            };
            check(y, expected, rows, what);
        });
    }
}

#[test]
fn one_rounded_input_serves_layers_of_all_kinds() {
    let (cols, tokens) = (256, 5);
    let mut numbers = Numbers(3);
    let matrices: Vec<Linear> = [
        BlockType::Q4_0,
        BlockType::BF16,
        BlockType::Q6_K,
        BlockType::F16,
    ]
    .into_iter()
    .enumerate()
    .map(|(i, ty)| {
        let rows = quantise(ty, &numbers.floats((20 + i) * cols), cols, None).unwrap();
        Linear::from(Matrix::from_rows(&rows).unwrap())
    })
    .collect();
    let x = numbers.floats(tokens * cols);
    let context = Context::new(Activations::Int8);
    let alone: Vec<Vec<f32>> = matrices
        .iter()
        .map(|linear| {
            let mut y = vec![0.0; tokens * linear.rows()];
            linear.forward(&x, &mut y, &context).unwrap();
            y
        })
        .collect();
    let mut together: Vec<Vec<f32>> = alone.iter().map(|y| vec![0.0; y.len()]).collect();
    let layers: Vec<&Linear> = matrices.iter().collect();
    let mut outputs: Vec<&mut [f32]> = together.iter_mut().map(Vec::as_mut_slice).collect();
    forward(&layers, &x, &mut outputs, &context).unwrap();
    assert_eq!(together, alone);
}

#[test]
fn an_input_that_is_not_finite_never_gives_a_number() {
    let mut numbers = Numbers(9);
    for ty in BlockType::ALL {
        let rows = quantise(ty, &numbers.floats(20 * 256), 256, None).unwrap();
        let linear = Linear::from(Matrix::from_rows(&rows).unwrap());
        for bad in [f32::NAN, f32::INFINITY] {
            let mut x = numbers.floats(256);
            x[77] = bad;
            all_ways(&linear, &x, |_, y, what| {
                assert!(y.iter().all(|y| !y.is_finite()), "{ty}, {what}");
            });
        }
    }
}

#[test]
fn shapes_that_do_not_fit_are_refused() {
    let rows = quantise(BlockType::Q8_0, &[0.5; 4 * 64], 64, None).unwrap();
    let linear = Linear::from(Matrix::from_rows(&rows).unwrap());
    let context = Context::new(Activations::F32);
    let mut y = [0.0; 8];
    assert!(linear.forward(&[0.0; 128], &mut y, &context).is_ok());
    assert!(linear.forward(&[0.0; 64], &mut y, &context).is_err());
    assert!(linear.forward(&[0.0; 100], &mut y, &context).is_err());
    assert!(linear.forward(&[], &mut [], &context).is_ok());
    assert!(linear.clone().with_bias(&[0.0; 5]).is_err());
    let factor = |rows, cols| {
        let rows = quantise(BlockType::F16, &vec![0.0; rows * cols], cols, None).unwrap();
        Matrix::from_rows(&rows).unwrap()
    };
    assert!(LowRank::new(&factor(3, 64), &factor(4, 2), 1.0).is_err());
    assert!(LowRank::new(linear.weight(), &factor(5, 4), 1.0).is_err());
    let narrow = LowRank::new(&factor(3, 32), &factor(4, 3), 1.0).unwrap();
    assert!(linear.with_low_rank(narrow).is_err());
}
