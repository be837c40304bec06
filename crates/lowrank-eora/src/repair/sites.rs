//! The linears of a decoder, and which of them share an input.

use causal_lm::{Block, Linear, LinearName, Site, names};
use serde::{Deserialize, Serialize};
use std::fmt;

/// A linear of a decoder; shown and serialised as its module path, `model.layers.3.mlp.down_proj`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct LayerId {
    /// Block.
    pub block: usize,
    /// Linear of the block.
    pub linear: LinearName,
}

impl LayerId {
    /// The linear with this module path.
    pub fn parse(module: &str) -> Option<Self> {
        let (block, path) = names::parse_block(module)?;
        let linear = LinearName::ALL.into_iter().find(|l| l.path() == path)?;
        Some(Self { block, linear })
    }

    /// Name of its weight in a checkpoint.
    pub fn weight(self) -> String {
        self.linear.weight(self.block)
    }
}

impl fmt::Display for LayerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&names::block(self.block, self.linear.path()))
    }
}

impl From<LayerId> for String {
    fn from(layer: LayerId) -> Self {
        layer.to_string()
    }
}

impl TryFrom<String> for LayerId {
    type Error = String;

    fn try_from(module: String) -> Result<Self, String> {
        Self::parse(&module).ok_or_else(|| format!("{module:?} is no linear of a decoder block"))
    }
}

/// The distinct inputs of a block with the linears that read them, in the order of the data.
pub(super) const SITES: [(Site, &[LinearName]); 4] = [
    (Site::Qkv, &[LinearName::Q, LinearName::K, LinearName::V]),
    (Site::O, &[LinearName::O]),
    (Site::GateUp, &[LinearName::Gate, LinearName::Up]),
    (Site::Down, &[LinearName::Down]),
];

/// The input that a linear reads.
pub(super) fn site_of(linear: LinearName) -> Site {
    match linear {
        LinearName::Q | LinearName::K | LinearName::V => Site::Qkv,
        LinearName::O => Site::O,
        LinearName::Gate | LinearName::Up => Site::GateUp,
        LinearName::Down => Site::Down,
    }
}

/// Place of a site in [`SITES`].
pub(super) fn site_index(site: Site) -> usize {
    match site {
        Site::Qkv => 0,
        Site::O => 1,
        Site::GateUp => 2,
        Site::Down => 3,
    }
}

/// A linear of a loaded block, unless the block lacks that half.
pub(super) fn linear_mut(block: &mut Block, name: LinearName) -> Option<&mut Linear> {
    let (attention, mlp) = (block.attention.as_mut(), block.mlp.as_mut());
    match name {
        LinearName::Q => attention.map(|a| &mut a.q),
        LinearName::K => attention.map(|a| &mut a.k),
        LinearName::V => attention.map(|a| &mut a.v),
        LinearName::O => attention.map(|a| &mut a.o),
        LinearName::Gate => mlp.map(|m| &mut m.gate),
        LinearName::Up => mlp.map(|m| &mut m.up),
        LinearName::Down => mlp.map(|m| &mut m.down),
    }
}

/// Width of the input at a site, unless the block lacks that half.
pub(super) fn width(block: &Block, site: Site) -> Option<usize> {
    let (attention, mlp) = (block.attention.as_ref(), block.mlp.as_ref());
    let linear = match site {
        Site::Qkv => attention.map(|a| &a.q),
        Site::O => attention.map(|a| &a.o),
        Site::GateUp => mlp.map(|m| &m.gate),
        Site::Down => mlp.map(|m| &m.down),
    };
    linear.map(|linear| linear.weight.dims()[1])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_layer_is_its_module_path() {
        for (site, linears) in SITES {
            assert_eq!(SITES[site_index(site)].0, site);
            for &linear in linears {
                assert_eq!(site_of(linear), site);
                let id = LayerId { block: 11, linear };
                assert_eq!(LayerId::parse(&id.to_string()), Some(id));
                assert_eq!(id.weight(), format!("{id}.weight"));
            }
        }
        assert_eq!(LayerId::parse("model.layers.0.input_layernorm"), None);
        assert_eq!(LayerId::parse("lm_head"), None);
    }
}
