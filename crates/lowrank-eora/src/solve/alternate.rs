//! Alternation of compression and repair.

use super::{LowRank, Options, Solution, Weighting, solve};
use crate::Result;
use crate::matrix::expect_shape;
use faer::{Mat, MatRef};

/// The best pair of a compressed weight and its correction that alternation found.
#[derive(Clone, Debug)]
pub struct Alternated {
    /// W_c, `m × n`.
    pub compressed: Mat<f64>,
    /// Its correction.
    pub solution: Solution,
    /// Loss after each round; the first is that of compressing W itself.
    pub losses: Vec<f64>,
}

/// Compresses W − B A instead of W, with the B A of the round before, and repairs again.
///
/// LoftQ's loop (arXiv 2310.08659) in the norm of H. It is not monotone, so the best round counts.
/// `weighting` must be one of the inputs ([`Weighting::Output`] belongs to one residual).
///
/// # Errors
/// As [`solve`], and when `compress` changes the shape.
pub fn alternate(
    weight: MatRef<'_, f64>,
    weighting: &Weighting<'_>,
    rank: usize,
    rounds: usize,
    options: &Options,
    mut compress: impl FnMut(&Mat<f64>) -> Mat<f64>,
) -> Result<Alternated> {
    weighting.energy(weight.subrows(0, 0))?;
    let mut round = |corrected: Mat<f64>| -> Result<(Mat<f64>, Solution)> {
        let compressed = compress(&corrected);
        expect_shape("compressed weight", compressed.as_ref(), weight.shape())?;
        let solution = solve((weight - &compressed).as_ref(), weighting, rank, options)?;
        Ok((compressed, solution))
    };
    let (compressed, solution) = round(weight.to_owned())?;
    let mut last: LowRank = solution.factors.clone();
    let mut best = Alternated {
        losses: vec![solution.loss()],
        compressed,
        solution,
    };
    for _ in 0..rounds {
        let (compressed, solution) = round(last.error(weight))?;
        last.clone_from(&solution.factors);
        let loss = solution.loss();
        best.losses.push(loss);
        if loss < best.solution.loss() {
            (best.compressed, best.solution) = (compressed, solution);
        }
    }
    Ok(best)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::solve::tests::square;
    use crate::testing::{Lcg, assert_close};

    #[test]
    fn alternation_keeps_the_best_round() {
        let mut lcg = Lcg(16);
        let (w, x) = (lcg.matrix(24, 32), lcg.activations(32, 200));
        let h = square(&x);
        let weighting = Weighting::Gram(h.as_ref());
        let found = alternate(w.as_ref(), &weighting, 4, 6, &Options::default(), |w| {
            crate::testing::round_to_nearest(w.as_ref(), 3, 16)
        })
        .expect("solves");
        let best = found.losses.iter().copied().fold(f64::INFINITY, f64::min);
        assert_eq!(found.losses.len(), 7);
        assert_close(found.solution.loss(), best, 1e-12);
        assert!(best < 0.99 * found.losses[0], "{:?}", found.losses);
        let error = &w - &found.compressed - found.solution.factors.product();
        assert_close((error * &x).norm_l2(), best, 1e-6);
    }
}
