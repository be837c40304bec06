//! The types of values that a matrix is stored in, by their names and numbers in GGUF files.

use std::fmt;
use std::str::FromStr;

use crate::{Error, Result};

/// How the values of a matrix are stored: floats, or blocks of codes that share scales.
///
/// Names and numbers are those of ggml.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(non_camel_case_types, reason = "the names of ggml")]
#[non_exhaustive]
pub enum BlockType {
    /// 32-bit floats.
    F32,
    /// 16-bit IEEE floats.
    F16,
    /// 16-bit brain floats.
    BF16,
    /// 4 bits, a scale for 32 values.
    Q4_0,
    /// 4 bits, a scale and a minimum for 32 values.
    Q4_1,
    /// 5 bits, a scale for 32 values.
    Q5_0,
    /// 5 bits, a scale and a minimum for 32 values.
    Q5_1,
    /// 8 bits, a scale for 32 values.
    Q8_0,
    /// 2 bits; scales and minimums of 4 bits for 16 values, two floats for 256.
    Q2_K,
    /// 3 bits; scales of 6 bits for 16 values, a float for 256.
    Q3_K,
    /// 4 bits; scales and minimums of 6 bits for 32 values, two floats for 256.
    Q4_K,
    /// 5 bits; scales and minimums of 6 bits for 32 values, two floats for 256.
    Q5_K,
    /// 6 bits; scales of 8 bits for 16 values, a float for 256.
    Q6_K,
    /// 4 bits that choose one of 16 unevenly spaced levels, a scale for 32 values.
    IQ4_NL,
}

/// Values of the K types' blocks.
pub(crate) const K_BLOCK: usize = 256;
/// Values of the other quantised types' blocks.
pub(crate) const SMALL_BLOCK: usize = 32;

impl BlockType {
    /// All types.
    pub const ALL: [Self; 14] = [
        Self::F32,
        Self::F16,
        Self::BF16,
        Self::Q4_0,
        Self::Q4_1,
        Self::Q5_0,
        Self::Q5_1,
        Self::Q8_0,
        Self::Q2_K,
        Self::Q3_K,
        Self::Q4_K,
        Self::Q5_K,
        Self::Q6_K,
        Self::IQ4_NL,
    ];

    /// The number of the type in GGUF files.
    pub fn id(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Q4_0 => 2,
            Self::Q4_1 => 3,
            Self::Q5_0 => 6,
            Self::Q5_1 => 7,
            Self::Q8_0 => 8,
            Self::Q2_K => 10,
            Self::Q3_K => 11,
            Self::Q4_K => 12,
            Self::Q5_K => 13,
            Self::Q6_K => 14,
            Self::IQ4_NL => 20,
            Self::BF16 => 30,
        }
    }

    /// The type of a number; None for numbers of types that this crate does not have.
    pub fn from_id(id: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|ty| ty.id() == id)
    }

    /// Its name, as in `Q4_K`.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::BF16 => "BF16",
            Self::Q4_0 => "Q4_0",
            Self::Q4_1 => "Q4_1",
            Self::Q5_0 => "Q5_0",
            Self::Q5_1 => "Q5_1",
            Self::Q8_0 => "Q8_0",
            Self::Q2_K => "Q2_K",
            Self::Q3_K => "Q3_K",
            Self::Q4_K => "Q4_K",
            Self::Q5_K => "Q5_K",
            Self::Q6_K => "Q6_K",
            Self::IQ4_NL => "IQ4_NL",
        }
    }

    /// Values in a block, 1 for floats. A row must be a multiple of it.
    pub fn block_len(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::BF16 => 1,
            Self::Q4_0 | Self::Q4_1 | Self::Q5_0 | Self::Q5_1 | Self::Q8_0 | Self::IQ4_NL => {
                SMALL_BLOCK
            }
            Self::Q2_K | Self::Q3_K | Self::Q4_K | Self::Q5_K | Self::Q6_K => K_BLOCK,
        }
    }

    /// Bytes of a block.
    pub fn block_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
            Self::Q4_0 | Self::IQ4_NL => 18,
            Self::Q4_1 => 20,
            Self::Q5_0 => 22,
            Self::Q5_1 => 24,
            Self::Q8_0 => 34,
            Self::Q2_K => 84,
            Self::Q3_K => 110,
            Self::Q4_K => 144,
            Self::Q5_K => 176,
            Self::Q6_K => 210,
        }
    }

    /// Bits per value, scales included.
    pub fn bits_per_weight(self) -> f64 {
        8.0 * self.block_bytes() as f64 / self.block_len() as f64
    }

    /// Whether it is a type of blocks, not of floats.
    pub fn is_quantised(self) -> bool {
        self.block_len() > 1
    }

    /// This type, or the one that llama.cpp takes instead where rows of `cols` values are not whole blocks of it: the next
    /// of at least as many bits with blocks of 32, or 16-bit floats where those do not fill the rows either.
    pub fn for_rows(self, cols: usize) -> Self {
        let smaller = match self {
            Self::Q2_K | Self::Q3_K => Self::Q4_0,
            Self::Q4_K => Self::Q5_0,
            Self::Q5_K => Self::Q5_1,
            Self::Q6_K => Self::Q8_0,
            other => other,
        };
        let fits = |ty: &Self| cols.is_multiple_of(ty.block_len());
        [self, smaller].into_iter().find(fits).unwrap_or(Self::F16)
    }

    /// `general.file_type` of a GGUF file whose matrices have this type.
    pub fn file_type(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Q4_0 => 2,
            Self::Q4_1 => 3,
            Self::Q8_0 => 7,
            Self::Q5_0 => 8,
            Self::Q5_1 => 9,
            // Of K types with several mixes the plainest.
            Self::Q2_K => 10,
            Self::Q3_K => 11,
            Self::Q4_K => 14,
            Self::Q5_K => 16,
            Self::Q6_K => 18,
            Self::IQ4_NL => 25,
            Self::BF16 => 32,
        }
    }

    /// Bytes of a row of `cols` values.
    ///
    /// # Errors
    /// [`Error::Columns`] when the row is no multiple of a block, or too long to count.
    pub fn row_bytes(self, cols: usize) -> Result<usize> {
        let blocks = cols / self.block_len();
        match blocks.checked_mul(self.block_bytes()) {
            Some(bytes) if cols.is_multiple_of(self.block_len()) => Ok(bytes),
            _ => Err(Error::Columns { ty: self, cols }),
        }
    }
}

impl fmt::Display for BlockType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for BlockType {
    type Err = Error;

    /// In upper or lower case.
    fn from_str(name: &str) -> Result<Self> {
        Self::ALL
            .into_iter()
            .find(|ty| ty.name().eq_ignore_ascii_case(name))
            .ok_or_else(|| Error::UnknownType(name.into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers_find_their_type() {
        for ty in BlockType::ALL {
            assert_eq!(BlockType::from_id(ty.id()), Some(ty));
            assert_eq!(ty.name().to_lowercase().parse::<BlockType>().unwrap(), ty);
        }
        assert_eq!(BlockType::from_id(4), None);
        assert!("q4_2".parse::<BlockType>().is_err());
    }

    #[test]
    fn rows_that_are_not_whole_blocks_fall_back_as_in_llama_cpp() {
        for (ty, smaller) in [
            (BlockType::Q2_K, BlockType::Q4_0),
            (BlockType::Q3_K, BlockType::Q4_0),
            (BlockType::Q4_K, BlockType::Q5_0),
            (BlockType::Q5_K, BlockType::Q5_1),
            (BlockType::Q6_K, BlockType::Q8_0),
            (BlockType::Q8_0, BlockType::Q8_0),
        ] {
            assert_eq!(ty.for_rows(512), ty);
            assert_eq!(ty.for_rows(96), smaller);
            assert_eq!(ty.for_rows(100), BlockType::F16);
        }
        assert_eq!(BlockType::BF16.for_rows(100), BlockType::BF16);
    }

    #[test]
    fn rows_are_whole_blocks() {
        assert_eq!(BlockType::Q4_0.row_bytes(64).unwrap(), 36);
        assert_eq!(BlockType::Q6_K.row_bytes(512).unwrap(), 420);
        assert!(BlockType::Q4_K.row_bytes(320).is_err());
        assert!(BlockType::F32.row_bytes(usize::MAX).is_err());
        assert_eq!(BlockType::Q2_K.bits_per_weight(), 2.625);
    }
}
