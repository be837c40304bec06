//! A quantised weight: codes, and scale and zero for each group of each output.

use faer::{Mat, MatRef};

use super::grid::Bits;
use super::rows::transpose;

/// A quantised weight, `rows × cols` (outputs × inputs): w = scale · (code − zero) + offset.
#[derive(Debug, Clone, PartialEq)]
pub struct Quantised {
    /// Bits per code.
    pub bits: Bits,
    /// Outputs.
    pub rows: usize,
    /// Inputs.
    pub cols: usize,
    /// Inputs in a group; the last group may have fewer.
    pub group_width: usize,
    /// Codes, row-major `[rows, cols]`.
    pub codes: Vec<u8>,
    /// Scales, row-major `[rows, groups]`.
    pub scales: Vec<f64>,
    /// Zero points, row-major `[rows, groups]`, in 0 ..= 2^bits − 1.
    pub zeros: Vec<u8>,
    /// Offsets, row-major `[rows, groups]`; empty where all are 0, which is every grid but
    /// [`Symmetry::Offset`](super::Symmetry::Offset).
    pub offsets: Vec<f64>,
    /// The group of each input, `[cols]`.
    pub group_index: Vec<u32>,
}

impl Quantised {
    /// Groups per output.
    pub fn groups(&self) -> usize {
        self.cols.div_ceil(self.group_width)
    }

    /// The weight, `rows × cols`.
    pub fn dequantise(&self) -> Mat<f64> {
        let groups = self.groups();
        let mut columns = vec![0.0; self.rows * self.cols];
        transpose(&mut columns, self.rows, |column, row| {
            let group = row * groups + self.group_index[column] as usize;
            let code = f64::from(self.codes[row * self.cols + column]);
            let offset = self.offsets.get(group).copied().unwrap_or(0.0);
            self.scales[group] * (code - f64::from(self.zeros[group])) + offset
        });
        MatRef::from_column_major_slice(&columns, self.rows, self.cols).to_owned()
    }

    /// Whether every zero point lies in the middle, so that none need be stored.
    pub fn is_symmetric(&self) -> bool {
        self.offsets.is_empty() && self.zeros.iter().all(|&zero| zero == self.bits.middle())
    }

    /// Whether groups are runs of neighbouring inputs, so that no index need be stored.
    pub fn is_ordered(&self) -> bool {
        self.group_index
            .iter()
            .enumerate()
            .all(|(column, &group)| group as usize == column / self.group_width)
    }
}
