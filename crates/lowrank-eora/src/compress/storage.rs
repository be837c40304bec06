//! How many bytes a compressed weight takes.

use super::grid::{Group, Symmetry};
use super::prune::{Pattern, Prune, Score, share};
use super::{BlockTypes, Compressed, Compressor, Mask, Quantised};
use packed::{BlockType, QuantRows};

/// Bytes of the parts of a compressed weight, as a file holds them.
///
/// Weights in groups count as in a GPTQ file: whole 32-bit words of codes and of zero points, f16 scales, and the group
/// of each input, whether the grid needs them or not. Weights on an offset grid, which GPTQ does not store, count as the
/// GGUF blocks that hold them, weights in blocks as those blocks.
///
/// Of a pruned weight only the kept values count, and a mask of one bit for each weight. That is what a format for sparse
/// weights needs (`sparse-bitmask`; for 2:4 the indices of the hardware format take as much); a file with the zeros in
/// it, which is what runtimes load today, takes as much as the dense weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Storage {
    /// Weights, or their codes.
    pub values: usize,
    /// The mask of a pruned weight.
    pub mask: usize,
    /// Scales.
    pub scales: usize,
    /// Zero points, or offsets.
    pub zeros: usize,
    /// The group of each input: 4 bytes each.
    pub group_index: usize,
    /// Number of weights.
    pub weights: usize,
}

/// Bytes of an f16 scale.
const SCALE: usize = 2;
/// Bytes and bits of a word of codes.
const WORD: usize = 4;
const WORD_BITS: usize = 32;

impl Storage {
    /// Of floats of `width` bytes, `kept` of which are not zero: with a mask where that takes less.
    pub fn floats(weights: usize, kept: usize, width: usize) -> Self {
        let (sparse, mask) = (kept * width, weights.div_ceil(8));
        let (values, mask) = match sparse + mask < weights * width {
            true => (sparse, mask),
            false => (weights * width, 0),
        };
        Self {
            values,
            mask,
            scales: 0,
            zeros: 0,
            group_index: 0,
            weights,
        }
    }

    /// Of a quantised weight of which `pruned` weights were pruned before.
    pub fn quantised(weight: &Quantised, pruned: usize) -> Self {
        let shape = Groups {
            rows: weight.rows,
            cols: weight.cols,
            bits: weight.bits.get(),
            group_width: weight.group_width,
            offset: !weight.offsets.is_empty(),
        };
        shape.storage(weight.rows * weight.cols - pruned)
    }

    /// Of a weight in GGUF blocks, scales included.
    pub fn blocks(weight: &QuantRows<'_>) -> Self {
        Self {
            values: weight.bytes().len(),
            mask: 0,
            scales: 0,
            zeros: 0,
            group_index: 0,
            weights: weight.rows() * weight.cols(),
        }
    }

    /// What `compressor` will make of an `m × n` weight of floats of `width` bytes, without compressing it; `None`
    /// where it does not fit the shape, and for a mix of block types that was not resolved.
    ///
    /// Ties and what a sweep prunes beyond its pattern are not foreseen.
    pub fn predicted(
        compressor: &Compressor,
        (m, n): (usize, usize),
        width: usize,
    ) -> Option<Self> {
        let weights = m * n;
        let kept = match compressor.prune {
            None => weights,
            Some(Prune { score, pattern }) => match (pattern, score) {
                (Pattern::Nm { keep, of }, _) if n.is_multiple_of(of) => weights / of * keep,
                (Pattern::Nm { .. }, _) => return None,
                // Wanda prunes equally many of each output.
                (Pattern::Unstructured { percent, .. }, Score::Wanda) => {
                    m * (n - share(n, percent))
                }
                (Pattern::Unstructured { percent, .. }, _) => weights - share(weights, percent),
            },
        };
        if let Some(blocks) = compressor.blocks {
            let BlockTypes::One(ty) = blocks.types else {
                return None;
            };
            return Some(Self {
                mask: 0,
                values: m * ty.for_rows(n).row_bytes(n).ok()?,
                ..Self::floats(weights, weights, width)
            });
        }
        let Some(quantise) = compressor.quantise else {
            return Some(Self::floats(weights, kept, width));
        };
        let grid = quantise.grid;
        let shape = Groups {
            rows: m,
            cols: n,
            bits: grid.bits.get(),
            group_width: match grid.group {
                Group::Channel => n,
                Group::Columns(width) => width,
            },
            offset: grid.symmetry == Symmetry::Offset,
        };
        Some(shape.storage(kept))
    }

    /// All bytes.
    pub fn bytes(&self) -> usize {
        self.values + self.mask + self.scales + self.zeros + self.group_index
    }

    /// Bits per weight, everything counted.
    pub fn bits_per_weight(&self) -> f64 {
        8.0 * self.bytes() as f64 / self.weights.max(1) as f64
    }
}

/// What the size of a weight in groups depends on.
struct Groups {
    rows: usize,
    cols: usize,
    bits: usize,
    group_width: usize,
    offset: bool,
}

impl Groups {
    /// With `kept` weights that are not pruned.
    fn storage(&self, kept: usize) -> Storage {
        let (rows, cols, bits) = (self.rows, self.cols, self.bits);
        let weights = rows * cols;
        let words = |codes: usize| (codes * bits).div_ceil(WORD_BITS) * WORD;
        let groups = cols.div_ceil(self.group_width.max(1));
        let blocks = BlockType::Q4_1;
        let whole = |width: usize| width.is_multiple_of(blocks.block_len());
        let in_blocks = whole(cols) && (self.group_width >= cols || whole(self.group_width));
        if self.offset && in_blocks {
            return Storage {
                values: weights / blocks.block_len() * blocks.block_bytes(),
                mask: 0,
                scales: 0,
                zeros: 0,
                group_index: 0,
                weights,
            };
        }
        let (values, mask) = match kept < weights {
            true => ((kept * bits).div_ceil(8), weights.div_ceil(8)),
            false => (rows * words(cols), 0),
        };
        Storage {
            values,
            mask,
            scales: rows * groups * SCALE,
            zeros: match self.offset {
                true => rows * groups * SCALE,
                false => groups * words(rows),
            },
            group_index: WORD * cols,
            weights,
        }
    }
}

impl Compressed {
    /// How many bytes this weight takes; those that are not quantised as floats of `width` bytes.
    pub fn storage(&self, width: usize) -> Storage {
        let pruned = self.mask.as_ref().map_or(0, Mask::count);
        match (&self.quantised, &self.blocks) {
            (Some(quantised), _) => Storage::quantised(quantised, pruned),
            (None, Some(blocks)) => Storage::blocks(blocks),
            (None, None) => {
                let weights = self.weight.nrows() * self.weight.ncols();
                Storage::floats(weights, weights - pruned, width)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Compressor, Inputs};
    use super::Storage;
    use faer::Mat;

    fn storage(name: &str, (m, n): (usize, usize)) -> Storage {
        let weight = Mat::from_fn(m, n, |i, j| {
            ((i * 37 + j * 101 + i * j) % 193) as f64 - 66.5
        });
        let h = Mat::from_fn(n, n, |i, j| if i == j { 1.0 + i as f64 } else { 0.25 });
        let compressor: Compressor = name.parse().expect("a name");
        let inputs = Some(Inputs::Gram(h.as_ref()));
        let compressed = compressor.compress(weight.as_ref(), inputs).expect("valid");
        compressed.storage(2)
    }

    #[test]
    fn bits_per_weight_are_codes_masks_scales_zeros_and_the_index_of_groups() {
        let bits = |name| storage(name, (64, 256)).bits_per_weight();
        assert_eq!(bits("none"), 16.0);
        assert_eq!(bits("wanda-2:4"), 8.0 + 1.0);
        assert_eq!(bits("wanda-75"), 4.0 + 1.0);
        let index = 8.0 * 4.0 / 64.0;
        for name in [
            "rtn-int4-g128",
            "rtn-int4-g128-sym",
            "gptq-int4-g128-sym-act",
        ] {
            assert_eq!(bits(name), 4.0 + (16.0 + 4.0) / 128.0 + index, "{name}");
        }
        assert_eq!(bits("rtn-int3"), 3.0 + (16.0 + 3.0) / 256.0 + index);
        let pruned = bits("wanda-2:4+rtn-int4-sym");
        assert_eq!(pruned, 2.0 + 1.0 + (16.0 + 4.0) / 256.0 + index);
        // In GGUF's blocks of 32, with a scale and an offset each.
        assert_eq!(bits("rtn-int4-g64-offset"), 4.0 + 32.0 / 32.0);
    }

    #[test]
    fn a_quantised_weight_takes_the_bytes_of_its_gptq_tensors() {
        use crate::format::gptq::{Version, tensors};
        for name in ["rtn-int4-g16-sym", "rtn-int3-g32", "gptq-int8-g32-sym-act"] {
            let (m, n) = (64, 96);
            let weight = Mat::from_fn(m, n, |i, j| ((i * 37 + j * 101) % 193) as f64 - 66.5);
            let h = Mat::from_fn(n, n, |i, j| if i == j { 1.0 + i as f64 } else { 0.25 });
            let compressor: Compressor = name.parse().expect("a name");
            let inputs = Some(Inputs::Gram(h.as_ref()));
            let compressed = compressor.compress(weight.as_ref(), inputs).expect("valid");
            let quantised = compressed.quantised.as_ref().expect("it quantises");
            let written = tensors("up_proj", quantised, Version::V2).expect("storable");
            let bytes: usize = written.iter().map(|(_, bytes)| bytes.len()).sum();
            assert_eq!(compressed.storage(2).bytes(), bytes, "{name}");
        }
    }

    #[test]
    fn predicted_bytes_are_those_of_compressed_weights() {
        for name in [
            "none",
            "rtn-int3",
            "gptq-int4-g32",
            "gptq-int4-g32-act",
            "gptq-int4-g32-act-static",
            "rtn-int4-g16-sym",
            "rtn-int4-g32-offset",
            "q4_k",
            "gptq-q8_0",
            "gptq-int4-g32-signed",
            "wanda-2:4",
            "magnitude-37.3",
            "magnitude-1",
            "wanda-44.9",
            "sparsegpt-44.9",
            "wanda-2:4+rtn-int4",
            "sparsegpt-50+gptq-int3-g32",
        ] {
            for shape in [(32, 64), (64, 64), (64, 96)] {
                let predicted = Storage::predicted(&name.parse().expect("a name"), shape, 2);
                assert_eq!(predicted, Some(storage(name, shape)), "{name} {shape:?}");
            }
        }
        let pattern = "wanda-2:4".parse().expect("a name");
        assert_eq!(Storage::predicted(&pattern, (4, 6), 2), None);
    }
}
