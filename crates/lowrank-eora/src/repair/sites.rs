//! The linears of a decoder as its checkpoint stores them, and which of them share an input.
//!
//! The unit of compression and repair is the stored module, because that is what adapters, packed formats and runtimes
//! name: where an architecture stacks q, k and v in one tensor, it is repaired as one matrix.

use causal_lm::names::{Module, ModuleId};
use causal_lm::{Block, Decoder, LinearName, ModelConfig, Site};
use serde::{Deserialize, Serialize};
use std::fmt;

/// A stored linear of a decoder; shown and serialised as its module path, `model.layers.3.mlp.down_proj`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct LayerId(ModuleId);

impl LayerId {
    /// A module of block `block`.
    pub fn new(config: &ModelConfig, block: usize, module: &'static Module) -> Self {
        Self(config.names.id(block, module))
    }

    /// The linear with this module path.
    pub fn parse(module: &str) -> Option<Self> {
        ModuleId::parse(module).map(Self)
    }

    /// Its block.
    pub fn block(self) -> usize {
        self.0.block()
    }

    /// Where it is stored.
    pub fn module(self) -> &'static Module {
        self.0.module()
    }

    /// Name of its weight in a checkpoint.
    pub fn weight(self) -> String {
        format!("{self}.weight")
    }
}

impl fmt::Display for LayerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
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

/// The linears that a decoder stores, in the order of the data, with outputs and inputs.
pub fn linears(decoder: &Decoder<'_>) -> Vec<(LayerId, [usize; 2])> {
    let config = decoder.config();
    let in_block = |block| {
        SITES
            .into_iter()
            .flat_map(move |site| modules_at(config, site))
            .filter_map(move |module| {
                let shape = config.module_shape(block, module)?;
                Some((LayerId::new(config, block, module), shape))
            })
    };
    (0..config.layers()).flat_map(in_block).collect()
}

/// The distinct inputs of a block, in the order of the data.
pub(super) const SITES: [Site; 4] = [Site::Qkv, Site::O, Site::GateUp, Site::Down];

/// The stored modules that read an input.
pub(super) fn modules_at(
    config: &ModelConfig,
    site: Site,
) -> impl Iterator<Item = &'static Module> {
    let modules = config.names.table().modules.iter();
    modules.filter(move |module| site_of(module) == site)
}

/// The linears that read an input, however they are stored.
pub(super) fn linears_at(site: Site) -> &'static [LinearName] {
    match site {
        Site::Qkv => &[
            LinearName::Q,
            LinearName::K,
            LinearName::V,
            LinearName::DeltaQkv,
            LinearName::DeltaZ,
            LinearName::DeltaB,
            LinearName::DeltaA,
        ],
        Site::O => &[LinearName::O, LinearName::DeltaOut],
        Site::GateUp => &[LinearName::Gate, LinearName::Up],
        Site::Down => &[LinearName::Down],
    }
}

/// The input that a module reads.
pub(super) fn site_of(module: &Module) -> Site {
    match (module.is_attention(), module.is_output()) {
        (true, false) => Site::Qkv,
        (true, true) => Site::O,
        (false, false) => Site::GateUp,
        (false, true) => Site::Down,
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

/// Width of the input at a site, unless the block lacks that half.
pub(super) fn width(block: &Block, site: Site) -> Option<usize> {
    let mut linears = linears_at(site).iter();
    let linear = linears.find_map(|&name| block.linear(name));
    linear.map(|linear| linear.inputs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_layer_is_its_module_path() {
        for (path, site) in [
            ("model.layers.11.self_attn.k_proj", Site::Qkv),
            ("model.layers.11.self_attn.qkv_proj", Site::Qkv),
            ("gpt_neox.layers.11.attention.dense", Site::O),
            ("model.layers.11.shared_mlp.input_linear", Site::GateUp),
            ("language_model.model.layers.11.mlp.down_proj", Site::Down),
            ("model.layers.11.linear_attn.in_proj_b", Site::Qkv),
            (
                "model.language_model.layers.11.linear_attn.out_proj",
                Site::O,
            ),
        ] {
            let id = LayerId::parse(path).unwrap();
            assert_eq!((id.block(), site_of(id.module())), (11, site));
            assert_eq!(SITES[site_index(site)], site);
            assert_eq!(id.to_string(), path);
            assert_eq!(id.weight(), format!("{path}.weight"));
        }
        assert_eq!(LayerId::parse("model.layers.0.input_layernorm"), None);
        assert_eq!(LayerId::parse("lm_head"), None);
    }
}
