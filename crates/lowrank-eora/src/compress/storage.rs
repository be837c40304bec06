//! How many bytes a compressed weight takes.

use super::{Compressed, Mask};

/// Bytes of the parts of a compressed weight, as files of the usual formats hold them: 16-bit floats, codes without gaps.
///
/// Of a pruned weight only what stays counts, and a mask of one bit per weight. That is what a format for sparse weights
/// needs (`sparse-bitmask`; for 2:4 the indices of the hardware format take as much); a dense file with zeros in it takes
/// as much as the uncompressed weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Storage {
    /// Weights, or their codes.
    pub values: usize,
    /// The mask of a pruned weight.
    pub mask: usize,
    /// Scales.
    pub scales: usize,
    /// Zero points; none if the grid is symmetric.
    pub zeros: usize,
    /// The group of each input, where groups are not runs of neighbours: 4 bytes each.
    pub group_index: usize,
    /// Number of weights.
    pub weights: usize,
}

/// Bytes of a 16-bit float.
const HALF: usize = 2;

impl Storage {
    /// Of an uncompressed weight in 16-bit floats.
    pub fn dense(rows: usize, cols: usize) -> Self {
        Self {
            values: rows * cols * HALF,
            mask: 0,
            scales: 0,
            zeros: 0,
            group_index: 0,
            weights: rows * cols,
        }
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

impl Compressed {
    /// How many bytes this weight takes.
    pub fn storage(&self) -> Storage {
        let weights = self.weight.nrows() * self.weight.ncols();
        let pruned = self.mask.as_ref().map_or(0, Mask::count);
        let kept = weights - pruned;
        let mut storage = Storage::dense(self.weight.nrows(), self.weight.ncols());
        storage.values = kept * HALF;
        if pruned > 0 {
            storage.mask = weights.div_ceil(8);
        }
        if let Some(quantised) = &self.quantised {
            let bits = quantised.bits.get();
            storage.values = (kept * bits).div_ceil(8);
            storage.scales = quantised.scales.len() * HALF;
            if !quantised.is_symmetric() {
                storage.zeros = (quantised.zeros.len() * bits).div_ceil(8);
            }
            if !quantised.is_ordered() {
                storage.group_index = 4 * quantised.cols;
            }
        }
        storage
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Compressor, Inputs};
    use faer::Mat;

    fn bits(name: &str) -> f64 {
        let weight = Mat::from_fn(64, 256, |i, j| ((i * 31 + j * 17) % 101) as f64 - 30.0);
        let inputs = vec![1.0; 256];
        let compressor: Compressor = name.parse().expect("a name");
        let inputs = Some(Inputs::Diagonal(&inputs));
        let compressed = compressor.compress(weight.as_ref(), inputs).expect("valid");
        compressed.storage().bits_per_weight()
    }

    #[test]
    fn bits_per_weight_are_codes_masks_scales_and_zeros() {
        assert_eq!(bits("none"), 16.0);
        assert_eq!(bits("wanda-2:4"), 8.0 + 1.0);
        assert_eq!(bits("wanda-75"), 4.0 + 1.0);
        assert_eq!(bits("rtn-int4-g128"), 4.0 + (16.0 + 4.0) / 128.0);
        assert_eq!(bits("rtn-int4-g128-sym"), 4.0 + 16.0 / 128.0);
        assert_eq!(bits("rtn-int3"), 3.0 + (16.0 + 3.0) / 256.0);
        assert_eq!(bits("wanda-2:4+rtn-int4-sym"), 2.0 + 1.0 + 16.0 / 256.0);
    }
}
