//! Which GGUF block type each linear of a model gets: one type for all, or a mix that spends more bits where it pays.
//!
//! The mixes are those of llama.cpp's quantiser in 2026, which change between its versions. They choose by the linear,
//! the position of its block in the model, and how many query heads share a key/value head.

use causal_lm::LinearName;
use packed::BlockType;
use std::fmt::{self, Display, Formatter};
use std::str::FromStr;

/// Block types of the linears of a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum BlockTypes {
    /// The same for all.
    One(BlockType),
    /// Chosen by linear.
    Mix(Mix),
}

/// A mix of block types, by its name in llama.cpp.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(non_camel_case_types, reason = "the names of llama.cpp")]
#[non_exhaustive]
pub enum Mix {
    /// llama.cpp's `Q2_K`, which is a mix: `q2_k` names the type alone.
    Q2_K_M,
    /// Small `Q3_K`.
    Q3_K_S,
    /// Medium `Q3_K`.
    Q3_K_M,
    /// Large `Q3_K`.
    Q3_K_L,
    /// Small `Q4_K`.
    Q4_K_S,
    /// Medium `Q4_K`.
    Q4_K_M,
    /// Small `Q5_K`.
    Q5_K_S,
    /// Medium `Q5_K`.
    Q5_K_M,
}

/// Where a linear is in its model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Which linear of its block; the first of those that are stored as one.
    pub linear: LinearName,
    /// Its block.
    pub block: usize,
    /// Blocks of the model.
    pub blocks: usize,
    /// Query heads for each key/value head of the block.
    pub heads_per_kv: usize,
}

impl Mix {
    /// All mixes.
    pub const ALL: [Self; 8] = [
        Self::Q2_K_M,
        Self::Q3_K_S,
        Self::Q3_K_M,
        Self::Q3_K_L,
        Self::Q4_K_S,
        Self::Q4_K_M,
        Self::Q5_K_S,
        Self::Q5_K_M,
    ];

    /// Its name, as in `q4_k_m`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Q2_K_M => "q2_k_m",
            Self::Q3_K_S => "q3_k_s",
            Self::Q3_K_M => "q3_k_m",
            Self::Q3_K_L => "q3_k_l",
            Self::Q4_K_S => "q4_k_s",
            Self::Q4_K_M => "q4_k_m",
            Self::Q5_K_S => "q5_k_s",
            Self::Q5_K_M => "q5_k_m",
        }
    }

    /// The type of most linears.
    pub fn base(self) -> BlockType {
        match self {
            Self::Q2_K_M => BlockType::Q2_K,
            Self::Q3_K_S | Self::Q3_K_M | Self::Q3_K_L => BlockType::Q3_K,
            Self::Q4_K_S | Self::Q4_K_M => BlockType::Q4_K,
            Self::Q5_K_S | Self::Q5_K_M => BlockType::Q5_K,
        }
    }

    /// `general.file_type` of GGUF files.
    fn file_type(self) -> u32 {
        match self {
            Self::Q2_K_M => 10,
            Self::Q3_K_S => 11,
            Self::Q3_K_M => 12,
            Self::Q3_K_L => 13,
            Self::Q4_K_S => 14,
            Self::Q4_K_M => 15,
            Self::Q5_K_S => 16,
            Self::Q5_K_M => 17,
        }
    }

    fn block_type(self, place: Place) -> BlockType {
        use BlockType::{Q2_K, Q3_K, Q4_K, Q5_K, Q6_K};
        use LinearName::{Down, O, V};
        let Place {
            linear,
            block: i,
            blocks: n,
            heads_per_kv,
        } = place;
        // The first and last eighth of the blocks, and every third between them.
        let more = i < n / 8 || i >= 7 * n / 8 || (i - n / 8) % 3 == 2;
        match (self, linear) {
            (Self::Q2_K_M, V) if heads_per_kv >= 4 => Q4_K,
            (Self::Q2_K_M, V | Down | O) => Q3_K,
            (Self::Q3_K_M, V) if i < 2 => Q5_K,
            (Self::Q3_K_M, Down) if i < n / 16 => Q5_K,
            (Self::Q3_K_M, V | Down | O) => Q4_K,
            (Self::Q3_K_L, V | Down | O) => Q5_K,
            (Self::Q4_K_S, V) if i < 4 => Q5_K,
            (Self::Q4_K_S, Down) if i < n / 8 => Q5_K,
            (Self::Q4_K_M | Self::Q5_K_M, V | Down) if more => Q6_K,
            (Self::Q2_K_M, _) => Q2_K,
            _ => self.base(),
        }
    }
}

impl BlockTypes {
    /// The type of a linear with rows of `cols` weights: the next type with blocks of 32 where its blocks of 256 do not
    /// divide the rows, f16 where no blocks do.
    pub fn of(self, place: Place, cols: usize) -> BlockType {
        let wanted = match self {
            Self::One(ty) => ty,
            Self::Mix(mix) => mix.block_type(place),
        };
        fitting(wanted, cols)
    }

    /// The type of most linears.
    pub fn base(self) -> BlockType {
        match self {
            Self::One(ty) => ty,
            Self::Mix(mix) => mix.base(),
        }
    }

    /// `general.file_type` of a GGUF file with these types.
    pub fn file_type(self) -> u32 {
        match self {
            Self::Mix(mix) => mix.file_type(),
            Self::One(ty) => match ty {
                BlockType::F32 => 0,
                BlockType::F16 => 1,
                BlockType::Q4_0 => 2,
                BlockType::Q4_1 => 3,
                BlockType::Q8_0 => 7,
                BlockType::Q5_0 => 8,
                BlockType::Q5_1 => 9,
                BlockType::Q2_K => Mix::Q2_K_M.file_type(),
                BlockType::Q3_K => Mix::Q3_K_S.file_type(),
                BlockType::Q4_K => Mix::Q4_K_S.file_type(),
                BlockType::Q5_K => Mix::Q5_K_S.file_type(),
                BlockType::Q6_K => 18,
                BlockType::IQ4_NL => 25,
                BlockType::BF16 => 32,
                // A type that llama.cpp has no number for: a guess by the type's own.
                other => 1024 + other.id(),
            },
        }
    }
}

/// `ty`, or the type that llama.cpp takes instead where rows of `cols` weights are not whole blocks of it.
pub fn fitting(ty: BlockType, cols: usize) -> BlockType {
    let divides = |ty: BlockType| cols.is_multiple_of(ty.block_len());
    if divides(ty) {
        return ty;
    }
    let smaller = match ty {
        BlockType::Q2_K | BlockType::Q3_K => BlockType::Q4_0,
        BlockType::Q4_K => BlockType::Q5_0,
        BlockType::Q5_K => BlockType::Q5_1,
        BlockType::Q6_K => BlockType::Q8_0,
        other => other,
    };
    match divides(smaller) {
        true => smaller,
        false => BlockType::F16,
    }
}

impl Display for BlockTypes {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::One(ty) => f.write_str(&ty.name().to_lowercase()),
            Self::Mix(mix) => f.write_str(mix.name()),
        }
    }
}

impl FromStr for BlockTypes {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        if let Some(mix) = Mix::ALL.into_iter().find(|mix| mix.name() == name) {
            return Ok(Self::Mix(mix));
        }
        match name.parse::<BlockType>() {
            Ok(ty) if ty.is_quantised() && name == ty.name().to_lowercase() => Ok(Self::One(ty)),
            _ => Err(format!("`{name}` is no block type and no mix of them")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use LinearName::{Down, Gate, K, O, Q, V};

    fn types(mix: Mix, linear: LinearName, blocks: usize, heads_per_kv: usize) -> Vec<BlockType> {
        let place = |block| Place {
            linear,
            block,
            blocks,
            heads_per_kv,
        };
        let of = |block| BlockTypes::Mix(mix).of(place(block), 256);
        (0..blocks).map(of).collect()
    }

    #[test]
    fn mixes_spend_more_bits_where_llama_cpp_does() {
        use BlockType::{Q2_K, Q3_K, Q4_K, Q5_K, Q6_K};
        // Of 32 blocks: 0–3, 28–31, and 6, 9, … between them.
        let rich = types(Mix::Q4_K_M, Down, 32, 1);
        let six: Vec<usize> = (0..32).filter(|&i| rich[i] == Q6_K).collect();
        assert_eq!(
            six,
            [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]
        );
        assert_eq!(types(Mix::Q4_K_M, V, 32, 1), rich);
        assert!(types(Mix::Q4_K_M, Q, 32, 1).iter().all(|ty| *ty == Q4_K));
        let five = types(Mix::Q5_K_M, V, 8, 1);
        assert_eq!(five, [Q6_K, Q5_K, Q5_K, Q6_K, Q5_K, Q5_K, Q6_K, Q6_K]);
        let small = types(Mix::Q4_K_S, V, 6, 1);
        assert_eq!(small, [Q5_K, Q5_K, Q5_K, Q5_K, Q4_K, Q4_K]);
        assert_eq!(types(Mix::Q4_K_S, Down, 16, 1)[..3], [Q5_K, Q5_K, Q4_K]);
        assert_eq!(types(Mix::Q3_K_M, V, 4, 1), [Q5_K, Q5_K, Q4_K, Q4_K]);
        assert_eq!(types(Mix::Q3_K_M, Down, 32, 1)[..3], [Q5_K, Q5_K, Q4_K]);
        assert_eq!(types(Mix::Q3_K_M, O, 1, 1), [Q4_K]);
        assert_eq!(types(Mix::Q3_K_L, O, 1, 1), [Q5_K]);
        assert_eq!(types(Mix::Q2_K_M, V, 1, 4), [Q4_K]);
        assert_eq!(types(Mix::Q2_K_M, V, 1, 3), [Q3_K]);
        assert_eq!(types(Mix::Q2_K_M, K, 1, 4), [Q2_K]);
        assert_eq!(types(Mix::Q2_K_M, Gate, 1, 4), [Q2_K]);
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
            assert_eq!(fitting(ty, 512), ty);
            assert_eq!(fitting(ty, 96), smaller);
            assert_eq!(fitting(ty, 100), BlockType::F16);
        }
    }

    #[test]
    fn names_come_back_and_types_without_blocks_have_none() {
        for name in ["q4_k_m", "q2_k_m", "q2_k", "q8_0", "iq4_nl"] {
            assert_eq!(name.parse::<BlockTypes>().unwrap().to_string(), name);
        }
        for name in ["f16", "Q4_K", "q4_k_x", ""] {
            assert!(name.parse::<BlockTypes>().is_err(), "{name}");
        }
    }
}
