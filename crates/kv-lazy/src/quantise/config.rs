//! Storage as data: what a command line or a file says.

use super::format::Format;
use super::hadamard;
use crate::error::{Error, Result};
use candle_core::DType;
use serde::{Deserialize, Serialize};
use std::str::FromStr;

/// Tokens that are quantised together.
pub(crate) const BLOCK: usize = 32;

/// Groups of a token at most.
pub(crate) const MOST_GROUPS: usize = 16;

/// What numbers are stored as.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum NumberFormat {
    /// 32 bits.
    F32,
    /// 16 bits.
    F16,
    /// 16 bits with the range of f32.
    Bf16,
    /// 8-bit integers, symmetric, a scale per group.
    Int8,
    /// 4-bit integers, asymmetric, a scale and a low per group.
    Int4,
}

/// Which keys share a scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum KeyGroups {
    /// Elements of one token: tokens can be evicted and moved.
    #[default]
    PerToken,
    /// One channel of 32 tokens, as in KIVI (arXiv 2402.02750): for caches that keep every token.
    PerChannel,
}

/// How keys and values are stored. Presets by name: `f32`, `f16`, `bf16`, `int8`, `k8v4`, `int4`, `int4-per-channel`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default, deny_unknown_fields)]
#[non_exhaustive]
pub struct StorageConfig {
    /// Format of the keys; unset: the cache's dtype.
    pub keys: Option<NumberFormat>,
    /// Format of the values; unset: the cache's dtype.
    pub values: Option<NumberFormat>,
    /// Elements of a token that share a scale: a multiple of 8 that divides `head_dim`. Unset: the largest one up to 64.
    pub group: Option<usize>,
    /// Whether keys are rotated by a Hadamard matrix before they are quantised; unset: at 4 bits.
    pub rotate_keys: Option<bool>,
    /// Whether values are; unset: at 4 bits.
    pub rotate_values: Option<bool>,
    /// Which keys share a scale.
    pub key_groups: KeyGroups,
    /// First tokens kept in f16 where the format is an integer; 4.
    pub sinks: usize,
    /// Newest tokens kept in f16 where the format is an integer; 32. At least as many as the policy protects or as it observes queries; up to 31 more until
    /// the next 32 are quantised together.
    pub residual: usize,
}

impl Default for StorageConfig {
    fn default() -> Self {
        Self {
            keys: None,
            values: None,
            group: None,
            rotate_keys: None,
            rotate_values: None,
            key_groups: KeyGroups::PerToken,
            sinks: 4,
            residual: 32,
        }
    }
}

impl StorageConfig {
    /// Names of the presets.
    pub const PRESETS: [&'static str; 7] = [
        "f32",
        "f16",
        "bf16",
        "int8",
        "k8v4",
        "int4",
        "int4-per-channel",
    ];

    /// Keys and values in these formats, all else by default.
    pub fn new(keys: NumberFormat, values: NumberFormat) -> Self {
        Self {
            keys: Some(keys),
            values: Some(values),
            ..Self::default()
        }
    }

    /// 8-bit keys and values.
    pub fn int8() -> Self {
        Self::new(NumberFormat::Int8, NumberFormat::Int8)
    }

    /// 8-bit keys, 4-bit values.
    pub fn k8v4() -> Self {
        Self::new(NumberFormat::Int8, NumberFormat::Int4)
    }

    /// 4-bit keys and values.
    pub fn int4() -> Self {
        Self::new(NumberFormat::Int4, NumberFormat::Int4)
    }

    /// Whether keys or values are quantised.
    pub fn is_quantised(&self) -> bool {
        let integer = |format| matches!(format, Some(NumberFormat::Int8 | NumberFormat::Int4));
        integer(self.keys) || integer(self.values)
    }

    /// The storage of heads of `head_dim` in a cache of `dtype`; `residual` is what the policy wants to find in f16.
    pub(crate) fn layout(&self, head_dim: usize, dtype: DType, residual: usize) -> Result<Layout> {
        let quantised = self.is_quantised();
        let mut keys = self.side(self.keys, self.rotate_keys, head_dim, dtype)?;
        let values = self.side(self.values, self.rotate_values, head_dim, dtype)?;
        if self.key_groups == KeyGroups::PerChannel {
            let Side::Packed(format) = &mut keys else {
                return Err(Error::Setting {
                    name: "key-groups",
                    value: "per-channel".into(),
                    expected: "int8 or int4 keys",
                });
            };
            if self.rotate_keys == Some(true) {
                return Err(Error::Setting {
                    name: "rotate-keys",
                    value: "true".into(),
                    expected: "no rotation where groups run along channels",
                });
            }
            format.rotation = 1;
            format.channel = BLOCK;
            // One scale serves both signs worse than a low does.
            format.symmetric = false;
        }
        if u32::try_from(self.sinks).is_err() || u32::try_from(self.residual).is_err() {
            return Err(Error::Setting {
                name: "sinks and residual",
                value: format!("{} and {}", self.sinks, self.residual),
                expected: "at most 4294967295",
            });
        }
        let residual = self.residual.max(residual);
        Ok(Layout {
            keys,
            values,
            sinks: if quantised { self.sinks } else { 0 },
            residual: quantised.then_some(residual),
            kept: residual,
        })
    }

    fn side(
        &self,
        format: Option<NumberFormat>,
        rotate: Option<bool>,
        head_dim: usize,
        dtype: DType,
    ) -> Result<Side> {
        let bits = match format {
            None => return Side::exact(dtype),
            Some(NumberFormat::F32) => return Side::exact(DType::F32),
            Some(NumberFormat::F16) => return Side::exact(DType::F16),
            Some(NumberFormat::Bf16) => return Side::exact(DType::BF16),
            Some(NumberFormat::Int8) => 8,
            Some(NumberFormat::Int4) => 4,
        };
        let group = match self.group {
            Some(group) => group,
            None => {
                let divides = |group: &usize| head_dim.is_multiple_of(*group);
                (8..=64).rev().step_by(8).find(divides).unwrap_or(0)
            }
        };
        let fits = group > 0 && group.is_multiple_of(8) && head_dim.is_multiple_of(group);
        if !fits || head_dim / group > MOST_GROUPS {
            return Err(Error::Setting {
                name: "group",
                value: format!("{group} for heads of {head_dim}"),
                expected: "a multiple of 8 that divides the head into at most 16 groups, which integers need",
            });
        }
        let block = hadamard::block(head_dim);
        let rotation = if rotate.unwrap_or(bits == 4) {
            block
        } else {
            1
        };
        Ok(Side::Packed(Format {
            head_dim,
            bits,
            symmetric: bits == 8,
            group,
            rotation,
            channel: 0,
        }))
    }
}

impl FromStr for StorageConfig {
    type Err = Error;

    /// A preset by its name.
    fn from_str(name: &str) -> Result<Self> {
        let plain = |format| Self::new(format, format);
        Ok(match name {
            "f32" => plain(NumberFormat::F32),
            "f16" => plain(NumberFormat::F16),
            "bf16" => plain(NumberFormat::Bf16),
            "int8" => Self::int8(),
            "k8v4" => Self::k8v4(),
            "int4" => Self::int4(),
            "int4-per-channel" => Self {
                key_groups: KeyGroups::PerChannel,
                ..Self::int4()
            },
            _ => {
                return Err(Error::Setting {
                    name: "storage",
                    value: name.into(),
                    expected: "f32, f16, bf16, int8, k8v4, int4 or int4-per-channel",
                });
            }
        })
    }
}

/// What one side is stored as.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Side {
    /// As floats of this type.
    Exact(DType),
    /// As integers, but f16 for the first and newest tokens.
    Packed(Format),
}

impl Side {
    fn exact(dtype: DType) -> Result<Self> {
        match dtype {
            DType::F32 | DType::F16 | DType::BF16 => Ok(Self::Exact(dtype)),
            got => Err(Error::DType { got }),
        }
    }

    /// The type of tokens that are not quantised.
    pub(crate) fn dtype(self) -> DType {
        match self {
            Self::Exact(dtype) => dtype,
            Self::Packed(_) => DType::F16,
        }
    }
}

/// How a layer's rows are stored.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Layout {
    pub(crate) keys: Side,
    pub(crate) values: Side,
    /// First positions that are never quantised.
    pub(crate) sinks: usize,
    /// Newest tokens that are not quantised yet; none where nothing ever is.
    pub(crate) residual: Option<usize>,
    /// Of these, how many no eviction takes.
    kept: usize,
}

/// Tokens of a row that there is room for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Room {
    /// First tokens, as floats.
    pub(crate) sinks: usize,
    /// Quantised tokens.
    pub(crate) packed: usize,
    /// Newest tokens, as floats; all tokens where nothing is quantised.
    pub(crate) recent: usize,
}

impl Layout {
    /// The same for a policy that never evicts the newest `protected` tokens.
    pub(crate) fn evicting(self, protected: usize) -> Self {
        Self {
            kept: self.kept.min(protected),
            ..self
        }
    }

    /// Room for a row that never holds more than `most` tokens and grows one by one. It is more than `most` where tokens are quantised: either
    /// side may be at its longest while the other is not.
    pub(crate) fn room(&self, most: usize) -> Room {
        let Some(residual) = self.residual else {
            return Room {
                sinks: 0,
                packed: 0,
                recent: most,
            };
        };
        let rest = most.saturating_sub(self.sinks);
        let due = residual.saturating_add(BLOCK);
        Room {
            sinks: self.sinks.min(most),
            packed: if rest < due { 0 } else { rest - self.kept },
            recent: rest.min(due),
        }
    }

    /// The same for a row that may have quantised tokens when it is cut down to `most`.
    pub(crate) fn room_after_more(&self, most: usize) -> Room {
        let room = self.room(most);
        let rest = most - room.sinks;
        Room {
            packed: self.residual.map_or(0, |_| rest.saturating_sub(self.kept)),
            ..room
        }
    }

    /// Bytes of the keys and values of that many tokens.
    pub(crate) fn bytes(&self, head_dim: usize, room: Room) -> usize {
        let exact = room.sinks + room.recent;
        let side = |side: Side| {
            let floats = exact * head_dim * side.dtype().size_in_bytes();
            let format = match side {
                Side::Exact(dtype) => room.packed * head_dim * dtype.size_in_bytes(),
                Side::Packed(format) => format.bytes(room.packed),
            };
            floats + format
        };
        side(self.keys) + side(self.values)
    }

    /// Whether tokens share scales, so that they can be neither evicted nor moved.
    pub(crate) fn shares_scales(&self) -> bool {
        matches!(self.keys, Side::Packed(format) if format.channel > 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_of_a_layer_equal_golden_values() {
        // 4096 tokens in 3 KV heads of 64 elements.
        let of = |name: &str, sinks, residual| {
            let mut config: StorageConfig = name.parse().unwrap();
            (config.sinks, config.residual) = (sinks, residual);
            let layout = config.layout(64, DType::F32, 0).unwrap();
            // Whole blocks of 32 are packed.
            let packed = if config.is_quantised() {
                (4096 - sinks - residual) / BLOCK * BLOCK
            } else {
                0
            };
            let room = Room {
                sinks,
                packed,
                recent: 4096 - sinks - packed,
            };
            3 * layout.bytes(64, room)
        };
        assert_eq!(of("f16", 0, 0), 3_145_728);
        assert_eq!(of("int8", 0, 0), 1_622_016);
        assert_eq!(of("int4", 0, 0), 884_736);
        // 4000 of the 4028 that the formula packs.
        assert_eq!(of("int4", 4, 64), 922_272 + 3 * 28 * (256 - 72));
        assert_eq!(of("k8v4", 4, 64), 1_284_792 + 3 * 28 * (256 - 102));
        // 16,384 tokens in 8 KV heads of 128 elements.
        let wide = |name: &str, group, sinks| {
            let mut config: StorageConfig = name.parse().unwrap();
            (config.group, config.sinks, config.residual) = (Some(group), sinks, 128);
            let layout = config.layout(128, DType::F16, 0).unwrap();
            let packed = (16_384 - sinks - 128) / BLOCK * BLOCK;
            let recent = 16_384 - sinks - packed;
            let room = Room {
                sinks,
                packed,
                recent,
            };
            8 * layout.bytes(128, room)
        };
        assert_eq!(wide("int4", 32, 0), 21_331_968);
        // 16,224 of the 16,252 that the formula packs.
        assert_eq!(wide("int4", 64, 4), 19_262_976 + 8 * 28 * (512 - 144));
        assert_eq!(wide("k8v4", 64, 4), 27_063_936 + 8 * 28 * (512 - 204));
    }

    #[test]
    fn a_row_has_room_for_its_longest_and_no_more() {
        let room = |layout: Layout, most| {
            let room = layout.room(most);
            [room.sinks, room.packed, room.recent]
        };
        let of = |name: &str| {
            let config: StorageConfig = name.parse().unwrap();
            config.layout(64, DType::F16, 0).unwrap()
        };
        assert_eq!(room(of("f16"), 300), [0, 0, 300]);
        // 4 first tokens, 32 newest and a block that waits to be quantised.
        assert_eq!(room(of("int8"), 300), [4, 300 - 4 - 32, 64]);
        assert_eq!(room(of("int8").evicting(20), 300), [4, 300 - 4 - 20, 64]);
        // Nothing is ever quantised.
        assert_eq!(room(of("int8"), 67), [4, 0, 63]);
        assert_eq!(room(of("int8"), 3), [3, 0, 0]);
        let after = of("int8").evicting(20).room_after_more(60);
        assert_eq!([after.sinks, after.packed, after.recent], [4, 36, 56]);
        assert_eq!(of("f16").room_after_more(60), of("f16").room(60));
    }

    #[test]
    fn presets_parse_and_groups_follow_the_head() {
        for name in StorageConfig::PRESETS {
            let config: StorageConfig = name.parse().unwrap();
            let json = serde_json::to_string(&config).unwrap();
            assert_eq!(
                serde_json::from_str::<StorageConfig>(&json).unwrap(),
                config
            );
            assert!(config.layout(64, DType::F16, 0).is_ok(), "{name}");
        }
        for (head_dim, group) in [(64, 64), (128, 64), (96, 48), (80, 40), (40, 40), (8, 8)] {
            let layout = StorageConfig::int4()
                .layout(head_dim, DType::F32, 7)
                .unwrap();
            let Side::Packed(format) = layout.keys else {
                panic!("int4 is packed");
            };
            assert_eq!(format.group, group, "{head_dim}");
            assert_eq!(layout.residual, Some(32));
        }
        assert_eq!(
            StorageConfig::int8()
                .layout(64, DType::F32, 128)
                .unwrap()
                .residual,
            Some(128)
        );
        let refused =
            |config: StorageConfig, head_dim| config.layout(head_dim, DType::F32, 0).is_err();
        assert!(refused(StorageConfig::int8(), 21) && refused(StorageConfig::int4(), 36));
        let mut odd = StorageConfig::int4();
        odd.group = Some(24);
        assert!(refused(odd, 64));
        let mut rotated: StorageConfig = "int4-per-channel".parse().unwrap();
        rotated.rotate_keys = Some(true);
        assert!(refused(rotated, 64));
        assert!("int3".parse::<StorageConfig>().is_err());
    }
}
