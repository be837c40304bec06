//! The normalised Walsh–Hadamard transform, which spreads outliers over a head before it is quantised.
//!
//! The matrix H of Sylvester's order is symmetric and its own inverse. Heads whose size is not a power of two are transformed in blocks of the
//! largest power of two that divides it. (Hq)·(Hk) = q·k, so keys and queries are transformed alike and nothing else changes; values are
//! transformed back once, after they were mixed.

/// The largest power of two that divides `head_dim`.
pub(crate) fn block(head_dim: usize) -> usize {
    1 << head_dim.trailing_zeros()
}

macro_rules! transform {
    ($(#[$doc:meta])* $name:ident, $number:ty) => {
        $(#[$doc])*
        #[inline(always)]
        pub(crate) fn $name(row: &mut [$number], block: usize) {
            if block < 2 {
                return;
            }
            let scale = 1.0 / (block as $number).sqrt();
            for row in row.chunks_exact_mut(block) {
                let mut half = 1;
                if block >= 8 {
                    // The first three halvings in registers.
                    for x in row.as_chunks_mut::<8>().0 {
                        let [a, b, c, d, e, f, g, h] = *x;
                        let (a, b, c, d) = (a + b, a - b, c + d, c - d);
                        let (e, f, g, h) = (e + f, e - f, g + h, g - h);
                        let (a, b, c, d) = (a + c, b + d, a - c, b - d);
                        let (e, f, g, h) = (e + g, f + h, e - g, f - h);
                        *x = [a + e, b + f, c + g, d + h, a - e, b - f, c - g, d - h];
                    }
                    half = 8;
                }
                while half < block {
                    for pair in row.chunks_exact_mut(2 * half) {
                        let (a, b) = pair.split_at_mut(half);
                        for (a, b) in a.iter_mut().zip(b) {
                            (*a, *b) = (*a + *b, *a - *b);
                        }
                    }
                    half *= 2;
                }
                row.iter_mut().for_each(|x| *x *= scale);
            }
        }
    };
}

transform! {
    /// Transforms each `block` of `row` in place.
    rotate, f32
}
transform! {
    /// The same in f64, for what is quantised once.
    rotate_f64, f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::golden;

    #[test]
    fn the_transform_equals_golden_values_and_is_its_own_inverse() {
        let row = golden::keys(0);
        let mut rotated = row.clone();
        rotate(&mut rotated, block(64));
        golden::close(
            &rotated[..8],
            &[
                -0.608_232_662,
                0.114_479_067,
                -0.443_936_144,
                0.524_040_818,
                -0.423_630_459,
                0.684_540_174,
                0.530_436_183,
                -0.685_701_79,
            ],
            1e-6,
        );
        rotate(&mut rotated, block(64));
        let far = |a: &f32, b: &f32| (a - b).abs();
        assert!(rotated.iter().zip(&row).all(|(a, b)| far(a, b) < 1e-6));

        let mut row = golden::uniform("kv2.h96", 96);
        assert_eq!(
            [block(96), block(80), block(128), block(21)],
            [32, 16, 128, 1]
        );
        rotate(&mut row, block(96));
        golden::close(
            &row[..4],
            &[
                0.544_761_941,
                -0.424_545_945,
                -0.857_037_106,
                -0.100_711_148,
            ],
            1e-6,
        );
    }
}
