//! Codes of GPTQ and compressed-tensors in the blocks of GGUF files, without a change to any value.
//!
//! | grid | groups | block type |
//! |---|---|---|
//! | symmetric or signed, 4 bits | multiples of 32, or whole rows | `Q4_0` |
//! | symmetric, 3 bits | multiples of 256, or whole rows | `Q3_K` |
//! | symmetric, 3 or 2 bits | multiples of 32, or whole rows | `Q4_0`, with 4.5 bits per weight |
//! | zero points, 4 or 3 bits | multiples of 256, or whole rows | `Q4_K` |
//! | zero points, 2 bits | multiples of 256, or whole rows | `Q2_K` |
//! | zero points, 4, 3 or 2 bits, where f16 holds every scale · zero | multiples of 32, or whole rows | `Q4_1` |
//! | offset, 4 bits or fewer | multiples of 32, or whole rows | `Q4_1` |
//! | symmetric or signed, 8 bits | multiples of 32, or whole rows | `Q8_0` |
//!
//! Whole rows means rows that are whole blocks themselves. Blocks repeat the scale of a wider group, so that the file has
//! the bits per weight of its block type whatever the group was.

use half::f16;
use packed::{Block, BlockType, QuantRows};
use rayon::prelude::*;

use crate::compress::Quantised;
use crate::{Error, Result};

/// The blocks that hold this weight.
///
/// # Errors
/// [`Error::NotStorable`] with the reason where no block type holds it exactly.
pub fn place(module: &str, quantised: &Quantised) -> Result<QuantRows<'static>> {
    let refuse = |reason: String| Error::NotStorable {
        module: module.to_string(),
        format: "gguf",
        reason,
    };
    let placing = Placing::of(quantised).map_err(refuse)?;
    let (rows, cols) = (quantised.rows, quantised.cols);
    let ty = placing.ty;
    let (block_len, block_bytes) = (ty.block_len(), ty.block_bytes());
    let groups = quantised.groups();
    let mut bytes = vec![0; rows * (cols / block_len) * block_bytes];
    bytes
        .par_chunks_mut((cols / block_len * block_bytes).max(1))
        .enumerate()
        .for_each(|(row, bytes)| {
            for (i, bytes) in bytes.chunks_exact_mut(block_bytes).enumerate() {
                let start = i * block_len;
                let group = row * groups + start / quantised.group_width;
                let codes = &quantised.codes[row * cols + start..][..block_len];
                placing.block(quantised, group, codes).encode(ty, bytes);
            }
        });
    let placed =
        QuantRows::new(ty, rows, cols, bytes).map_err(|error| refuse(error.to_string()))?;
    check(quantised, &placed).map_err(refuse)?;
    Ok(placed)
}

/// How the codes of a grid become those of a block type.
struct Placing {
    ty: BlockType,
    /// Added to every code.
    shift: u8,
}

impl Placing {
    fn of(quantised: &Quantised) -> std::result::Result<Self, String> {
        if !quantised.is_ordered() {
            return Err(
                "its groups are not runs of neighbouring inputs, as blocks are; quantise without `-act`, or with `-static`"
                    .to_string(),
            );
        }
        let cols = quantised.cols;
        let fits = |block: usize| {
            cols.is_multiple_of(block)
                && (quantised.group_width >= cols || quantised.group_width.is_multiple_of(block))
        };
        if !fits(32) {
            return Err(format!(
                "groups of {} in rows of {cols} are not whole blocks of 32",
                quantised.group_width
            ));
        }
        let half = |value: f64| f16::from_f64(value).to_f64() == value;
        if !quantised
            .scales
            .iter()
            .chain(&quantised.offsets)
            .all(|&v| half(v))
        {
            return Err(
                "its scales are not finite f16 values, as those of blocks are; quantise with scales rounded to f16 (without `-exact`)"
                    .to_string(),
            );
        }
        let bits = quantised.bits.get();
        let placing = |ty, shift| Ok(Self { ty, shift });
        if !quantised.offsets.is_empty() {
            return match bits {
                2..=4 => placing(BlockType::Q4_1, 0),
                _ => Err(format!("no block type has {bits} bits and an offset")),
            };
        }
        if quantised.is_symmetric() {
            return match bits {
                // Scale 33 − 32 = 1 in every sub-block; codes have the same middle.
                3 if fits(256) => placing(BlockType::Q3_K, 0),
                2..=4 => placing(BlockType::Q4_0, 8 - quantised.bits.middle()),
                _ => placing(BlockType::Q8_0, 0),
            };
        }
        match bits {
            2 if fits(256) => placing(BlockType::Q2_K, 0),
            3 | 4 if fits(256) => placing(BlockType::Q4_K, 0),
            2..=4 => {
                let products = quantised.scales.iter().zip(&quantised.zeros);
                let exact = products
                    .clone()
                    .all(|(scale, zero)| half(scale * f64::from(*zero)));
                match exact {
                    true => placing(BlockType::Q4_1, 0),
                    false => Err(format!(
                        "zero points of groups of {} are products that f16 does not hold; quantise with `-sym`, \
                         `-offset`, or groups of 256",
                        quantised.group_width
                    )),
                }
            }
            _ => Err("no block type has 8 bits and zero points; quantise with `-sym`".to_string()),
        }
    }

    /// One block of codes of a group.
    fn block(&self, quantised: &Quantised, group: usize, codes: &[u8]) -> Block {
        let (scale, zero) = (quantised.scales[group], quantised.zeros[group]);
        let d = f16::from_f64(scale);
        let mut block = Block {
            d,
            ..Block::default()
        };
        match self.ty {
            BlockType::Q4_1 => {
                let offset = quantised.offsets.get(group).copied();
                let offset = offset.unwrap_or(-scale * f64::from(zero));
                block.m = f16::from_f64(offset);
            }
            BlockType::Q3_K => block.scales = [1; 16],
            BlockType::Q2_K | BlockType::Q4_K => {
                block.m = d;
                block.scales = [1; 16];
                block.mins = [zero; 16];
            }
            _ => {}
        }
        for (target, code) in block.codes.iter_mut().zip(codes) {
            *target = code + self.shift;
        }
        block
    }
}

/// Compares every value of the blocks with the weight's own, bit for bit.
fn check(quantised: &Quantised, placed: &QuantRows<'_>) -> std::result::Result<(), String> {
    let weight = quantised.dequantise();
    let values = placed.dequantise();
    let cols = quantised.cols;
    let differs = (0..values.len())
        .into_par_iter()
        .find_first(|&at| f64::from(values[at]) != weight[(at / cols, at % cols)]);
    match differs {
        None => Ok(()),
        Some(at) => Err(format!(
            "its value at row {}, column {} has no equal in {} blocks",
            at / cols,
            at % cols,
            placed.block_type()
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compress::{Compressed, Compressor, Inputs};
    use crate::testing::Lcg;
    use faer::Mat;

    fn compress(name: &str, cols: usize) -> Compressed {
        let mut lcg = Lcg(41);
        let weight = lcg.matrix(6, cols);
        let x = lcg.activations(cols, 2 * cols);
        let h = &x * x.transpose();
        let compressor: Compressor = name.parse().expect("a name");
        let inputs = Some(Inputs::Gram(h.as_ref()));
        compressor.compress(weight.as_ref(), inputs).expect("valid")
    }

    fn placed(name: &str, cols: usize) -> Result<QuantRows<'static>> {
        let compressed = compress(name, cols);
        place("up_proj", &compressed.quantised.expect("it quantises"))
    }

    #[test]
    fn placed_blocks_have_exactly_the_values_of_the_weight() {
        use BlockType::{Q2_K, Q3_K, Q4_0, Q4_1, Q4_K, Q8_0};
        for (name, cols, expected) in [
            ("gptq-int4-g32-sym", 64, Q4_0),
            ("gptq-int4-g64-sym-act-static", 128, Q4_0),
            ("rtn-int4-sym", 96, Q4_0),
            ("rtn-int4-g32-symclip", 64, Q4_0),
            ("gptq-int4-g32-signed", 64, Q4_0),
            ("gptq-int3-sym", 256, Q3_K),
            ("gptq-int3-g256-signed", 512, Q3_K),
            ("gptq-int3-g32-sym", 256, Q4_0),
            ("rtn-int2-g64-sym", 128, Q4_0),
            ("gptq-int4", 256, Q4_K),
            ("gptq-int4-g256", 512, Q4_K),
            ("rtn-int3-g512", 512, Q4_K),
            ("gptq-int2-g256", 512, Q2_K),
            ("gptq-int4-g32-offset", 64, Q4_1),
            ("rtn-int3-g64-offset", 128, Q4_1),
            ("gptq-int4-offset", 32, Q4_1),
            ("rtn-int8-g32-sym", 64, Q8_0),
            ("gptq-int8-g64-signed", 128, Q8_0),
            ("wanda-2:4+gptq-int4-g32-sym", 64, Q4_0),
        ] {
            let blocks = placed(name, cols).unwrap_or_else(|error| panic!("{name}: {error}"));
            assert_eq!(blocks.block_type(), expected, "{name}");
            assert_eq!((blocks.rows(), blocks.cols()), (6, cols));
            let weight = compress(name, cols).weight;
            let values = blocks.dequantise();
            let back = Mat::from_fn(6, cols, |i, j| f64::from(values[i * cols + j]));
            assert_eq!(back, weight, "{name}");
            blocks.check().expect("finite scales");
        }
    }

    #[test]
    fn zero_points_go_into_blocks_of_32_only_where_f16_holds_their_products() {
        let refused = placed("gptq-int4-g32", 64).unwrap_err().to_string();
        assert!(refused.contains("offset"), "{refused}");
        // Scales with few bits, as powers of two.
        let compressed = compress("rtn-int4-g32", 64);
        let mut quantised = compressed.quantised.expect("it quantises");
        for (i, scale) in quantised.scales.iter_mut().enumerate() {
            *scale = 0.5f64.powi(i as i32 % 5);
        }
        let blocks = place("up_proj", &quantised).expect("exact");
        assert_eq!(blocks.block_type(), BlockType::Q4_1);
        let values = blocks.dequantise();
        let weight = quantised.dequantise();
        assert!((0..6 * 64).all(|at| f64::from(values[at]) == weight[(at / 64, at % 64)]));
    }

    #[test]
    fn what_no_block_holds_is_refused_with_the_reason() {
        for (name, cols, reason) in [
            ("gptq-int4-g32-sym-act", 64, "neighbouring"),
            ("rtn-int4-g48-sym", 96, "blocks of 32"),
            ("rtn-int4-sym", 80, "blocks of 32"),
            ("rtn-int4-g32-sym-exact", 64, "f16"),
            ("rtn-int8-g32", 64, "8 bits and zero points"),
            ("rtn-int8-g32-offset", 64, "offset"),
            ("rtn-int3-g32", 64, "f16 does not hold"),
        ] {
            let error = placed(name, cols).expect_err(name).to_string();
            assert!(error.contains(reason), "{name}: {error}");
            assert!(error.contains("up_proj"), "{error}");
        }
    }
}
