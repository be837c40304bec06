//! Factors in few bits.
//!
//! Groups run along the rows of A and of Bᵀ, so that every rank has scales of its own and the
//! result does not depend on how B and A share the singular values. Rounding A turns its row
//! space a little; refitting B to the rounded A, B = D H Aᵀ (A H Aᵀ)⁺, takes most of that back.

use super::LowRank;
use crate::Result;
use crate::compress::{Compressed, Compressor};
use crate::matrix::expect_shape;
use faer::{Mat, MatRef};

/// Bytes of a factor's entry that its compressor leaves as a float.
const HALF: usize = 2;

/// Quantises A, refits B to it where `refit` knows how, and quantises B: what a runtime computes
/// with, and the bytes of both.
///
/// 4 bits for A and 8 for B lose next to nothing with a refit.
///
/// # Errors
/// When a compressor asks for inputs, or the refit fails.
pub(crate) fn quantise_factors(
    factors: &LowRank,
    (a, b): (&Compressor, &Compressor),
    refit: impl FnOnce(MatRef<'_, f64>) -> Result<Mat<f64>>,
) -> Result<(LowRank, u64)> {
    let a = a.compress(factors.a.as_ref(), None)?;
    let refitted = refit(a.weight.as_ref())?;
    expect_shape("refitted B", refitted.as_ref(), factors.b.shape())?;
    let b = b.compress(refitted.transpose(), None)?;
    // No file format holds factors in integers: what is counted is what any would need.
    let bytes_of = |factor: &Compressed| {
        let storage = factor.storage(HALF);
        let symmetric = (factor.quantised.as_ref()).is_some_and(|codes| codes.is_symmetric());
        let zeros = if symmetric { 0 } else { storage.zeros };
        storage.values + storage.mask + storage.scales + zeros
    };
    let bytes = bytes_of(&a) + bytes_of(&b);
    let rounded = LowRank {
        b: b.weight.transpose().to_owned(),
        a: a.weight,
    };
    Ok((rounded, bytes as u64))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::solve::tests::{decaying, eora, square};
    use crate::solve::{Options, Split, Weighting, refit, solve};
    use crate::testing::{Golden, Lcg, assert_matrix_close};

    fn named(name: &str) -> Compressor {
        name.parse().expect("a name")
    }

    #[test]
    fn refitting_b_makes_four_bits_for_a_nearly_free() {
        let mut lcg = Lcg(17);
        let (w, x) = (lcg.matrix(96, 128), decaying(&mut Lcg(18), 128, 600, 5.0));
        let d = &w - crate::testing::round_to_nearest(w.as_ref(), 3, 64);
        let (h, size) = (square(&x), (&d * &x).norm_l2());
        let weighting = Weighting::Gram(h.as_ref());
        let factors = eora(&d, &h, 12).factors;
        let (a, b) = (named("rtn-int4-g64-sym"), named("rtn-int8-g64-sym"));
        let loss = |factors: &LowRank| (factors.error(d.as_ref()) * &x).norm_l2() / size;
        let plain = loss(&factors);
        let kept = quantise_factors(&factors, (&a, &b), |_| Ok(factors.b.clone())).expect("fits");
        let refitted = quantise_factors(&factors, (&a, &b), |a| refit(d.as_ref(), &weighting, a))
            .expect("fits");
        let ((kept, _), (refitted, bytes)) = (kept, refitted);
        let (kept, refitted_loss) = (loss(&kept), loss(&refitted));
        assert!(
            plain <= refitted_loss && refitted_loss < kept,
            "{plain} {refitted_loss} {kept}"
        );
        assert!(
            refitted_loss - plain < 0.4 * (kept - plain),
            "{plain} {refitted_loss} {kept}"
        );
        assert_eq!(bytes, (12 * 128 / 2 + 12 * 2 * 2) + (12 * 96 + 12 * 2 * 2));
    }

    #[test]
    fn quantised_factors_do_not_depend_on_the_split() {
        let golden = Golden::new();
        let (d, h) = (golden.d(), golden.h());
        let weighting = Weighting::Gram(h.as_ref());
        let int8 = named("rtn-int8-g8-sym");
        let product = |split| {
            let options = Options {
                split,
                ..Options::default()
            };
            let factors = solve(d.as_ref(), &weighting, 3, &options)
                .expect("solves")
                .factors;
            let quantised = quantise_factors(&factors, (&int8, &int8), |_| Ok(factors.b.clone()));
            quantised.expect("fits").0.product()
        };
        assert_matrix_close(
            product(Split::Balanced).as_ref(),
            product(Split::Orthonormal).as_ref(),
            0.02, // The f16 scales round differently.
        );
    }
}
