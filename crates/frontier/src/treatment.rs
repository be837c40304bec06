//! Treatments: what can be done to a site.

use crate::cache::Cache;
use crate::{Error, Result};
use lowrank_eora::compress::{BlockRounding, BlockTypes, Compressor, Group, Rounding, Storage};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// Outputs and inputs of a matrix that all groups and blocks divide.
const LARGE: (usize, usize) = (4096, 4096);

/// How the weights of a site are stored. Shown and serialised as `stored` or the name of a compressor
/// (`gptq-int4-g128`, `gptq-q4_k`).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
#[non_exhaustive]
pub enum Format {
    /// As the model stores them.
    Stored,
    /// In the groups or blocks of a compressor.
    Quantised(Compressor),
}

impl Format {
    /// The compressor, where there is one.
    pub fn compressor(self) -> Option<Compressor> {
        match self {
            Self::Stored => None,
            Self::Quantised(compressor) => Some(compressor),
        }
    }

    /// Whether it is a grid of one of these numbers of bits.
    pub(crate) fn has_bits(self, any: &[usize]) -> bool {
        let grid = self.compressor().and_then(|compressor| compressor.quantise);
        grid.is_some_and(|quantise| any.contains(&quantise.grid.bits.get()))
    }

    /// Inputs that share a scale, where it is a grid of groups.
    pub(crate) fn group(self) -> Option<Group> {
        let quantise = self.compressor()?.quantise?;
        Some(quantise.grid.group)
    }

    /// Bytes of a large matrix, to order formats by; without an end where it stays as it is.
    pub(crate) fn size(self) -> usize {
        let Self::Quantised(compressor) = self else {
            return usize::MAX;
        };
        let storage = Storage::predicted(&compressor, LARGE, 2);
        storage.map_or(0, |storage| storage.bytes())
    }

    /// Whether it is a mix, whose block types depend on the place of a linear.
    pub(crate) fn is_mix(self) -> bool {
        let blocks = self.compressor().and_then(|compressor| compressor.blocks);
        blocks.is_some_and(|blocks| matches!(blocks.types, BlockTypes::Mix(_)))
    }

    /// The same grid with weights rounded to the nearest value: for matrices of which rows are looked up, where the
    /// error of one weight cannot be made up for by another.
    pub fn nearest(self) -> Self {
        let Self::Quantised(mut compressor) = self else {
            return self;
        };
        if let Some(quantise) = &mut compressor.quantise {
            quantise.rounding = Rounding::Nearest;
        }
        if let Some(blocks) = &mut compressor.blocks {
            blocks.rounding = BlockRounding::Nearest { importance: false };
        }
        Self::Quantised(compressor)
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stored => f.write_str("stored"),
            Self::Quantised(compressor) => compressor.fmt(f),
        }
    }
}

impl FromStr for Format {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        match name {
            "stored" => Ok(Self::Stored),
            name => Ok(Self::Quantised(name.parse()?)),
        }
    }
}

impl From<Format> for String {
    fn from(format: Format) -> Self {
        format.to_string()
    }
}

impl TryFrom<String> for Format {
    type Error = Error;

    fn try_from(name: String) -> Result<Self> {
        name.parse()
    }
}

/// What is done to a site, in this order: prune and refit, quantise, correct.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Treatment {
    /// Units that stay: key/value heads, query heads or neurons; 1 for a matrix, which stays whole.
    pub width: usize,
    /// How what stays is stored.
    pub format: Format,
    /// Rank of the correction of each linear, stored in f16; 0 for none.
    pub rank: usize,
    /// The cache of the layer, at attention where caches count.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache: Option<Cache>,
}

impl Treatment {
    /// Whether its weights are those of the model, given the number of units that the model has there.
    pub fn is_dense(&self, units: usize) -> bool {
        self.width == units && self.format == Format::Stored && self.rank == 0
    }
}

impl fmt::Display for Treatment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.width, self.format)?;
        if self.rank > 0 {
            write!(f, " r{}", self.rank)?;
        }
        match self.cache.filter(|cache| !cache.is_dense()) {
            Some(cache) => write!(f, ", cache {cache}"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn treatments_come_back_from_json_as_they_were() {
        for name in [
            "stored",
            "gptq-int3-g64",
            "rtn-int8-g128",
            "q8_0",
            "gptq-q4_k",
        ] {
            let treatment = Treatment {
                width: 96,
                format: name.parse().unwrap(),
                rank: 4,
                cache: None,
            };
            let json = serde_json::to_string(&treatment).unwrap();
            assert!(json.contains(name), "{json}");
            assert_eq!(serde_json::from_str::<Treatment>(&json).unwrap(), treatment);
        }
        assert!("gptq-int5".parse::<Format>().is_err());
    }

    #[test]
    fn the_nearest_value_of_the_same_grid_is_another_rounding_alone() {
        let nearest = |name: &str| name.parse::<Format>().unwrap().nearest().to_string();
        assert_eq!(nearest("gptq-int4-g32"), "rtn-int4-g32");
        assert_eq!(nearest("gptq-q4_k"), "q4_k");
        assert_eq!(nearest("stored"), "stored");
    }
}
