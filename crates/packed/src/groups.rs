//! Integers in groups, as GPTQ and compressed-tensors checkpoints hold them.

use std::ops::Range;

use half::f16;

use crate::error::check_length;
use crate::tile::{BLOCK, HALF_BLOCK};
use crate::{Error, Result};

/// Bits of a code in a group: 2, 3, 4 or 8.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct GroupBits(u32);

impl GroupBits {
    /// 2, 3, 4 or 8; None for another number.
    pub fn new(bits: u32) -> Option<Self> {
        matches!(bits, 2 | 3 | 4 | 8).then_some(Self(bits))
    }

    /// The number.
    pub fn get(self) -> u32 {
        self.0
    }

    /// The largest code.
    pub fn max_code(self) -> u8 {
        u8::MAX >> (8 - self.0)
    }

    /// The zero of symmetric groups, 2^(bits − 1).
    pub fn middle(self) -> u8 {
        1 << (self.0 - 1)
    }
}

/// A matrix `[rows, cols]` of codes: w = scale (code − zero), with scale and zero of the row's group that the column is
/// in. Groups are runs of columns, or chosen for each column by an index (GPTQ's act-order).
#[derive(Clone, Debug, PartialEq)]
pub struct Groups {
    bits: GroupBits,
    rows: usize,
    cols: usize,
    width: usize,
    codes: Vec<u8>,
    scales: Vec<f16>,
    zeros: Option<Vec<u8>>,
    order: Option<Vec<u32>>,
}

/// What [`Groups::new`] is made from.
#[derive(Clone, Debug)]
pub struct GroupParts {
    /// Bits of a code.
    pub bits: GroupBits,
    /// Rows (outputs).
    pub rows: usize,
    /// Columns (inputs).
    pub cols: usize,
    /// Columns of a group: 16, a multiple of 32, or at least `cols` for one group a row. The last group may have fewer.
    pub width: usize,
    /// Codes, row-major `[rows, cols]`, columns in their own order.
    pub codes: Vec<u8>,
    /// Scales, row-major `[rows, groups]`.
    pub scales: Vec<f16>,
    /// Zeros, row-major `[rows, groups]`; None for those of symmetric groups.
    pub zeros: Option<Vec<u8>>,
    /// The group of each column; None when column j is in group j / width.
    pub group_index: Option<Vec<u32>>,
}

impl Groups {
    /// Checks and takes the parts.
    ///
    /// # Errors
    /// [`Error::GroupWidth`] for a width that is neither 16 nor a multiple of 32 and [`Error::GroupIndex`] for an index that
    /// does not fill groups evenly (no kernel serves them); [`Error::Length`]; [`Error::Code`] for codes and zeros beyond the bits; [`Error::Scale`] for scales
    /// that are not finite.
    pub fn new(parts: GroupParts) -> Result<Self> {
        let GroupParts {
            bits,
            rows,
            cols,
            width,
            codes,
            scales,
            zeros,
            group_index,
        } = parts;
        let width = width.min(cols.max(1));
        if width < cols && width != HALF_BLOCK && !(width > 0 && width.is_multiple_of(BLOCK)) {
            return Err(Error::GroupWidth(width));
        }
        let groups = cols.div_ceil(width.max(1));
        check_length("codes", codes.len(), rows * cols)?;
        check_length("scales", scales.len(), rows * groups)?;
        let most = bits.max_code();
        let place = |at: usize, cols: usize| (at / cols, at % cols);
        if let Some(at) = codes.iter().position(|&code| code > most) {
            let (row, column) = place(at, cols);
            return Err(Error::Code { row, column, most });
        }
        if let Some(at) = scales.iter().position(|scale| !scale.is_finite()) {
            let (row, block) = place(at, groups);
            return Err(Error::Scale { row, block });
        }
        let zeros = match zeros {
            Some(zeros) => {
                check_length("zeros", zeros.len(), rows * groups)?;
                if let Some(at) = zeros.iter().position(|&zero| zero > most) {
                    let (row, group) = place(at, groups);
                    let column = group * width;
                    return Err(Error::Code { row, column, most });
                }
                let symmetric = zeros.iter().all(|&zero| zero == bits.middle());
                (!symmetric).then_some(zeros)
            }
            None => None,
        };
        let order = match group_index {
            Some(index) => order(&index, cols, width)?,
            None => None,
        };
        Ok(Self {
            bits,
            rows,
            cols,
            width,
            codes,
            scales,
            zeros,
            order,
        })
    }

    /// Bits of a code.
    pub fn bits(&self) -> GroupBits {
        self.bits
    }

    /// Rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Columns of a group.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Groups of a row.
    pub fn groups(&self) -> usize {
        self.cols.div_ceil(self.width)
    }

    /// Scale of a group of a row.
    pub fn scale(&self, row: usize, group: usize) -> f16 {
        self.scales[row * self.groups() + group]
    }

    /// Zero of a group of a row.
    pub fn zero(&self, row: usize, group: usize) -> u8 {
        match &self.zeros {
            Some(zeros) => zeros[row * self.groups() + group],
            None => self.bits.middle(),
        }
    }

    pub(crate) fn zeros(&self) -> Option<&[u8]> {
        self.zeros.as_deref()
    }

    /// The columns in the order that makes groups contiguous, unless they are already.
    pub fn order(&self) -> Option<&[u32]> {
        self.order.as_deref()
    }

    /// Copies codes of a row; `positions` are positions in that order.
    pub(crate) fn codes_in_order(&self, row: usize, positions: Range<usize>, to: &mut [u8]) {
        let codes = &self.codes[row * self.cols..][..self.cols];
        match &self.order {
            None => to.copy_from_slice(&codes[positions]),
            Some(order) => {
                for (to, &column) in to.iter_mut().zip(&order[positions]) {
                    *to = codes[column as usize];
                }
            }
        }
    }

    /// The values, row-major.
    pub fn dequantise(&self) -> Vec<f32> {
        let mut group_of: Vec<usize> = (0..self.cols).map(|column| column / self.width).collect();
        if let Some(order) = &self.order {
            for (position, &column) in order.iter().enumerate() {
                group_of[column as usize] = position / self.width;
            }
        }
        let mut values = Vec::with_capacity(self.codes.len());
        for (row, codes) in self.codes.chunks(self.cols.max(1)).enumerate() {
            values.extend(codes.iter().zip(&group_of).map(|(&code, &group)| {
                let centred = i32::from(code) - i32::from(self.zero(row, group));
                self.scale(row, group).to_f32() * centred as f32
            }));
        }
        values
    }
}

/// Columns sorted by group; None if they are sorted.
fn order(index: &[u32], cols: usize, width: usize) -> Result<Option<Vec<u32>>> {
    check_length("group indices", index.len(), cols)?;
    let mut order: Vec<u32> = (0..cols as u32).collect();
    order.sort_by_key(|&column| index[column as usize]);
    let even = order
        .iter()
        .enumerate()
        .all(|(position, &column)| index[column as usize] as usize == position / width);
    if !even {
        return Err(Error::GroupIndex);
    }
    let sorted = order
        .iter()
        .enumerate()
        .all(|(i, &column)| i == column as usize);
    Ok((!sorted).then_some(order))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts() -> GroupParts {
        GroupParts {
            bits: GroupBits::new(4).unwrap(),
            rows: 2,
            cols: 64,
            width: 32,
            codes: (0..128).map(|i| (i * 7 % 16) as u8).collect(),
            scales: [0.5, 0.25, 1.0, 2.0].map(f16::from_f32).to_vec(),
            zeros: Some(vec![3, 8, 0, 15]),
            group_index: None,
        }
    }

    #[test]
    fn a_value_is_its_scale_times_code_less_zero() {
        let groups = Groups::new(parts()).unwrap();
        let values = groups.dequantise();
        assert_eq!(values[1], 0.5 * (7.0 - 3.0));
        assert_eq!(values[64 + 33], 2.0 * (((64 + 33) * 7 % 16) as f32 - 15.0));
    }

    #[test]
    fn an_index_sorts_columns_by_group_and_must_fill_groups() {
        let mut parts = parts();
        parts.group_index = Some((0..64).map(|j| u32::from(j % 2 == 0)).collect());
        let groups = Groups::new(parts.clone()).unwrap();
        assert_eq!(groups.order().unwrap()[..3], [1, 3, 5]);
        let mut codes = [0; 2];
        groups.codes_in_order(1, 31..33, &mut codes);
        assert_eq!(codes, [parts.codes[64 + 63], parts.codes[64]]);
        assert_eq!(groups.dequantise()[1], 0.5 * (7.0 - 3.0));
        assert_eq!(groups.dequantise()[0], 0.25 * (0.0 - 8.0));
        parts.group_index = Some((0..64).map(|j| j / 32).collect());
        assert_eq!(Groups::new(parts.clone()).unwrap().order(), None);
        parts.group_index = Some((0..64).map(|j| u32::from(j > 20)).collect());
        assert!(matches!(Groups::new(parts), Err(Error::GroupIndex)));
    }

    #[test]
    fn malformed_parts_are_refused_by_place() {
        let broken = |change: fn(&mut GroupParts)| {
            let mut parts = parts();
            change(&mut parts);
            Groups::new(parts).unwrap_err()
        };
        assert_eq!(
            broken(|p| p.codes[70] = 16),
            Error::Code {
                row: 1,
                column: 6,
                most: 15
            }
        );
        assert_eq!(
            broken(|p| p.scales[1] = f16::INFINITY),
            Error::Scale { row: 0, block: 1 }
        );
        assert!(matches!(
            broken(|p| p.zeros = Some(vec![1])),
            Error::Length { .. }
        ));
        assert_eq!(broken(|p| p.width = 20), Error::GroupWidth(20));
        assert_eq!(broken(|p| p.width = 0), Error::GroupWidth(0));
        assert!(GroupBits::new(5).is_none());
    }
}
