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
    /// Experts of the model's mixtures; 0 where it has none.
    pub experts: usize,
}

/// Experts of Mixtral 8x7B, in which llama.cpp gives the few weights of attention more bits.
const MIXTRAL_EXPERTS: usize = 8;

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
        use BlockType::{Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, Q8_0};
        use LinearName::{Down, K, O, V};
        let Place {
            linear,
            block: i,
            blocks: n,
            heads_per_kv,
            experts,
        } = place;
        if experts == MIXTRAL_EXPERTS {
            match linear {
                K | V => return Q8_0,
                O => return Q5_K,
                _ => {}
            }
        }
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
        self.wanted(place).for_rows(cols)
    }

    /// The type that a linear has where its rows are whole blocks.
    pub fn wanted(self, place: Place) -> BlockType {
        match self {
            Self::One(ty) => ty,
            Self::Mix(mix) => mix.block_type(place),
        }
    }

    /// The same where columns are weighted by importance: `Q4_0` and `Q5_0` lose much in the first down projections then,
    /// which get an offset.
    pub(super) fn weighted(self, place: Place) -> Self {
        let first = place.linear == LinearName::Down && place.block < place.blocks / 8;
        match self {
            Self::One(BlockType::Q4_0) if first => Self::One(BlockType::Q4_1),
            Self::One(BlockType::Q5_0) if first => Self::One(BlockType::Q5_1),
            other => other,
        }
    }

    /// The type of most linears.
    pub fn base(self) -> BlockType {
        match self {
            Self::One(ty) => ty,
            Self::Mix(mix) => mix.base(),
        }
    }

    /// The type of an embedding with rows of `cols` values that is not the output head as well.
    pub fn embedding(self, cols: usize) -> BlockType {
        self.base().for_rows(cols)
    }

    /// The type of the output head, also where it is the embedding: what it rounds shows in every logit.
    pub fn head(self, cols: usize) -> BlockType {
        let wanted = match self.base() {
            BlockType::Q8_0 => BlockType::Q8_0,
            _ => BlockType::Q6_K,
        };
        wanted.for_rows(cols)
    }

    /// `general.file_type` of a GGUF file of these types in which most weights are of type `most`: where fallbacks have taken
    /// over, the file is of their kind.
    pub fn file_type(self, most: BlockType) -> u32 {
        match self {
            Self::Mix(mix) if mix.base() == most => mix.file_type(),
            _ => most.file_type(),
        }
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
            experts: 0,
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
    fn with_eight_experts_attention_gets_more_bits() {
        let of = |mix: Mix, linear, experts| {
            let place = Place {
                linear,
                block: 5,
                blocks: 32,
                heads_per_kv: 4,
                experts,
            };
            BlockTypes::Mix(mix).of(place, 256)
        };
        for mix in Mix::ALL {
            assert_eq!(of(mix, K, 8), BlockType::Q8_0);
            assert_eq!(of(mix, V, 8), BlockType::Q8_0);
            assert_eq!(of(mix, O, 8), BlockType::Q5_K);
            for linear in [Q, Gate, Down] {
                assert_eq!(of(mix, linear, 8), of(mix, linear, 0));
            }
            assert_eq!(of(mix, K, 64), mix.base());
        }
    }

    #[test]
    fn with_importance_the_first_down_projections_get_an_offset() {
        use BlockType::{Q4_0, Q4_1, Q4_K, Q5_0, Q5_1};
        let of = |ty, linear, block| {
            let place = Place {
                linear,
                block,
                blocks: 16,
                heads_per_kv: 1,
                experts: 0,
            };
            BlockTypes::One(ty).weighted(place)
        };
        for (ty, first) in [(Q4_0, Q4_1), (Q5_0, Q5_1), (Q4_K, Q4_K)] {
            assert_eq!(of(ty, Down, 1), BlockTypes::One(first));
            assert_eq!(of(ty, Down, 2), BlockTypes::One(ty));
            assert_eq!(of(ty, V, 1), BlockTypes::One(ty));
        }
    }

    #[test]
    fn a_head_has_six_bits_and_a_file_is_of_the_kind_of_most_weights() {
        let mix = BlockTypes::Mix(Mix::Q4_K_M);
        assert_eq!(mix.head(512), BlockType::Q6_K);
        assert_eq!(mix.head(576), BlockType::Q8_0);
        assert_eq!(mix.embedding(512), BlockType::Q4_K);
        assert_eq!(mix.embedding(576), BlockType::Q5_0);
        assert_eq!(BlockTypes::One(BlockType::Q8_0).head(512), BlockType::Q8_0);
        assert_eq!(mix.file_type(BlockType::Q4_K), 15);
        assert_eq!(mix.file_type(BlockType::Q5_0), 8);
        assert_eq!(
            BlockTypes::One(BlockType::Q4_K).file_type(BlockType::Q4_K),
            14
        );
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
