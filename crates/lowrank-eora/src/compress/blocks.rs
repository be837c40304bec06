//! Rounding to the blocks of GGUF files: as llama.cpp's quantiser does it, with or without importance of the inputs, or by
//! GPTQ on the scales that it would choose.

use packed::{BlockType, QuantRows, quantise};

use super::mix::BlockTypes;
use super::rows::Rows;
use super::sweep::ColumnOrder;
use crate::Result;

/// Quantisation to GGUF blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct BlockQuantise {
    /// The type of each linear.
    pub types: BlockTypes,
    /// How scales and codes are chosen.
    pub rounding: BlockRounding,
}

/// How the scales and codes of blocks are chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum BlockRounding {
    /// By llama.cpp's reference quantiser.
    Nearest {
        /// Whether errors are weighted with the sum of squares of each input, as an imatrix does.
        importance: bool,
    },
    /// Scales as above, fitted to the original weights; codes column by column, the remaining columns taking over the
    /// error (GPTQ).
    Gptq {
        /// Whether errors are weighted when scales are fitted.
        importance: bool,
        /// Order in which columns are visited; they stay where they are.
        order: ColumnOrder,
    },
}

impl BlockRounding {
    pub(crate) fn importance(self) -> bool {
        match self {
            Self::Nearest { importance } | Self::Gptq { importance, .. } => importance,
        }
    }
}

/// Whether 0 is exactly a value of every block, so that pruned weights stay 0.
pub(crate) fn keeps_zeros(ty: BlockType) -> bool {
    matches!(
        ty,
        BlockType::Q4_0 | BlockType::Q5_0 | BlockType::Q8_0 | BlockType::Q3_K | BlockType::Q6_K
    )
}

/// The weight rounded to the nearest, and to f16 where its rows are no whole blocks.
pub(crate) fn nearest(
    rows: &Rows,
    ty: BlockType,
    importance: Option<&[f32]>,
) -> Result<QuantRows<'static>> {
    let values: Vec<f32> = rows.data().iter().map(|&w| w as f32).collect();
    Ok(quantise(
        ty.for_rows(rows.cols()),
        &values,
        rows.cols(),
        importance,
    )?)
}

/// Importance of the inputs from their sums of squares, up to a power of two, which changes no rounding.
///
/// An input that was always zero counts a thousandth of the mean, so that its weights are not given up.
pub(crate) fn importance(squares: &[f64]) -> Vec<f32> {
    let largest = squares.iter().fold(0.0f64, |max, &s| max.max(s));
    if largest == 0.0 {
        return vec![1.0; squares.len()];
    }
    let scale = 2f64.powi(-largest.log2().floor() as i32);
    let floor = 1e-3 * squares.iter().sum::<f64>() / squares.len() as f64;
    let floored = |&s: &f64| if s == 0.0 { floor } else { s };
    squares
        .iter()
        .map(|s| (floored(s) * scale) as f32)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::super::{Compressed, Compressor, Inputs};
    use super::*;
    use crate::testing::{Lcg, with_threads};
    use faer::Mat;

    const COLS: usize = 512;

    fn problem() -> (Mat<f64>, Mat<f64>, Mat<f64>) {
        let mut lcg = Lcg(51);
        // f32 values, as checkpoints hold.
        let weight = lcg.matrix(96, COLS);
        let weight = Mat::from_fn(96, COLS, |i, j| f64::from(weight[(i, j)] as f32));
        let x = lcg.activations(COLS, 2300);
        let (seen, unseen) = (x.subcols(0, 2000), x.subcols(2000, 300));
        (weight, seen * seen.transpose(), unseen.to_owned())
    }

    fn compress(name: &str, weight: &Mat<f64>, h: &Mat<f64>) -> Compressed {
        let compressor: Compressor = name.parse().expect("a name");
        let inputs = Some(Inputs::Gram(h.as_ref()));
        compressor.compress(weight.as_ref(), inputs).expect("valid")
    }

    #[test]
    fn blocks_are_those_of_the_reference_quantiser() {
        let (weight, h, _) = problem();
        let values: Vec<f32> = (0..96 * COLS)
            .map(|at| weight[(at / COLS, at % COLS)] as f32)
            .collect();
        let squares: Vec<f64> = (0..COLS).map(|j| h[(j, j)]).collect();
        for ty in BlockType::ALL.into_iter().filter(|ty| ty.is_quantised()) {
            let name = ty.name().to_lowercase();
            let plain = compress(&name, &weight, &h).blocks.expect("blocks");
            assert_eq!(
                plain,
                quantise(ty, &values, COLS, None).expect("fits"),
                "{name}"
            );
            let weighted = compress(&format!("{name}-imatrix"), &weight, &h);
            let raw: Vec<f32> = squares.iter().map(|&s| (s / 1024.0) as f32).collect();
            let expected = quantise(ty, &values, COLS, Some(&raw)).expect("fits");
            let weighted = weighted.blocks.expect("blocks");
            assert_eq!(weighted, expected, "{name}");
            assert_eq!(weighted == plain, ty == BlockType::Q8_0, "{name}");
        }
    }

    #[test]
    fn a_given_importance_takes_the_place_of_that_of_the_inputs() {
        let (weight, h, _) = problem();
        let given: Vec<f64> = (0..COLS).map(|j| 1.0 + (j % 13) as f64).collect();
        for name in ["q4_k-imatrix", "gptq-q4_k", "q4_k"] {
            let compressor: Compressor = name.parse().expect("a name");
            let inputs = Some(Inputs::Gram(h.as_ref()));
            let weighted = |importance| {
                let compressed = compressor.compress_weighted(weight.as_ref(), inputs, importance);
                compressed.expect("valid").blocks.expect("blocks")
            };
            let uses = compressor.weights_by_importance();
            assert_eq!(weighted(None) != weighted(Some(&given)), uses, "{name}");
            if name == "q4_k-imatrix" {
                let of_inputs = Some(Inputs::Diagonal(&given));
                let expected = compressor.compress(weight.as_ref(), of_inputs);
                assert_eq!(
                    weighted(Some(&given)),
                    expected.expect("valid").blocks.expect("blocks")
                );
            }
            let short = compressor.compress_weighted(weight.as_ref(), inputs, Some(&given[1..]));
            assert_eq!(short.is_err(), uses, "{name}");
        }
    }

    #[test]
    fn gptq_on_the_scales_of_blocks_lowers_the_error_on_unseen_inputs() {
        let (weight, h, unseen) = problem();
        let loss = |name: &str| {
            let compressed = compress(name, &weight, &h);
            let blocks = compressed.blocks.expect("blocks");
            // The weight is what the bytes hold.
            let values = blocks.dequantise();
            let back = Mat::from_fn(96, COLS, |i, j| f64::from(values[i * COLS + j]));
            assert_eq!(back, compressed.weight, "{name}");
            ((&weight - &compressed.weight) * &unseen).norm_l2()
        };
        for ty in [
            "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "q4_0", "q4_1", "q5_0", "q5_1", "iq4_nl",
        ] {
            let weighted = loss(&format!("{ty}-imatrix"));
            let gptq = loss(&format!("gptq-{ty}"));
            let visited = loss(&format!("gptq-{ty}-act"));
            assert!(weighted < 1.02 * loss(ty), "{ty}: {weighted}");
            assert!(gptq < 0.95 * weighted, "{ty}: {gptq} of {weighted}");
            assert!(visited < 0.95 * weighted, "{ty}: {visited} of {weighted}");
        }
    }

    #[test]
    fn gptq_without_correlated_inputs_is_rounding_to_the_nearest() {
        let (weight, _, _) = problem();
        let one = Mat::<f64>::identity(COLS, COLS);
        for ty in ["q2_k", "q4_k", "q6_k"] {
            let gptq = compress(&format!("gptq-{ty}-plain"), &weight, &one);
            let nearest = compress(ty, &weight, &one);
            assert_eq!(gptq.blocks, nearest.blocks, "{ty}");
            assert_eq!(gptq.weight, nearest.weight, "{ty}");
        }
    }

    #[test]
    fn blocks_do_not_depend_on_the_number_of_threads_and_pruned_weights_stay_zero() {
        let (weight, h, _) = problem();
        for name in [
            "gptq-q4_k",
            "q3_k-imatrix",
            "wanda-2:4+gptq-q4_0",
            "sparsegpt-2:4+gptq-q6_k",
        ] {
            let one = with_threads(1, || compress(name, &weight, &h));
            let three = with_threads(3, || compress(name, &weight, &h));
            assert_eq!(one.blocks, three.blocks, "{name}");
            if let Some(mask) = one.mask {
                assert_eq!(mask.count(), 96 * COLS / 2, "{name}");
                let pruned = mask
                    .pruned()
                    .iter()
                    .enumerate()
                    .filter(|(_, pruned)| **pruned);
                for (at, _) in pruned {
                    assert_eq!(one.weight[(at / COLS, at % COLS)], 0.0, "{name}");
                }
            }
        }
    }

    #[test]
    fn rows_that_are_no_whole_blocks_fall_back_to_smaller_blocks_and_then_to_f16() {
        for (cols, expected) in [(96, BlockType::Q5_0), (40, BlockType::F16)] {
            let weight = Lcg(52).matrix(4, cols);
            let h = Mat::<f64>::identity(cols, cols);
            for name in ["q4_k", "gptq-q4_k"] {
                let blocks = compress(name, &weight, &h).blocks.expect("blocks");
                assert_eq!(blocks.block_type(), expected, "{name}");
            }
        }
    }

    #[test]
    fn a_mix_has_to_be_told_which_linear_it_compresses() {
        let (weight, h, _) = problem();
        let mix: Compressor = "gptq-q4_k_m".parse().expect("a name");
        let refused = mix.compress(weight.as_ref(), Some(Inputs::Gram(h.as_ref())));
        assert!(refused.unwrap_err().to_string().contains("linear"));
        let place = super::super::Place {
            linear: causal_lm::LinearName::Down,
            block: 0,
            blocks: 8,
            heads_per_kv: 1,
            experts: 0,
        };
        assert_eq!(mix.at(place).to_string(), "gptq-q6_k");
        // The first of eight blocks, rounded with importance as llama.cpp does.
        for (name, resolved) in [
            ("q4_0-imatrix", "q4_1-imatrix"),
            ("q5_0-imatrix", "q5_1-imatrix"),
            ("q4_0", "q4_0"),
            ("gptq-q4_0", "gptq-q4_0"),
            ("wanda-2:4+q4_0-imatrix", "wanda-2:4+q4_0-imatrix"),
        ] {
            let compressor: Compressor = name.parse().expect("a name");
            assert_eq!(compressor.at(place).to_string(), resolved);
        }
    }
}
