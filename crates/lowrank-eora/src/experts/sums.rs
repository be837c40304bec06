//! H of an expert, and of its pool.

use super::values;
use crate::Result;
use candle_core::Tensor;
use faer::{Mat, MatRef};
use linalg::{Entries, add_product, mirror_lower};

/// Rows that are multiplied at a time.
const ROWS: usize = 1024;

/// Second moments of tokens per unit of weight.
#[derive(Clone, Debug)]
pub(super) struct Sums {
    /// Σ ω x xᵀ / Σ ω, both triangles.
    gram: Mat<f64>,
    pub(super) weight: f64,
    /// (Σ ω)² / Σ ω².
    pub(super) effective: f64,
}

impl Sums {
    /// Of rows batch by batch; ω is the square of a row's root, 1 without roots.
    pub(super) fn of(batches: &[Tensor], roots: Option<&[f32]>) -> Result<Self> {
        let width = batches.first().map_or(Ok(0), |batch| batch.dim(1))?;
        let mut gram = Mat::zeros(width, width);
        let (mut weight, mut squares, mut first) = (0.0, 0.0, 0);
        for batch in batches {
            let rows = batch.dim(0)?;
            let values = values(batch)?;
            for (at, rows) in values.chunks(ROWS * width.max(1)).enumerate() {
                let mut scaled: Vec<f64> = Vec::with_capacity(rows.len());
                for (row, x) in rows.chunks(width.max(1)).enumerate() {
                    let root = roots.map_or(1.0, |roots| f64::from(roots[first + at * ROWS + row]));
                    let omega = root * root;
                    weight += omega;
                    squares += omega * omega;
                    scaled.extend(x.iter().map(|&x| root * f64::from(x)));
                }
                let tokens = scaled.len() / width.max(1);
                let x = MatRef::from_column_major_slice(&scaled, width, tokens);
                add_product(gram.as_mut(), x, x.transpose(), 1.0, Entries::Lower);
            }
            first += rows;
        }
        mirror_lower(gram.as_mut());
        if weight > 0.0 {
            gram *= faer::Scale(1.0 / weight);
        }
        Ok(Self {
            gram,
            weight,
            effective: if squares > 0.0 {
                weight * weight / squares
            } else {
                0.0
            },
        })
    }
}

/// H̃ of an expert beside a pool that counts as `prior` tokens, and the pool's share in it.
pub(super) fn mixed(own: Sums, pool: &Sums, prior: f64) -> (Mat<f64>, f64) {
    let share = match (own.weight > 0.0, pool.weight > 0.0) {
        (true, true) => prior / (own.effective + prior),
        (false, true) => 1.0,
        (_, false) => 0.0,
    };
    if share == 0.0 {
        return (own.gram, 0.0);
    }
    if share == 1.0 {
        return (pool.gram.clone(), 1.0);
    }
    let n = own.gram.nrows();
    let mix = |i: usize, j: usize| (1.0 - share) * own.gram[(i, j)] + share * pool.gram[(i, j)];
    (Mat::from_fn(n, n, mix), share)
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    fn problem() -> Tensor {
        let a = |t: usize, c: usize| (((4 * t + 3 * c + (t * c * c) % 5) % 11) as f32 - 5.0) / 4.0;
        let values: Vec<f32> = (0..24).map(|i| a(i / 4, i % 4)).collect();
        Tensor::from_vec(values, (6, 4), &Device::Cpu).unwrap()
    }

    #[test]
    fn tokens_count_by_the_square_of_their_gates_and_few_are_drawn_to_the_pool() {
        let gates = [0.9, 0.2, 0.5, 0.7, 0.3, 0.6];
        let own = || Sums::of(&[problem()], Some(&gates)).unwrap();
        assert!((own().effective - 3.790164).abs() < 1e-6);
        let pool = Sums {
            gram: Mat::identity(4, 4),
            ..own()
        };
        for (prior, expected) in [
            (2.0, [1.070192, -0.0792162, -0.2506842, -0.0505379]),
            (
                0.0,
                [2.25875, -0.246875, -0.78125, -0.1575].map(|x| x / 2.04),
            ),
            (1e12, [1.0, 0.0, 0.0, 0.0]),
        ] {
            let (gram, share) = mixed(own(), &pool, prior);
            assert!((share - prior / (prior + 3.790164)).abs() < 1e-6);
            for (column, expected) in expected.into_iter().enumerate() {
                let found: f64 = gram[(0, column)];
                assert!(
                    (found - expected).abs() < 1e-6,
                    "{prior}: {found} is not {expected}"
                );
            }
        }
        let none = Sums::of(&[], Some(&[])).unwrap();
        assert_eq!(mixed(none.clone(), &own(), 3.0).1, 1.0);
        assert_eq!(mixed(own(), &none, 3.0).1, 0.0);
    }
}
